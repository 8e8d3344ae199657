-- What providers earned by day and model, and their results that were refused: projections of the
-- log, written in the ledger's own transactions. Replay folds them again.
CREATE TABLE ledger.earnings (
    provider_id          text   NOT NULL,
    shard                int    NOT NULL,
    day                  int    NOT NULL,  -- since 1970-01-01, UTC, of PaymentSettled
    model_id             text   NOT NULL,  -- '' for a payment that no result stands before
    jobs                 bigint NOT NULL CHECK (jobs > 0),
    input_tokens         bigint NOT NULL,
    cached_input_tokens  bigint NOT NULL,
    output_tokens        bigint NOT NULL,
    reasoning_tokens     bigint NOT NULL,
    earned               bigint NOT NULL CHECK (earned >= 0),
    PRIMARY KEY (provider_id, shard, day, model_id)
);

CREATE TABLE ledger.refusals (
    shard       int    NOT NULL,
    position    bigint NOT NULL,
    provider_id text   NOT NULL,
    job_id      text   NOT NULL,
    epoch       bigint NOT NULL,
    reason      text   NOT NULL,
    PRIMARY KEY (shard, position)
);
CREATE INDEX refusals_by_provider ON ledger.refusals (provider_id, shard, position);

-- The same earnings from payments and the log: ResultSealed stands right before PaymentSettled.
-- The receipt names the model in its bytes 44 to 76.
CREATE VIEW ledger.earnings_again AS
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

INSERT INTO ledger.earnings SELECT * FROM ledger.earnings_again;
INSERT INTO ledger.refusals
SELECT e.shard, e.position, r.provider_id, r.job_id, r.epoch, r.reason
  FROM log.events e
  JOIN log.checkpoints c ON c.shard = e.shard AND c.consumer = 'ledger' AND e.position <= c.position,
       json_to_record(e.data::json) AS r(provider_id text, job_id text, epoch bigint, reason text)
 WHERE e.type = 'ResultRejected' AND NOT EXISTS (
       SELECT FROM log.parked p WHERE p.shard = e.shard AND p.consumer = 'ledger'
          AND p.position = e.position);

GRANT SELECT ON ledger.earnings, ledger.refusals, ledger.earnings_again
  TO cocoon_billing, cocoon_reader;
GRANT INSERT, UPDATE ON ledger.earnings TO cocoon_billing;
GRANT INSERT ON ledger.refusals TO cocoon_billing;
