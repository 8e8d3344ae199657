"""Accounts and keys as an operator makes them: over the bus, with nothing secret on it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cocoon.bus.requests import ask
from cocoon.contracts import subjects
from cocoon.contracts.messages import CreateKeyRequest, CreditRequest, OpenAccountRequest
from cocoon.devnet.folder import DataFolder
from cocoon.devnet.private_file import write_private
from cocoon.kernel.errors import Transient
from cocoon.kernel.ids import api_key
from cocoon.kernel.money import NANOTON_PER_TON

if TYPE_CHECKING:
    from nats.aio.client import Client

FIRST_CREDIT_NANOTON = 10 * NANOTON_PER_TON
TRIES, PAUSE_S = 40, 0.1


@dataclass(frozen=True, slots=True)
class NewKey:
    """A new API key: its public name, its account, and its text, which is shown once."""

    api_key_id: str
    account_id: str
    text: str

    def __repr__(self) -> str:
        return f"NewKey({self.api_key_id}, {self.account_id})"


def shard_of(account_id: str, shards: Sequence[int]) -> int:
    """The account's shard, as gateways compute it."""
    digest = hashlib.sha256(account_id.encode()).digest()
    return shards[int.from_bytes(digest[:8], "big") % len(shards)]


def new_account_id() -> str:
    return f"acct_{secrets.token_hex(8)}"


async def open_account(nc: Client, account_id: str, shards: Sequence[int]) -> None:
    shard = shard_of(account_id, shards)
    await ask(
        nc, subjects.billing(shard, "open_account"), OpenAccountRequest(account_id=account_id)
    )


async def is_open(nc: Client, account_id: str, shards: Sequence[int]) -> bool:
    """Whether the account was ever opened."""
    answer = await ask(
        nc,
        subjects.billing(shard_of(account_id, shards), "account"),
        OpenAccountRequest(account_id=account_id),
    )
    return bool(json.loads(answer)["opened"])


async def fund(
    nc: Client, account_id: str, amount_nanoton: int, reference: str, shards: Sequence[int]
) -> bool:
    """Credit an account; once for each reference, however often it is asked.

    Returns whether this was the first time. Raises Conflict for another amount.
    """
    answer = await ask(
        nc,
        subjects.billing(shard_of(account_id, shards), "credit_deposit"),
        CreditRequest(account_id=account_id, amount_nanoton=amount_nanoton, reference=reference),
    )
    return not json.loads(answer)["repeated"]


async def balance(nc: Client, account_id: str, shards: Sequence[int]) -> dict[str, str]:
    """{"account_id", "available_nanoton", "held_nanoton"}."""
    answer = await ask(
        nc,
        subjects.billing(shard_of(account_id, shards), "balance"),
        OpenAccountRequest(account_id=account_id),
    )
    found: dict[str, str] = json.loads(answer)
    return found


async def create_key(nc: Client, account_id: str, label: str) -> NewKey:
    """Make a key for an account; only its SHA-256 leaves this process."""
    text = api_key(secrets.token_bytes(32))
    key_id = f"key_{secrets.token_hex(6)}"
    await ask(
        nc,
        subjects.gateway_keys("create"),
        CreateKeyRequest(
            api_key_id=key_id,
            secret_hash=hashlib.sha256(text.encode()).hexdigest(),
            account_id=account_id,
            label=label,
        ),
    )
    return NewKey(key_id, account_id, text)


async def first_account(nc: Client, folder: DataFolder, shards: Sequence[int]) -> str:
    """The devnet's account: opened, funded and given a key once; its id on every start."""
    account_id = folder.secret(
        folder.secrets / "account_id", lambda: new_account_id().encode()
    ).decode()
    await _patiently(lambda: open_account(nc, account_id, shards))
    await fund(nc, account_id, FIRST_CREDIT_NANOTON, "first-start", shards)
    if not folder.api_key.exists():
        key = await create_key(nc, account_id, "made by cocoon up")
        write_private(folder.api_key, key.text.encode())
    return account_id


async def _patiently(attempt: Callable[[], Awaitable[None]]) -> None:
    for tries_left in reversed(range(TRIES)):
        try:
            await attempt()
        except Transient:
            if not tries_left:
                raise
            await asyncio.sleep(PAUSE_S)
        else:
            return
