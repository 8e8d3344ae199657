-- Snapshots: the books at a position, as replay serialises them. The log names each one's sha256
-- (LedgerSnapshotTaken), so a row alone proves nothing.
CREATE TABLE ledger.snapshots (
    shard    int    NOT NULL,
    position bigint NOT NULL,
    data     bytea  NOT NULL,
    PRIMARY KEY (shard, position)
);
GRANT SELECT ON ledger.snapshots TO cocoon_billing, cocoon_reader;
GRANT INSERT, UPDATE, DELETE ON ledger.snapshots TO cocoon_billing;

-- Replay reads payments by position, beside the entries.
CREATE INDEX settlements_by_position ON ledger.settlements (shard, position);
