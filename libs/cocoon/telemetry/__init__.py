"""Logs, traces and metrics of one process. What passes here is ids, digests, numbers and codes.

Content (prompts, results, keys, third-party error texts) is refused by shape, not by discipline.
"""
