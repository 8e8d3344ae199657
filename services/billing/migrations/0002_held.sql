-- Whose hold it is, so that what an account's running jobs hold is one range of one index.
ALTER TABLE ledger.balances ADD COLUMN owner text NOT NULL DEFAULT '';  -- '' but for holds
UPDATE ledger.balances b SET owner = e.data::json ->> 'account_id'
  FROM log.events e
  WHERE b.account LIKE 'hold:%' AND e.shard = b.shard
    AND e.stream = 'job/' || substr(b.account, 6) AND e.version = 1;
CREATE INDEX balances_by_owner ON ledger.balances (shard, owner) INCLUDE (amount)
  WHERE owner <> '';
