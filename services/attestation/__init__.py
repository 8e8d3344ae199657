"""Evidence in, attested providers out: admits, re-evaluates, revokes, publishes. No trust root."""
