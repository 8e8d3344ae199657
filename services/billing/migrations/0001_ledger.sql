-- The ledger: a projection of the log that can be thrown away and folded again.
-- Amounts are nanoTON. The checks are a second wall behind cocoon.domain.ledger.
CREATE SCHEMA ledger;

CREATE TABLE ledger.entries (
    shard    int    NOT NULL,
    position bigint NOT NULL,
    line     int    NOT NULL,
    account  text   NOT NULL,
    amount   bigint NOT NULL CHECK (amount <> 0),
    PRIMARY KEY (shard, position, line)
);
CREATE INDEX entries_by_account ON ledger.entries (account, shard, position);

CREATE TABLE ledger.balances (
    shard   int    NOT NULL,
    account text   NOT NULL,
    amount  bigint NOT NULL
        CHECK (amount >= 0 OR account = 'faucet' OR account LIKE 'escrow:%'),
    PRIMARY KEY (shard, account)
);

CREATE TABLE ledger.settlements (
    job_id        text PRIMARY KEY,
    shard         int    NOT NULL,
    position      bigint NOT NULL,
    account_id    text   NOT NULL,
    api_key_id    text   NOT NULL,
    provider_id   text   NOT NULL,
    price         bigint NOT NULL CHECK (price >= 0),
    provider_part bigint NOT NULL CHECK (provider_part >= 0),
    fee           bigint NOT NULL CHECK (fee >= 0),
    CHECK (price = provider_part + fee)
);
CREATE INDEX settlements_by_account ON ledger.settlements (account_id, shard, position);
CREATE INDEX settlements_by_provider ON ledger.settlements (provider_id, shard, position);

GRANT USAGE ON SCHEMA ledger TO cocoon_billing, cocoon_reader;
GRANT SELECT ON ALL TABLES IN SCHEMA ledger TO cocoon_billing, cocoon_reader;
GRANT INSERT ON ledger.entries, ledger.settlements TO cocoon_billing;
GRANT INSERT, UPDATE, DELETE ON ledger.balances TO cocoon_billing;
