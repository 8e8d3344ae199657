"""The matcher owns a job until its result: hold, match, lease, expire, match again."""
