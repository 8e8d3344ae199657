-- Attestation's own tables: bulky evidence, floors under collateral, operators' bans.
-- The log holds only the hashes of what is here.
CREATE SCHEMA attestation;

CREATE TABLE attestation.evidence (
    evidence_id     bytea  PRIMARY KEY CHECK (octet_length(evidence_id) = 32),
    provider_id     text   NOT NULL,
    ppid            text   NOT NULL,
    collateral_hash bytea  NOT NULL CHECK (octet_length(collateral_hash) = 32),
    received_ms     bigint NOT NULL,
    document        bytea  NOT NULL CHECK (octet_length(document) <= 1048576)
);
CREATE INDEX evidence_by_age ON attestation.evidence (received_ms);

-- The greatest numbers seen in authentic collateral; they never fall.
CREATE TABLE attestation.floors (
    fmspc             text   PRIMARY KEY CHECK (fmspc ~ '^[0-9a-f]{12}$'),
    evaluation_number bigint NOT NULL,
    root_crl_number   bigint NOT NULL,
    pck_crl_number    bigint NOT NULL
);

CREATE TABLE attestation.bans (
    provider_id text   PRIMARY KEY,
    ppid        text   NOT NULL DEFAULT '',   -- the machine it ran on; '' if never attested
    banned_ms   bigint NOT NULL
);

GRANT USAGE ON SCHEMA attestation TO cocoon_attestation, cocoon_reader;
GRANT SELECT ON ALL TABLES IN SCHEMA attestation TO cocoon_attestation, cocoon_reader;
GRANT INSERT, UPDATE, DELETE ON attestation.evidence, attestation.bans TO cocoon_attestation;
GRANT INSERT, UPDATE ON attestation.floors TO cocoon_attestation;
