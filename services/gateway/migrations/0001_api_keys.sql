-- API keys: the SHA-256 of each key's text, never the text. A change is told to every gateway.

CREATE SCHEMA gateway;

CREATE TABLE gateway.api_keys (
  api_key_id   text        PRIMARY KEY,
  secret_hash  bytea       NOT NULL UNIQUE CHECK (octet_length(secret_hash) = 32),
  account_id   text        NOT NULL,
  label        text        NOT NULL DEFAULT '',
  created_at   timestamptz NOT NULL DEFAULT now(),
  revoked_at   timestamptz
);
CREATE INDEX api_keys_by_time ON gateway.api_keys (created_at DESC);

CREATE FUNCTION gateway.tell_key_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  PERFORM pg_notify('gateway_api_keys', encode(coalesce(NEW.secret_hash, OLD.secret_hash), 'hex'));
  RETURN NULL;
END $$;

CREATE TRIGGER tell_key_change AFTER INSERT OR UPDATE OR DELETE ON gateway.api_keys
  FOR EACH ROW EXECUTE FUNCTION gateway.tell_key_change();

REVOKE ALL ON SCHEMA gateway FROM PUBLIC;
GRANT USAGE ON SCHEMA gateway TO cocoon_gateway;
-- A key is made once and revoked once; it is never deleted or given to another account.
GRANT SELECT, INSERT ON gateway.api_keys TO cocoon_gateway;
GRANT UPDATE (revoked_at) ON gateway.api_keys TO cocoon_gateway;
