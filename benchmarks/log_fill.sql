-- Fills a log and its ledger with jobs like one that is there: the same events, entries and
-- settlement under other ids, the chain valid. Their commands are empty, so it cannot be replayed
-- with --decisions. For benchmarks.log_size alone.

CREATE SCHEMA bench;

-- What the model job has: its events, its entries, its settlement.
CREATE FUNCTION bench.take(p_job text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  v_before bigint := (SELECT min(position) - 1 FROM log.events
                       WHERE shard = 1 AND stream = 'job/' || p_job);
BEGIN
  CREATE TABLE bench.events AS
    SELECT position - v_before AS n, * FROM log.events WHERE shard = 1 AND stream = 'job/' || p_job;
  CREATE TABLE bench.entries AS
    SELECT position - v_before AS n, line, account, amount FROM ledger.entries
     WHERE shard = 1 AND position > v_before;
  CREATE TABLE bench.settlements AS
    SELECT position - v_before AS n, * FROM ledger.settlements WHERE job_id = p_job;
END $$;

-- Secondary indexes are built after the filling: that takes a third of the time.
CREATE FUNCTION bench.drop_indexes() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  v_index record;
BEGIN
  CREATE TABLE bench.indexes AS
    SELECT format('%I.%I', i.schemaname, i.indexname) AS name,
           replace(i.indexdef, ' ON ONLY ', ' ON ') AS definition
      FROM pg_indexes i
      JOIN pg_class c ON c.oid = format('%I.%I', i.schemaname, i.indexname)::regclass
      JOIN pg_index x ON x.indexrelid = c.oid
     WHERE i.schemaname IN ('log', 'ledger') AND NOT c.relispartition AND NOT x.indisunique;
  FOR v_index IN SELECT * FROM bench.indexes LOOP
    EXECUTE 'DROP INDEX ' || v_index.name;
  END LOOP;
END $$;

CREATE FUNCTION bench.make_indexes() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  v_index record;
BEGIN
  FOR v_index IN SELECT * FROM bench.indexes LOOP
    EXECUTE v_index.definition;
  END LOOP;
  DELETE FROM ledger.earnings;
  -- As services.billing.earning adds them up: a result stands right before its payment.
  INSERT INTO ledger.earnings
  SELECT s.provider_id, s.shard, (paid.recorded_at / 86400000000)::int AS day,
         coalesce(substr(r.receipt, 89, 64), '') AS model_id, count(*) AS jobs,
         coalesce(sum(r.input_tokens), 0)::bigint AS input_tokens,
         coalesce(sum(r.cached_input_tokens), 0)::bigint AS cached_input_tokens,
         coalesce(sum(r.output_tokens), 0)::bigint AS output_tokens,
         coalesce(sum(r.reasoning_tokens), 0)::bigint AS reasoning_tokens,
         sum(s.provider_part)::bigint AS earned
    FROM ledger.settlements s
    JOIN log.events paid ON paid.shard = s.shard AND paid.position = s.position
    LEFT JOIN log.events sealed ON sealed.shard = s.shard AND sealed.position = s.position - 1
     AND sealed.type = 'ResultSealed' AND sealed.stream = paid.stream
    LEFT JOIN LATERAL json_to_record(sealed.data::json) AS r(
         receipt text, input_tokens bigint, cached_input_tokens bigint, output_tokens bigint,
         reasoning_tokens bigint) ON sealed.data IS NOT NULL
   GROUP BY 1, 2, 3, 4;
END $$;

CREATE FUNCTION bench.job(p_number bigint) RETURNS text LANGUAGE sql IMMUTABLE AS $$
  SELECT md5('job' || p_number)
$$;

-- Jobs p_first..p_last, after whatever the log holds.
CREATE FUNCTION bench.fill(p_job text, p_first bigint, p_last bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
  v_events bigint := (SELECT count(*) FROM bench.events);
  v_start  bigint;
  v_hash   bytea;
  v_at     bigint;
  v_texts  text[];
  v_hashes bytea[];
BEGIN
  SELECT position, hash, recorded_at INTO v_start, v_hash, v_at FROM log.head WHERE shard = 1;
  FOR number IN v_start / 1000000 .. (v_start + (p_last - p_first + 1) * v_events) / 1000000 + 1 LOOP
    PERFORM log.ensure_partition(number);
  END LOOP;
  CREATE TEMP TABLE filled ON COMMIT DROP AS
    SELECT v_start + (k - p_first) * v_events + t.n AS position, bench.job(k) AS job, t.n,
           'job/' || bench.job(k) AS stream, t.version, t.type, t.schema_version,
           md5(bench.job(k) || t.n) AS event_id,
           (CASE WHEN t.n <= 3 THEN 'request-' ELSE 'settle-' END) || bench.job(k) AS causation_id,
           t.actor, replace(t.data, p_job, bench.job(k)) AS data
      FROM generate_series(p_first, p_last) k CROSS JOIN bench.events t;
  SELECT array_agg(
           '1' || E'\n' || position || E'\n' || stream || E'\n' || version || E'\n' || type || E'\n'
           || schema_version || E'\n' || event_id || E'\n' || causation_id || E'\n' || job || E'\n'
           || actor || E'\n' || v_at || E'\n' || data ORDER BY position)
    INTO v_texts FROM filled;
  v_hashes := array_fill(NULL::bytea, ARRAY[cardinality(v_texts)]);
  FOR i IN 1 .. cardinality(v_texts) LOOP
    v_hash := sha256(v_hash || convert_to(v_texts[i], 'UTF8'));
    v_hashes[i] := v_hash;
  END LOOP;
  INSERT INTO log.events
    SELECT 1, f.position, f.stream, f.version, f.type, f.schema_version, f.event_id,
           f.causation_id, f.job, f.actor, '', v_at, f.data, h.hash
      FROM filled f JOIN unnest(v_hashes) WITH ORDINALITY h(hash, i) ON f.position = v_start + h.i
     ORDER BY f.position;
  INSERT INTO log.streams
    SELECT 1, 'job/' || bench.job(k), v_events FROM generate_series(p_first, p_last) k;
  INSERT INTO log.commands
    SELECT 1, kind || bench.job(k), at, at + more, '{}'
      FROM generate_series(p_first, p_last) k
      CROSS JOIN LATERAL (VALUES
        ('request-', v_start + (k - p_first) * v_events + 1, 2::bigint),
        ('settle-', v_start + (k - p_first) * v_events + 4, v_events - 4)) c(kind, at, more);
  INSERT INTO ledger.entries
    SELECT 1, v_start + (k - p_first) * v_events + e.n, e.line,
           replace(e.account, p_job, bench.job(k)), e.amount
      FROM generate_series(p_first, p_last) k CROSS JOIN bench.entries e;
  INSERT INTO ledger.settlements (job_id, shard, position, account_id, api_key_id, provider_id,
                                  price, provider_part, fee)
    SELECT bench.job(k), 1, v_start + (k - p_first) * v_events + s.n, s.account_id, s.api_key_id,
           s.provider_id, s.price, s.provider_part, s.fee
      FROM generate_series(p_first, p_last) k CROSS JOIN bench.settlements s;
  v_start := v_start + (p_last - p_first + 1) * v_events;
  UPDATE log.head SET position = v_start, hash = v_hash WHERE shard = 1;
  UPDATE log.checkpoints SET position = v_start WHERE shard = 1 AND consumer = 'ledger';
  DROP TABLE filled;
END $$;
