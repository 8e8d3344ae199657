"""What the performance figures come from; each prints its own command."""
