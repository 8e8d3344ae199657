-- The secrets of matching that are not revealed yet: what a draw comes from. The log has their
-- commitments only. Nobody but the matcher's role reads this; a revealed secret is deleted here.
CREATE SCHEMA matcher;

CREATE TABLE matcher.secrets (
    shard       integer NOT NULL,
    commitment  text    NOT NULL CHECK (commitment ~ '^[0-9a-f]{64}$'),
    secret      bytea   NOT NULL CHECK (octet_length(secret) = 32),
    kept_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (shard, commitment)
);

REVOKE ALL ON SCHEMA matcher FROM PUBLIC;
GRANT USAGE ON SCHEMA matcher TO cocoon_matcher;
GRANT SELECT, INSERT, DELETE ON matcher.secrets TO cocoon_matcher;
