-- A job's id is its client's choice: each shard refuses one that it has seen, none knows the others'.
ALTER TABLE ledger.settlements DROP CONSTRAINT settlements_pkey;
ALTER TABLE ledger.settlements ADD PRIMARY KEY (job_id, shard);
