"""Requests that tests send to a live network, and what its owner and its books say afterwards."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import asyncpg
import httpx

from cocoon.evidence.collateral import CollateralFloors
from cocoon.evidence.policy import parse_policy
from cocoon.evidence.provider import parse_evidence, verify_provider
from cocoon.evidence.trust import load_trust
from cocoon.kernel import canonical
from cocoon.sealing import verify_bundle
from tests.support.network import LiveNetwork

MODEL = "skills-1"
ENDED = ("settled", "failed", "cancelled", "refused")


_LEDGER_IS_AT_THE_HEAD = """
    SELECT head.position = seen.position FROM log.head JOIN log.checkpoints seen USING (shard)
    WHERE shard = 1 AND consumer = 'ledger'
"""


def ask(text: str) -> dict[str, Any]:
    """The arguments of a request with one message."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}]}


# The end token and the roles may not come, and the heat is high: it goes on to its bound.
ENDLESS: dict[str, Any] = {
    **ask("Count from 1 to 60"),
    "temperature": 2,
    "logit_bias": {str(token): -100 for token in range(256, 260)},
}


def get(network: LiveNetwork, path: str, api_key: str = "") -> httpx.Response:
    """GET from the gateway, as the first account's owner unless another key is given."""
    headers = {"Authorization": f"Bearer {api_key or network.api_key}"}
    return httpx.get(f"{network.gateway}{path}", headers=headers, timeout=10, trust_env=False)


def wait_ended(network: LiveNetwork, job_id: str, timeout_s: float = 20) -> dict[str, Any]:
    """The job as its owner reads it, once it has ended and the ledger has followed."""
    deadline = time.monotonic() + timeout_s
    while True:
        job: dict[str, Any] = get(network, f"/v1/jobs/{job_id}").json()
        if job.get("status") in ENDED:
            quiet_balance(network)
            return job
        assert time.monotonic() < deadline, job
        time.sleep(0.05)


def quiet_balance(network: LiveNetwork, timeout_s: float = 20) -> int:
    """What the first account has, in nanoTON, once the ledger has read the whole log and no job
    holds anything.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        caught_up = sql(network, _LEDGER_IS_AT_THE_HEAD)[0][0]
        balance = network.balance()
        if caught_up and balance["held_nanoton"] == "0":
            return int(balance["available_nanoton"])
        assert time.monotonic() < deadline, balance
        time.sleep(0.05)


def attested_key(network: LiveNetwork, provider_id: str, model: str = MODEL) -> tuple[bytes, bytes]:
    """The receipt key and evidence id that the provider's own evidence proves, checked here."""
    listing = get(network, f"/v1/directory?model={model}").json()
    entry = next(item for item in listing["providers"] if item["provider_id"] == provider_id)
    now_ms = time.time_ns() // 1_000_000
    verdict = verify_provider(
        parse_evidence(canonical.dumps(entry["evidence"])),
        load_trust(network.folder.trust),
        parse_policy(canonical.dumps(listing["policy"])),
        CollateralFloors(),
        now_ms,
    )
    assert verdict.ok, str(verdict)
    assert verdict.claims is not None
    assert verdict.evidence_id is not None
    key = verdict.claims.ed25519_public
    for raw in entry["bundles"]:
        verify_bundle(
            bytes.fromhex(raw), ed25519_pk=key, evidence_id=verdict.evidence_id, now_ms=now_ms
        )
    return key, verdict.evidence_id


def sql(network: LiveNetwork, *statements: str) -> list[list[Any]]:
    """Run statements as Postgres' superuser in one transaction; rows of the last one."""

    async def run() -> list[list[Any]]:
        dsn = superuser_dsn(network)
        connection = await asyncpg.connect(dsn, timeout=10)
        try:
            async with connection.transaction():
                rows: list[Any] = []
                for statement in statements:
                    rows = await connection.fetch(statement)
                return [list(row.values()) for row in rows]
        finally:
            await connection.close(timeout=10)

    return asyncio.run(run())


def superuser_dsn(network: LiveNetwork) -> str:
    """The superuser's connection string, put together from a service's and the password file."""
    place = network.folder.dsn("reader").read_text().rpartition("@")[2].strip()
    password = (network.folder.postgres / "superuser.password").read_text().strip()
    return f"postgresql://postgres:{password}@{place}"


def jobs_requested(network: LiveNetwork) -> int:
    """How many jobs the log holds."""
    count: int = sql(network, "SELECT count(*) FROM log.events WHERE type = 'JobRequested'")[0][0]
    return count
