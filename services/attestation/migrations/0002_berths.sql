-- Which provider lives in which berth of the bus (bus/accounts.py): one provider each, for as long
-- as it is proven or heard. No login of theirs outlives held_until_ms, so a berth changes hands
-- only after that.
CREATE TABLE attestation.berths (
    berth         integer PRIMARY KEY CHECK (berth BETWEEN 1 AND 9999),
    provider_id   text    NOT NULL UNIQUE,
    taken_ms      bigint  NOT NULL,
    held_until_ms bigint  NOT NULL
);

GRANT SELECT ON attestation.berths TO cocoon_attestation, cocoon_reader;
GRANT INSERT, UPDATE, DELETE ON attestation.berths TO cocoon_attestation;
