"""Cocoon: a market for private AI inference. What services share and what a client installs."""

__version__ = "0.1.0"
