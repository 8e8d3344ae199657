"""Canaries: paid jobs of an ordinary client whose answers are held against a trusted reference's."""
