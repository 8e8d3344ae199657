"""`cocoon up`: the whole network on one machine, in processes. Never used in production."""
