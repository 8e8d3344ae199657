"""SEALED: ciphertext in chunks under the SHA-256 of the whole, in one plain stream.

`sealed.<provider>.<digest>.<index>`: the provider is in the subject, so the server's permissions
keep providers apart, and chunks are fetched by subject without a consumer (docs/adr/0003).
It holds ciphertext only.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import nats.errors

from cocoon.bus.publish import publish_durable
from cocoon.contracts import subjects
from cocoon.kernel.errors import NotFound, TooLarge, Unavailable

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext

CHUNK_BYTES = 524_288
MAX_BLOB_BYTES = 64 * 1024 * 1024
_TOTAL = "Cocoon-Size"
_IN_FLIGHT = 4
_FETCH_TIMEOUT_S = 5.0


async def put_sealed(
    js: JetStreamContext, provider: str, blob: bytes, timeout_s: float = 10.0
) -> str:
    """Store a blob under its digest (64 hex) and return that; a repeat changes nothing.

    Raises TooLarge above 64 MiB, Unavailable when the stream is full or away, Fatal if refused.
    """
    if len(blob) > MAX_BLOB_BYTES:
        raise TooLarge(f"a sealed blob is at most {MAX_BLOB_BYTES} bytes")
    digest = hashlib.sha256(blob).hexdigest()
    chunks = [blob[at : at + CHUNK_BYTES] for at in range(0, len(blob), CHUNK_BYTES)] or [b""]
    headers = {_TOTAL: str(len(blob))}
    # The first chunk goes last: whoever finds it finds the rest.
    for start in range(len(chunks) - 1, 0, -_IN_FLIGHT):
        indexes = range(start, max(start - _IN_FLIGHT, 0), -1)
        await asyncio.gather(
            *(
                _put(js, provider, digest, index, chunks[index], headers, timeout_s)
                for index in indexes
            )
        )
    await _put(js, provider, digest, 0, chunks[0], headers, timeout_s)
    return digest


async def get_sealed(nc: Client, provider: str, digest: str) -> bytes:
    """Fetch a blob and check it against its digest.

    Raises NotFound (never stored, expired, or damaged) or Unavailable.
    """
    first = await _get(nc, provider, digest, 0)
    size = _size(first)
    parts = [first.data]
    count = max(1, -(-size // CHUNK_BYTES))
    for start in range(1, count, _IN_FLIGHT):
        indexes = range(start, min(start + _IN_FLIGHT, count))
        messages = await asyncio.gather(*(_get(nc, provider, digest, i) for i in indexes))
        parts += [message.data for message in messages]
    blob = b"".join(parts)
    if hashlib.sha256(blob).hexdigest() != digest:
        raise NotFound("the sealed blob does not match its digest")
    return blob


async def read_sealed(nc: Client, provider: str, digest: str, size: int) -> AsyncIterator[bytes]:
    """The blob of `size` bytes in order, in chunks of at most 512 KiB, two of them in memory.

    The last chunk comes only if the whole has the digest. Raises like `get_sealed`.
    """
    first = await _get(nc, provider, digest, 0)
    if _size(first) != size:
        raise NotFound("the sealed blob has another size than was told")
    hashing, waiting = hashlib.sha256(first.data), first.data
    for index in range(1, max(1, -(-size // CHUNK_BYTES))):
        if len(waiting) != CHUNK_BYTES:
            break
        data = (await _get(nc, provider, digest, index)).data
        hashing.update(data)
        yield waiting
        waiting = data
    if hashing.hexdigest() != digest:
        raise NotFound("the sealed blob does not match its digest")
    yield waiting


def _size(first: Msg) -> int:
    """The whole blob's size, as its first chunk tells. Raises NotFound."""
    try:
        size = int((first.headers or {})[_TOTAL])
    except (KeyError, ValueError):
        raise NotFound("the sealed blob has no size") from None
    if not 0 <= size <= MAX_BLOB_BYTES:
        raise NotFound("the sealed blob has no valid size")
    return size


async def _put(
    js: JetStreamContext,
    provider: str,
    digest: str,
    index: int,
    chunk: bytes,
    headers: dict[str, str],
    timeout_s: float,
) -> None:
    await publish_durable(
        js,
        subjects.sealed_chunk(provider, digest, index),
        chunk,
        headers,
        timeout_s,
        stream=subjects.SEALED_STREAM,
    )


async def _get(nc: Client, provider: str, digest: str, index: int) -> Msg:
    subject = subjects.sealed_chunk(provider, digest, index)
    try:
        message = await nc.request(
            f"$JS.API.DIRECT.GET.{subjects.SEALED_STREAM}.{subject}", b"", timeout=_FETCH_TIMEOUT_S
        )
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise Unavailable(f"SEALED did not answer ({type(error).__name__})") from None
    status = (message.headers or {}).get("Status")
    if status == "404":
        raise NotFound("there is no such sealed blob; it may have expired")
    if status is not None:
        raise Unavailable(f"SEALED answered {status}")
    return message
