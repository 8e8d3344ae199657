"""Billing: results in, payments out, the ledger as a fold of the log, and its replay."""
