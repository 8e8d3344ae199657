"""The client's calls to one gateway: each bounded in size and time, errors as the tree's.

Knows no keys and opens nothing; what it carries is sealed already.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

from cocoon.client.lines import MAX_CONNECTIONS, Line, LineError, Lines
from cocoon.contracts.messages import Dispute
from cocoon.kernel.errors import (
    CocoonError,
    ConfigurationError,
    Transient,
    Unauthenticated,
    Unavailable,
    error_for_status,
)

JOBS_PATH: Final = "/v1/jobs"
SEALED_TYPE: Final = "application/vnd.cocoon.cai1"
MAX_JSON_BYTES: Final = 32 * 1024 * 1024  # a model's whole directory, evidence included
MAX_ERROR_BYTES: Final = 64 * 1024
JSON_TIMEOUT_S: Final = 15.0  # of silence
JSON_WHOLE_TIMEOUT_S: Final = 60.0
CANCEL_TIMEOUT_S: Final = 2.0
DISPUTE_DELAYS_S: Final = (0.0, 0.5, 2.0)
_MAX_MESSAGE: Final = 1000
_log = logging.getLogger("cocoon.client")


class Gateway:
    """Calls to one gateway. `lines` stay their owner's to close."""

    def __init__(self, lines: Lines) -> None:
        self.base_url = lines.base_url
        self._lines = lines
        self._cancelling: set[asyncio.Task[None]] = set()

    def cancel_job(self, job_id: str, api_key: str) -> None:
        """Say that nobody waits for a job any more, without waiting. A line that only closes may
        be one that broke, so the gateway lets its job go on for a while.
        """
        if len(self._cancelling) < MAX_CONNECTIONS:
            task = asyncio.create_task(self._cancel(job_id, api_key))
            self._cancelling.add(task)
            task.add_done_callback(self._cancelling.discard)

    def open_dispute(self, job_id: str, dispute: Dispute, api_key: str) -> None:
        """Say, without waiting, that a receipt claims more than was counted. Once a job."""
        if len(self._cancelling) < MAX_CONNECTIONS:
            task = asyncio.create_task(self._dispute(job_id, dispute.to_canonical(), api_key))
            self._cancelling.add(task)
            task.add_done_callback(self._cancelling.discard)

    async def _dispute(self, job_id: str, body: bytes, api_key: str) -> None:
        headers = {**_auth(api_key), "content-type": "application/json"}
        for delay_s in DISPUTE_DELAYS_S:
            await asyncio.sleep(delay_s)
            try:
                async with asyncio.timeout(JSON_TIMEOUT_S):
                    line = await self._open(
                        "POST", _job(job_id) + "/dispute", headers, body, JSON_TIMEOUT_S
                    )
                    (await _successful(line, (201,))).close()
                return
            except (LineError, TimeoutError, Transient):
                continue
            except CocoonError as error:
                _log.warning("dispute_refused", extra={"job_id": job_id, "code": error.code})
                return
        _log.warning("dispute_not_sent", extra={"job_id": job_id})

    async def aclose(self) -> None:
        """Let what was said last be heard, within bounds."""
        if self._cancelling:
            await asyncio.wait(self._cancelling, timeout=CANCEL_TIMEOUT_S)

    async def _cancel(self, job_id: str, api_key: str) -> None:
        with suppress(LineError, CocoonError, TimeoutError):  # it would end by itself, only later
            async with asyncio.timeout(CANCEL_TIMEOUT_S):
                line = await self._open(
                    "DELETE", _job(job_id), _auth(api_key), None, CANCEL_TIMEOUT_S
                )
                line.close()

    async def json(
        self, path: str, api_key: str, *, params: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """GET a JSON object. Raises the tree's error for the status, Unavailable for the rest."""
        target = f"{path}?{urlencode(params)}" if params else path
        document = await self.document(target, api_key, MAX_JSON_BYTES)
        try:
            value = json.loads(document)
        except (ValueError, RecursionError):
            raise Unavailable(
                f"The gateway {self.base_url} answered {path} with something that is not JSON; "
                "check its address."
            ) from None
        if not isinstance(value, dict):
            raise Unavailable(f"The gateway {self.base_url} answered {path} with no object.")
        return value

    async def document(self, target: str, api_key: str, most_bytes: int) -> bytes:
        """GET bytes as they are. Raises the tree's error for the status, else Unavailable."""
        try:
            async with asyncio.timeout(JSON_WHOLE_TIMEOUT_S):
                line = await self._open("GET", target, _auth(api_key), None, JSON_TIMEOUT_S)
                try:
                    if line.status != 200:
                        raise await _error(line)
                    return await _read(line, most_bytes)
                finally:
                    line.close()
        except (LineError, TimeoutError) as error:
            raise unreachable(self.base_url, error) from None

    async def job(self, job_id: str, api_key: str) -> dict[str, Any]:
        """The gateway's account of a job, from the log."""
        return await self.json(_job(job_id), api_key)

    async def post_job(
        self, envelope: bytes, *, api_key: str, idempotency_key: str, traceparent: str,
        read_timeout_s: float, headers: Mapping[str, str] | None = None,
    ) -> Line:  # fmt: skip
        """POST a sealed request; returns the 200 answer with its body unread.

        Raises the tree's error for any other status, LineError when there is none.
        """
        told = {
            **(headers or {}),
            **_auth(api_key),
            "content-type": SEALED_TYPE,
            "accept": SEALED_TYPE,
            "idempotency-key": idempotency_key,
            "traceparent": traceparent,
        }
        line = await self._open("POST", JOBS_PATH, told, envelope, read_timeout_s)
        return await _successful(line, (200,))

    async def stored_response(
        self, job_id: str, offset: int, *, api_key: str, read_timeout_s: float
    ) -> Line:
        """GET the sealed response from a byte offset on (206, or 200 with all of it)."""
        headers = {**_auth(api_key), "accept": SEALED_TYPE, "range": f"bytes={offset}-"}
        target = _job(job_id) + "/response"
        line = await self._open("GET", target, headers, None, read_timeout_s)
        return await _successful(line, (200, 206))

    async def _open(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes | None,
        read_timeout_s: float,
    ) -> Line:  # fmt: skip
        return await self._lines.open(method, target, headers, body, read_timeout_s=read_timeout_s)


def _job(job_id: str) -> str:
    return f"{JOBS_PATH}/{quote(job_id)}"


def _auth(api_key: str) -> dict[str, str]:
    if not api_key:
        return {}
    if not api_key.isascii() or not api_key.isprintable():
        raise Unauthenticated("The API key holds characters that no key has; check it.")
    return {"authorization": f"Bearer {api_key}"}


def check_url(gateway_url: str) -> None:
    """Raises ConfigurationError for what is not a gateway's address."""
    try:
        url = urlsplit(gateway_url)
        right = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        right = False
    if not right:
        raise ConfigurationError(
            f"{gateway_url!r} is not a gateway's address; write it like https://gateway.example"
        )


def unreachable(base_url: str, error: Exception) -> Unavailable:
    return Unavailable(
        f"The gateway {base_url} cannot be reached ({error or type(error).__name__}); "
        "check its address and try again.",
        code="gateway_unreachable",
    )


async def _successful(line: Line, statuses: tuple[int, ...]) -> Line:
    if line.status in statuses:
        return line
    try:
        raise await _error(line)
    finally:
        line.close()


async def _read(line: Line, limit: int) -> bytes:
    body = bytearray()
    while chunk := await line.next():
        body += chunk
        if len(body) > limit:
            raise Unavailable(f"The gateway's answer is larger than {limit} bytes; it was dropped.")
    return bytes(body)


async def _error(line: Line) -> CocoonError:
    """The tree's error for an answer that is not a success."""
    status = line.status
    message, code, param = f"The gateway answered {status}.", None, None
    try:
        told = json.loads(await _read(line, MAX_ERROR_BYTES))["error"]
        message = str(told["message"])[:_MAX_MESSAGE] or message
        code = _text(told.get("code"))
        param = _text(told.get("param"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, LineError):
        pass  # not OpenAI's error object: the status speaks for itself
    return error_for_status(
        status, message, code=code, param=param,
        retry_after_s=_seconds(line.headers.get("retry-after")),
    )  # fmt: skip


def _text(value: object) -> str | None:
    return value[:128] if isinstance(value, str) else None


def _seconds(text: str | None) -> int | None:
    return min(int(text), 3600) if text and text.isascii() and text.isdigit() else None
