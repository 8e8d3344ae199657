"""A server that a client came to signs nothing by the client's key but its own nonce."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import pytest

from cocoon.bus import connection, keys
from cocoon.contracts.messages import submission_bytes
from cocoon.kernel.errors import CocoonError


async def asked_to_sign(nonce: str, folder: Path) -> bytes:
    """What a client says to a server that gives it this nonce."""
    heard = bytearray()

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = {"server_id": "x", "version": "2.15.1", "proto": 1, "host": "127.0.0.1",
                "headers": True, "max_payload": 1 << 20, "nonce": nonce}  # fmt: skip
        writer.write(b"INFO %s\r\n" % json.dumps(info).encode())
        with contextlib.suppress(OSError):
            heard.extend(await reader.read(4096))
        writer.close()

    seed_file = folder / "seed"
    keys.write_seed_file(seed_file, keys.new_seed(bytes(range(32))))
    listening = await asyncio.start_server(server, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    with pytest.raises(CocoonError):
        await connection.connect(
            f"nats://127.0.0.1:{port}", seed_file, "agent", "_INBOX_x", timeout_s=0.7
        )
    listening.close()
    return bytes(heard)


async def test_a_server_s_nonce_is_signed(tmp_path: Path) -> None:
    assert b'"sig"' in await asked_to_sign("tBvDLBPu_6-mi1g", tmp_path)


@pytest.mark.parametrize(
    "nonce",
    [
        submission_bytes("prov_1", "ab" * 16, 1, "cd" * 420, "ef" * 32).decode(),
        "cai/1 open statement\0x", "{}", "a b", "é", "", "A" * 65,
    ],
)  # fmt: skip
async def test_nothing_else_is(nonce: str, tmp_path: Path) -> None:
    """The identity key signs submissions too: a false bus must not have one made."""
    assert await asked_to_sign(nonce, tmp_path) == b""
