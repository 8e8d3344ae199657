"""Attestation's SQL: evidence, floors, bans, berths, manifests; the log is cocoon.eventlog's."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from cocoon.eventlog.connection import tree_errors
from cocoon.evidence.collateral import CollateralFloor, CollateralFloors
from cocoon.evidence.provider import ProviderEvidence, collateral_hash, parse_evidence
from services.attestation.berths import Berth
from services.attestation.shelf import Kept

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Pool

_FORGET_MANIFESTS = "DELETE FROM attestation.manifests WHERE model_id = ANY($1::bytea[])"


async def save_evidence(
    pool: Pool, evidence_id: bytes, evidence: ProviderEvidence, ppid: str, now_ms: int
) -> None:
    """Keep evidence under its id. The same signed part with newer collateral replaces the older."""
    with tree_errors():
        await pool.execute(
            "INSERT INTO attestation.evidence"
            " (evidence_id, provider_id, ppid, collateral_hash, received_ms, document)"
            " VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (evidence_id) DO UPDATE SET"
            " collateral_hash = excluded.collateral_hash, received_ms = excluded.received_ms,"
            " document = excluded.document",
            evidence_id,
            evidence.provider_id,
            ppid,
            collateral_hash(evidence),
            now_ms,
            evidence.to_canonical(),
        )


async def load_evidence(
    pool: Pool, evidence_ids: Iterable[str]
) -> dict[str, tuple[ProviderEvidence, str]]:
    """evidence id (hex) -> (evidence, ppid), for those that are kept."""
    with tree_errors():
        rows = await pool.fetch(
            "SELECT evidence_id, document, ppid FROM attestation.evidence"
            " WHERE evidence_id = ANY($1::bytea[])",
            [bytes.fromhex(item) for item in evidence_ids],
        )
    return {
        row["evidence_id"].hex(): (parse_evidence(bytes(row["document"])), row["ppid"])
        for row in rows
    }


async def forget_evidence(pool: Pool, before_ms: int, current: Iterable[str]) -> int:
    """Delete evidence received before `before_ms` that no provider stands on. Returns how many."""
    with tree_errors():
        done = await pool.execute(
            "DELETE FROM attestation.evidence WHERE received_ms < $1"
            " AND NOT evidence_id = ANY($2::bytea[])",
            before_ms,
            [bytes.fromhex(item) for item in current],
        )
    return int(done.rpartition(" ")[2])


async def load_floors(pool: Pool) -> CollateralFloors:
    with tree_errors():
        rows = await pool.fetch(
            "SELECT fmspc, evaluation_number, root_crl_number, pck_crl_number"
            " FROM attestation.floors"
        )
    return CollateralFloors(
        by_fmspc={
            row["fmspc"]: CollateralFloor(
                evaluation_number=row["evaluation_number"],
                root_crl_number=row["root_crl_number"],
                pck_crl_number=row["pck_crl_number"],
            )
            for row in rows
        }
    )


async def raise_floors(pool: Pool, floors: CollateralFloors) -> None:
    """Raise what is greater; nothing ever falls, whoever else writes."""
    rows = [
        (fmspc, f.evaluation_number, f.root_crl_number, f.pck_crl_number)
        for fmspc, f in sorted(floors.by_fmspc.items())
    ]
    with tree_errors():
        await pool.executemany(
            "INSERT INTO attestation.floors AS f"
            " (fmspc, evaluation_number, root_crl_number, pck_crl_number)"
            " VALUES ($1, $2, $3, $4) ON CONFLICT (fmspc) DO UPDATE SET"
            " evaluation_number = greatest(f.evaluation_number, excluded.evaluation_number),"
            " root_crl_number = greatest(f.root_crl_number, excluded.root_crl_number),"
            " pck_crl_number = greatest(f.pck_crl_number, excluded.pck_crl_number)",
            rows,
        )


async def load_bans(pool: Pool) -> dict[str, str]:
    """provider id -> the PPID of its machine ("" if it was never attested)."""
    with tree_errors():
        rows = await pool.fetch("SELECT provider_id, ppid FROM attestation.bans")
    return {row["provider_id"]: row["ppid"] for row in rows}


async def save_ban(pool: Pool, provider_id: str, ppid: str, now_ms: int) -> None:
    with tree_errors():
        await pool.execute(
            "INSERT INTO attestation.bans (provider_id, ppid, banned_ms) VALUES ($1, $2, $3)"
            " ON CONFLICT (provider_id) DO UPDATE SET ppid = excluded.ppid"
            " WHERE excluded.ppid <> ''",
            provider_id,
            ppid,
            now_ms,
        )


async def lift_ban(pool: Pool, provider_id: str) -> None:
    with tree_errors():
        await pool.execute("DELETE FROM attestation.bans WHERE provider_id = $1", provider_id)


async def load_berths(pool: Pool) -> list[Berth]:
    with tree_errors():
        rows = await pool.fetch(
            "SELECT berth, provider_id, held_until_ms, taken_ms FROM attestation.berths"
            " ORDER BY berth"
        )
    return [
        Berth(row["berth"], row["provider_id"], row["held_until_ms"], row["taken_ms"])
        for row in rows
    ]


async def take_berth(pool: Pool, number: int, provider_id: str, now_ms: int) -> bool:
    """Give a berth to a provider; False if somebody's login in it lives, or it has another one."""
    with tree_errors():
        done = await pool.execute(
            "INSERT INTO attestation.berths AS b (berth, provider_id, taken_ms, held_until_ms)"
            " SELECT $1, $2, $3, 0 WHERE NOT EXISTS"
            " (SELECT FROM attestation.berths WHERE provider_id = $2)"
            " ON CONFLICT (berth) DO UPDATE SET provider_id = excluded.provider_id,"
            " taken_ms = excluded.taken_ms, held_until_ms = 0 WHERE b.held_until_ms < $3",
            number, provider_id, now_ms,
        )  # fmt: skip
    return bool(done.endswith(" 1"))


async def hold_berth(pool: Pool, number: int, provider_id: str, until_ms: int) -> bool:
    """Keep a berth for its provider until then at least; False if it is not its berth any more."""
    with tree_errors():
        done = await pool.execute(
            "UPDATE attestation.berths SET held_until_ms = greatest(held_until_ms, $3)"
            " WHERE berth = $1 AND provider_id = $2",
            number, provider_id, until_ms,
        )  # fmt: skip
    return bool(done.endswith(" 1"))


async def load_manifests(pool: Pool) -> dict[str, Kept]:
    """model id -> what is known of its manifest, without the documents."""
    with tree_errors():
        rows = await pool.fetch(
            "SELECT model_id, octet_length(document) AS size_bytes, kind, quantisation,"
            " published_by, offered_ms FROM attestation.manifests"
        )
    return {
        row["model_id"].hex(): Kept(
            row["size_bytes"], row["kind"], row["quantisation"], row["published_by"],
            row["offered_ms"],
        )
        for row in rows
    }  # fmt: skip


async def load_manifest(pool: Pool, model_id: str) -> bytes | None:
    with tree_errors():
        found = await pool.fetchval(
            "SELECT document FROM attestation.manifests WHERE model_id = $1",
            bytes.fromhex(model_id),
        )
    return None if found is None else bytes(found)


async def save_manifest(
    pool: Pool, model_id: str, document: bytes, kept: Kept, gone: Collection[str]
) -> None:
    """Keep a document under its hash, in the place of those that go. The same again is nothing."""
    with tree_errors():
        async with pool.acquire() as conn, conn.transaction():
            if gone:
                await conn.execute(_FORGET_MANIFESTS, _raw(gone))
            await conn.execute(
                "INSERT INTO attestation.manifests (model_id, document, kind, quantisation,"
                " published_by, published_ms, offered_ms) VALUES ($1, $2, $3, $4, $5, $6, $6)"
                " ON CONFLICT (model_id) DO NOTHING",
                bytes.fromhex(model_id), document, kept.kind, kept.quantisation,
                kept.published_by, kept.offered_ms,
            )  # fmt: skip


async def touch_manifests(pool: Pool, offered: Collection[str], now_ms: int) -> None:
    """These are offered now."""
    with tree_errors():
        await pool.execute(
            "UPDATE attestation.manifests SET offered_ms = $2 WHERE model_id = ANY($1::bytea[])",
            _raw(offered), now_ms,
        )  # fmt: skip


async def forget_manifests(pool: Pool, model_ids: Collection[str]) -> None:
    with tree_errors():
        await pool.execute(_FORGET_MANIFESTS, _raw(model_ids))


def _raw(model_ids: Iterable[str]) -> list[bytes]:
    return [bytes.fromhex(model_id) for model_id in model_ids]
