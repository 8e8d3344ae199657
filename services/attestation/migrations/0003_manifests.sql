-- What model ids name: manifests, each under its own SHA-256, so the same from two providers is one
-- row. Not in the log: no decision reads them, the log holds their ids, and bytes that prove
-- themselves need neither an order nor a chain. A lost row comes back with its next offer.
CREATE TABLE attestation.manifests (
    model_id     bytea  PRIMARY KEY CHECK (octet_length(model_id) = 32),
    document     bytea  NOT NULL CHECK (octet_length(document) <= 262144),
    kind         text   NOT NULL,   -- chat or embeddings, as the document says
    quantisation text   NOT NULL,   -- as the document says
    published_by text   NOT NULL,   -- the provider that sent it first
    published_ms bigint NOT NULL,
    offered_ms   bigint NOT NULL,   -- when an attested provider was last seen to offer it
    CHECK (sha256(document) = model_id)
);

GRANT SELECT ON attestation.manifests TO cocoon_attestation, cocoon_reader;
GRANT INSERT, DELETE ON attestation.manifests TO cocoon_attestation;
GRANT UPDATE (offered_ms) ON attestation.manifests TO cocoon_attestation;
