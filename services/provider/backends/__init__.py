"""Engines behind one small protocol; each passes the same contract suite."""
