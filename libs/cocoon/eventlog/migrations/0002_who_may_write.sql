-- What each role may write, row by row: its event types, each into streams of its kind, and its
-- consumers' checkpoints and parking. cocoon.eventlog.migrate fills the two tables from
-- cocoon.contracts.catalogue; no service may write them.

CREATE TABLE log.may_append (
  role       text NOT NULL,
  type       text NOT NULL,
  aggregate  text NOT NULL,                        -- what the stream's name begins with, up to "/"
  PRIMARY KEY (role, type)
);

CREATE TABLE log.may_follow (
  role      text NOT NULL,
  consumer  text NOT NULL,
  PRIMARY KEY (role, consumer)
);

-- ---- who may write ----

CREATE OR REPLACE FUNCTION log.require_role(p_role text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  -- session_user stays the login even inside SECURITY DEFINER; a superuser has every role.
  IF pg_has_role(session_user, 'cocoon_' || p_role, 'member') IS NOT TRUE THEN  -- NULL is nobody
    RAISE EXCEPTION 'this login may not act as %', p_role USING ERRCODE = 'insufficient_privilege';
  END IF;
END $$;

-- The consumer is the role's, and the term is the role's last one until this transaction ends.
CREATE FUNCTION log.require_consumer(
  p_shard integer, p_role text, p_term bigint, p_consumer text
) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  PERFORM log.require_role(p_role);
  PERFORM 1 FROM log.may_follow WHERE role = p_role AND consumer = p_consumer;
  IF NOT FOUND THEN
    RAISE EXCEPTION '% may not follow the log as %', p_role, p_consumer USING ERRCODE = 'CO004';
  END IF;
  PERFORM 1 FROM log.owners
    WHERE shard = p_shard AND role = p_role AND term = p_term FOR SHARE;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'term % of % on shard % is over', p_term, p_role, p_shard
      USING ERRCODE = 'CO001';
  END IF;
END $$;

-- Move a consumer's checkpoint forward, in the transaction of its effects.
CREATE OR REPLACE FUNCTION log.save_checkpoint(
  p_shard integer, p_role text, p_term bigint, p_consumer text, p_position bigint
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  PERFORM log.require_consumer(p_shard, p_role, p_term, p_consumer);
  INSERT INTO log.checkpoints AS c (shard, consumer, position)
    VALUES (p_shard, p_consumer, p_position)
    ON CONFLICT (shard, consumer) DO UPDATE SET position = excluded.position
      WHERE c.position < excluded.position;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'consumer % on shard % has already passed position %',
      p_consumer, p_shard, p_position USING ERRCODE = 'CO003';
  END IF;
END $$;

-- Put events aside; one that is there already has been tried once more.
CREATE FUNCTION log.park(
  p_shard integer, p_role text, p_term bigint, p_consumer text,
  p_positions bigint[], p_streams text[], p_error_classes text[]
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  PERFORM log.require_consumer(p_shard, p_role, p_term, p_consumer);
  INSERT INTO log.parked AS p (shard, consumer, position, stream, error_class, attempts)
    SELECT p_shard, p_consumer, u.position, u.stream, u.error_class, 1
      FROM unnest(p_positions, p_streams, p_error_classes) u(position, stream, error_class)
    ON CONFLICT (shard, consumer, position) DO UPDATE
      SET error_class = excluded.error_class, attempts = p.attempts + 1;
END $$;

-- Take a stream out of the parking: the positions to replay, in order, in this transaction.
CREATE FUNCTION log.unpark(
  p_shard integer, p_role text, p_term bigint, p_consumer text, p_stream text
) RETURNS bigint[]
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  v_positions bigint[];
BEGIN
  PERFORM log.require_consumer(p_shard, p_role, p_term, p_consumer);
  WITH gone AS (
    DELETE FROM log.parked
      WHERE shard = p_shard AND consumer = p_consumer AND stream = p_stream RETURNING position
  ) SELECT coalesce(array_agg(position ORDER BY position), '{}') INTO v_positions FROM gone;
  RETURN v_positions;
END $$;

-- ---- the append ----
-- Items of one call succeed or conflict each for itself. Streams are named once and referred to by
-- their place in p_streams; expectations and events are flat, counted per item.
-- status: 0 appended, 1 repeated (the earlier positions), 2 conflict (which stream, its version).
CREATE OR REPLACE FUNCTION log.append(
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
  v_refused   text;
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

  SELECT u.type || ' to a stream of ' || split_part(p_streams[u.s], '/', 1) INTO v_refused
    FROM unnest(p_types, p_event_streams) u(type, s)
    WHERE NOT EXISTS (
      SELECT FROM log.may_append m
        WHERE m.role = p_role AND m.type = u.type AND m.aggregate = split_part(p_streams[u.s], '/', 1)
    ) LIMIT 1;
  IF FOUND THEN
    RAISE EXCEPTION '% may not append %', p_role, v_refused USING ERRCODE = 'CO004';
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

REVOKE INSERT, UPDATE, DELETE ON log.parked
  FROM cocoon_matcher, cocoon_billing, cocoon_attestation;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA log FROM PUBLIC;
GRANT SELECT ON log.may_append, log.may_follow
  TO cocoon_matcher, cocoon_billing, cocoon_attestation, cocoon_gateway, cocoon_reader;
GRANT EXECUTE ON FUNCTION log.park, log.unpark
  TO cocoon_matcher, cocoon_billing, cocoon_attestation;
