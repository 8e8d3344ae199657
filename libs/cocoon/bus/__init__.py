"""The bus: connections, permissions, streams, publishing, ack rules. It decides nothing."""
