"""Canaries: paid jobs of an ordinary client, their answers held against a trusted engine's."""
