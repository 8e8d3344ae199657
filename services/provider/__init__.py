"""The agent on a provider's machine: open, infer, seal, spool. It knows no database."""
