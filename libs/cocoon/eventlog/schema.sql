-- The log: the one truth of the network. Every write goes through log.append, log.acquire_term,
-- log.save_checkpoint and the parking table; nobody holds INSERT, UPDATE or DELETE on log.events.
-- Applied once per database by cocoon.eventlog.migrate, as the owner of the schema.

CREATE SCHEMA log;

-- ---- roles: login roles without a password (it is set by whoever deploys), cluster-wide ----

DO $$
DECLARE
  v_role text;
BEGIN
  FOREACH v_role IN ARRAY ARRAY[
    'cocoon_matcher', 'cocoon_billing', 'cocoon_attestation', 'cocoon_gateway', 'cocoon_reader'
  ] LOOP
    BEGIN
      EXECUTE format('CREATE ROLE %I LOGIN', v_role);
    EXCEPTION WHEN duplicate_object OR unique_violation THEN
      NULL;  -- another database of this cluster has made it
    END;
  END LOOP;
END $$;

-- ---- tables ----

CREATE TABLE log.head (
  shard        integer PRIMARY KEY,
  position     bigint  NOT NULL DEFAULT 0,
  hash         bytea   NOT NULL DEFAULT decode(repeat('00', 32), 'hex'),
  recorded_at  bigint  NOT NULL DEFAULT 0          -- microseconds since 1970
) WITH (fillfactor = 10);

CREATE TABLE log.owners (
  shard  integer NOT NULL REFERENCES log.head,
  role   text    NOT NULL,
  term   bigint  NOT NULL,
  PRIMARY KEY (shard, role)
);

CREATE TABLE log.streams (
  shard    integer NOT NULL,
  stream   text    NOT NULL,
  version  bigint  NOT NULL,
  PRIMARY KEY (shard, stream)
) WITH (fillfactor = 70);

-- Fields of one line: the chain hashes them joined by newlines, the bus carries them as headers.
CREATE TABLE log.events (
  shard           integer NOT NULL,
  position        bigint  NOT NULL,
  stream          text    NOT NULL,
  version         bigint  NOT NULL,
  type            text    NOT NULL,
  schema_version  integer NOT NULL,
  event_id        text    NOT NULL,
  causation_id    text    NOT NULL,
  correlation_id  text    NOT NULL,
  actor           text    NOT NULL,
  traceparent     text    NOT NULL,
  recorded_at     bigint  NOT NULL,
  data            text    NOT NULL,
  hash            bytea   NOT NULL,
  PRIMARY KEY (shard, position),
  CONSTRAINT one_line CHECK (
    (stream || type || event_id || causation_id || correlation_id || actor || traceparent) COLLATE "C"
      ~ '^[!-~]*$'
  ),
  CONSTRAINT small CHECK (octet_length(data) <= 524288)
) PARTITION BY RANGE (position);
CREATE INDEX events_by_stream ON log.events (shard, stream, version);

CREATE TABLE log.commands (
  shard           integer NOT NULL,
  command_id      text    NOT NULL,
  first_position  bigint  NOT NULL,
  last_position   bigint  NOT NULL,                -- first - 1: the command changed nothing
  data            text    NOT NULL,
  PRIMARY KEY (shard, command_id),
  CONSTRAINT small CHECK (octet_length(data) <= 1048576)
);

CREATE TABLE log.checkpoints (
  shard     integer NOT NULL,
  consumer  text    NOT NULL,
  position  bigint  NOT NULL,
  PRIMARY KEY (shard, consumer)
) WITH (fillfactor = 10);

CREATE TABLE log.parked (
  shard        integer NOT NULL,
  consumer     text    NOT NULL,
  position     bigint  NOT NULL,
  stream       text    NOT NULL,
  error_class  text    NOT NULL,
  attempts     integer NOT NULL,
  PRIMARY KEY (shard, consumer, position)
);

-- ---- partitions of a million positions, made ahead of the writer ----

CREATE FUNCTION log.ensure_partition(p_number bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  v_name text := 'events_' || lpad(p_number::text, 6, '0');
BEGIN
  IF to_regclass('log.' || v_name) IS NOT NULL THEN
    RETURN;
  END IF;
  PERFORM pg_advisory_xact_lock(hashtextextended('log.ensure_partition', 0));
  IF to_regclass('log.' || v_name) IS NOT NULL THEN
    RETURN;
  END IF;
  -- ATTACH does not block readers or writers of the other partitions; PARTITION OF would.
  EXECUTE format('CREATE TABLE log.%I (LIKE log.events INCLUDING ALL)', v_name);
  EXECUTE format(
    'ALTER TABLE log.events ATTACH PARTITION log.%I FOR VALUES FROM (%s) TO (%s)',
    v_name, p_number * 1000000, (p_number + 1) * 1000000
  );
END $$;
SELECT log.ensure_partition(0);
SELECT log.ensure_partition(1);

CREATE FUNCTION log.ensure_shard(p_shard integer) RETURNS void
LANGUAGE sql AS $$
  INSERT INTO log.head (shard) VALUES (p_shard) ON CONFLICT DO NOTHING
$$;

-- ---- who may write ----

CREATE FUNCTION log.require_role(p_role text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  -- session_user stays the login even inside SECURITY DEFINER; a superuser has every role.
  IF NOT pg_has_role(session_user, 'cocoon_' || p_role, 'member') THEN
    RAISE EXCEPTION 'this login may not act as %', p_role USING ERRCODE = 'insufficient_privilege';
  END IF;
END $$;

-- Become the shard's one writer in this role. It waits for an append in flight, so what the old
-- owner managed to commit is visible to whoever reads the log after this call.
CREATE FUNCTION log.acquire_term(p_shard integer, p_role text) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  v_term bigint;
BEGIN
  PERFORM log.require_role(p_role);
  PERFORM 1 FROM log.head WHERE shard = p_shard FOR UPDATE;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'shard % does not exist', p_shard USING ERRCODE = 'CO002';
  END IF;
  INSERT INTO log.owners AS o (shard, role, term) VALUES (p_shard, p_role, 1)
    ON CONFLICT (shard, role) DO UPDATE SET term = o.term + 1
    RETURNING term INTO v_term;
  RETURN v_term;
END $$;

-- Move a consumer's checkpoint forward, in the transaction of its effects.
CREATE FUNCTION log.save_checkpoint(
  p_shard integer, p_role text, p_term bigint, p_consumer text, p_position bigint
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  PERFORM log.require_role(p_role);
  PERFORM 1 FROM log.owners
    WHERE shard = p_shard AND role = p_role AND term = p_term FOR SHARE;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'term % of % on shard % is over', p_term, p_role, p_shard
      USING ERRCODE = 'CO001';
  END IF;
  INSERT INTO log.checkpoints AS c (shard, consumer, position)
    VALUES (p_shard, p_consumer, p_position)
    ON CONFLICT (shard, consumer) DO UPDATE SET position = excluded.position
      WHERE c.position < excluded.position;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'consumer % on shard % has already passed position %',
      p_consumer, p_shard, p_position USING ERRCODE = 'CO003';
  END IF;
END $$;

-- ---- the append ----
-- Items of one call succeed or conflict each for itself. Streams are named once and referred to by
-- their place in p_streams; expectations and events are flat, counted per item.
-- status: 0 appended, 1 repeated (the earlier positions), 2 conflict (which stream, its version).
CREATE FUNCTION log.append(
  p_shard integer, p_role text, p_term bigint,
  p_command_ids text[], p_commands text[], p_actors text[], p_correlation_ids text[],
  p_traceparents text[], p_expect_counts integer[], p_event_counts integer[],
  p_streams text[],
  p_expect_streams integer[], p_expect_versions bigint[],
  p_event_streams integer[], p_types text[], p_schema_versions integer[], p_event_ids text[],
  p_data text[],
  OUT status integer[], OUT first_positions bigint[], OUT last_positions bigint[],
  OUT conflict_streams integer[], OUT conflict_versions bigint[],
  OUT versions bigint[], OUT hashes bytea[], OUT previous_hash bytea, OUT recorded_at_us bigint
)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan  -- planned once a session, on the one index there is:
SET enable_seqscan = off                  -- no plan may depend on how old the statistics are
AS $$
DECLARE
  v_items     integer := coalesce(cardinality(p_command_ids), 0);
  v_events    integer := coalesce(cardinality(p_types), 0);
  v_term      bigint;
  v_start     bigint;
  v_position  bigint;
  v_hash      bytea;
  v_current   bigint[];  -- version of each stream, as of this point of the call
  v_before    bigint[];
  v_positions bigint[];  -- of each event, NULL if its item was not appended
  v_item_of   integer[];
  v_x         integer := 1;  -- next expectation
  v_e         integer := 1;  -- next event
  v_s         integer;
  v_prefix    text := p_shard::text;
  v_context   text;
BEGIN
  PERFORM log.require_role(p_role);
  SELECT h.position, h.hash, h.recorded_at INTO v_start, v_hash, recorded_at_us
    FROM log.head h WHERE h.shard = p_shard FOR UPDATE;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'shard % does not exist', p_shard USING ERRCODE = 'CO002';
  END IF;
  SELECT o.term INTO v_term FROM log.owners o WHERE o.shard = p_shard AND o.role = p_role;
  IF v_term IS DISTINCT FROM p_term THEN
    RAISE EXCEPTION 'term % of % on shard % is over', p_term, p_role, p_shard
      USING ERRCODE = 'CO001';
  END IF;
  IF (SELECT count(*) <> count(DISTINCT u.s) FROM unnest(p_streams) u(s))
     OR (SELECT count(*) <> count(DISTINCT u.c) FROM unnest(p_command_ids) u(c)) THEN
    RAISE EXCEPTION 'a call names each stream and each command once' USING ERRCODE = 'CO002';
  END IF;

  previous_hash := v_hash;
  v_position := v_start;
  recorded_at_us := greatest(
    recorded_at_us, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
  );
  SELECT array_agg(coalesce(
           (SELECT s.version FROM log.streams s WHERE s.shard = p_shard AND s.stream = u.stream), 0
         ) ORDER BY u.i)
    INTO v_current FROM unnest(p_streams) WITH ORDINALITY u(stream, i);
  v_before := v_current;
  SELECT array_agg(CASE WHEN u.c IS NULL THEN 0 ELSE 1 END ORDER BY u.i),
         array_agg((u.c).first_position ORDER BY u.i), array_agg((u.c).last_position ORDER BY u.i)
    INTO status, first_positions, last_positions
    FROM (SELECT i, (SELECT c FROM log.commands c
                      WHERE c.shard = p_shard AND c.command_id = x.command_id) AS c
            FROM unnest(p_command_ids) WITH ORDINALITY x(command_id, i) OFFSET 0) u;
  conflict_streams := array_fill(NULL::integer, ARRAY[v_items]);
  conflict_versions := array_fill(NULL::bigint, ARRAY[v_items]);
  v_positions := array_fill(NULL::bigint, ARRAY[v_events]);
  versions := array_fill(NULL::bigint, ARRAY[v_events]);
  hashes := array_fill(NULL::bytea, ARRAY[v_events]);
  v_item_of := array_fill(NULL::integer, ARRAY[v_events]);

  FOR i IN 1 .. v_items LOOP
    IF status[i] = 0 THEN
      FOR x IN v_x .. v_x + p_expect_counts[i] - 1 LOOP
        IF v_current[p_expect_streams[x]] IS DISTINCT FROM p_expect_versions[x] THEN
          status[i] := 2;
          conflict_streams[i] := p_expect_streams[x];
          conflict_versions[i] := v_current[p_expect_streams[x]];
          EXIT;
        END IF;
      END LOOP;
    END IF;
    IF status[i] = 0 THEN
      first_positions[i] := v_position + 1;
      v_context := p_command_ids[i] || E'\n' || p_correlation_ids[i] || E'\n' || p_actors[i]
        || E'\n' || recorded_at_us || E'\n';
      FOR e IN v_e .. v_e + p_event_counts[i] - 1 LOOP
        v_s := p_event_streams[e];
        v_position := v_position + 1;
        v_current[v_s] := v_current[v_s] + 1;
        versions[e] := v_current[v_s];
        v_hash := sha256(v_hash || convert_to(
          v_prefix || E'\n' || v_position || E'\n' || p_streams[v_s] || E'\n' || v_current[v_s]
          || E'\n' || p_types[e] || E'\n' || p_schema_versions[e] || E'\n' || p_event_ids[e] || E'\n'
          || v_context || p_data[e], 'UTF8'));
        hashes[e] := v_hash;
        v_positions[e] := v_position;
        v_item_of[e] := i;
      END LOOP;
      last_positions[i] := v_position;
    END IF;
    v_x := v_x + p_expect_counts[i];
    v_e := v_e + p_event_counts[i];
  END LOOP;

  IF NOT 0 = ANY (status) THEN
    RETURN;
  END IF;
  IF v_position / 1000000 <> v_start / 1000000 THEN
    PERFORM log.ensure_partition(v_position / 1000000 + 1);
  END IF;
  INSERT INTO log.events
    SELECT p_shard, u.position, p_streams[u.s], u.version, u.type, u.schema_version, u.event_id,
           p_command_ids[u.item], p_correlation_ids[u.item], p_actors[u.item],
           p_traceparents[u.item], recorded_at_us, u.data, u.hash
      FROM unnest(v_positions, p_event_streams, versions, p_types, p_schema_versions, p_event_ids,
                  v_item_of, p_data, hashes)
        u(position, s, version, type, schema_version, event_id, item, data, hash)
      WHERE u.position IS NOT NULL;
  INSERT INTO log.commands
    SELECT p_shard, u.command_id, u.first_position, u.last_position, u.data
      FROM unnest(p_command_ids, first_positions, last_positions, p_commands, status)
        u(command_id, first_position, last_position, data, status)
      WHERE u.status = 0;
  INSERT INTO log.streams AS s
    SELECT p_shard, u.stream, u.version
      FROM unnest(p_streams, v_current, v_before) u(stream, version, before)
      WHERE u.version <> u.before
    ON CONFLICT (shard, stream) DO UPDATE SET version = excluded.version;
  UPDATE log.head h SET position = v_position, hash = v_hash, recorded_at = recorded_at_us
    WHERE h.shard = p_shard;
  IF v_position > v_start THEN
    PERFORM pg_notify('log_' || p_shard, v_position::text);
  END IF;
END $$;

-- ---- grants ----

REVOKE ALL ON SCHEMA log FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA log FROM PUBLIC;
GRANT USAGE ON SCHEMA log
  TO cocoon_matcher, cocoon_billing, cocoon_attestation, cocoon_gateway, cocoon_reader;
GRANT SELECT ON log.head, log.owners, log.streams, log.events, log.commands, log.checkpoints,
  log.parked TO cocoon_matcher, cocoon_billing, cocoon_attestation, cocoon_gateway, cocoon_reader;
GRANT INSERT, UPDATE, DELETE ON log.parked TO cocoon_matcher, cocoon_billing, cocoon_attestation;
GRANT EXECUTE ON FUNCTION log.append, log.acquire_term, log.save_checkpoint
  TO cocoon_matcher, cocoon_billing, cocoon_attestation;
