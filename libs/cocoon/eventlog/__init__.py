"""The log in Postgres: append, read, tail, relay, park. The only SQL that touches the log."""
