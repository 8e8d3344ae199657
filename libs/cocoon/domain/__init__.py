"""The pure deciders: job, ledger, pricing, matching. Services, replay and audit run this code."""
