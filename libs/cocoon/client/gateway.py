"""The client's HTTP to one gateway: every call bounded in size and time, errors as the tree's.

Knows no keys and opens nothing; what it carries is sealed already. It follows no redirect, takes no
proxy from the environment and keeps no cookie.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any, Final
from urllib.parse import quote, urlsplit

import aiohttp
import httpx

from cocoon.kernel.errors import CocoonError, Unauthenticated, Unavailable, error_for_status

SEALED_TYPE: Final = "application/vnd.cocoon.cai1"
MAX_JSON_BYTES: Final = 32 * 1024 * 1024  # a model's whole directory, evidence included
MAX_ERROR_BYTES: Final = 64 * 1024
MAX_CONNECTIONS: Final = 256
KEEP_ALIVE_S: Final = 15.0  # shorter than the gateway's, so that an idle line is not found dead
CONNECT_TIMEOUT_S: Final = 5.0
POOL_TIMEOUT_S: Final = 15.0  # for a free connection, the time to open one included
JSON_TIMEOUT_S: Final = 15.0  # of silence
JSON_WHOLE_TIMEOUT_S: Final = 60.0
CANCEL_TIMEOUT_S: Final = 2.0
WRITE_TIMEOUT_S: Final = 15.0  # more than this and the time for an answer: nobody reads
_SMALL_BODY_BYTES: Final = 512 * 1024
_MAX_MESSAGE: Final = 1000


class LineError(Exception):
    """Something between here and the gateway failed. Says nothing about the job."""


class Unreached(LineError):
    """No connection was made: the gateway has not seen the request."""


class Silent(LineError):
    """The gateway holds the line and says nothing."""


class Broken(LineError):
    """The line ended, or spoke no HTTP, before the answer was whole."""


def open_http(base_url: str) -> aiohttp.ClientSession:
    """The HTTP client for a gateway, on the running loop. Its owner closes it."""
    secure = urlsplit(base_url).scheme == "https"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=MAX_CONNECTIONS,
            keepalive_timeout=KEEP_ALIVE_S,
            # the same roots whatever the environment names
            ssl=httpx.create_ssl_context(trust_env=False) if secure else True,
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"user-agent": "cocoon", "accept-encoding": "identity"},
        auto_decompress=False,
        trust_env=False,  # no proxy sees the API key, no .netrc replaces it
    )


class Line:
    """A successful answer whose body is still to come. Close it: that is how one leaves early."""

    __slots__ = ("_response",)

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def headers(self) -> Mapping[str, str]:
        """By name in any case."""
        return self._response.headers

    @property
    def ended(self) -> bool:
        """Whether all of the body was read, and the connection is free again."""
        return self._response.content.at_eof()

    async def next(self) -> bytes:
        """The bytes that have come, b"" at the body's end. Raises Silent or Broken."""
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:  # a TimeoutError is an OSError
            raise _line_error(error) from None

    def close(self) -> None:
        """Give the connection back if the body was read whole; else close it."""
        self._response.close()


class Gateway:
    """Calls to one gateway. `http` stays its owner's to close."""

    def __init__(self, base_url: str, http: aiohttp.ClientSession) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._jobs_url = f"{self.base_url}/v1/jobs"
        self._http = http
        self._cancelling: set[asyncio.Task[None]] = set()

    def cancel_job(self, job_id: str, api_key: str) -> None:
        """Say that nobody waits for a job any more, without waiting. A line that only closes may
        be one that broke, so the gateway lets its job go on for a while.
        """
        if len(self._cancelling) < MAX_CONNECTIONS:
            task = asyncio.create_task(self._cancel(job_id, api_key))
            self._cancelling.add(task)
            task.add_done_callback(self._cancelling.discard)

    async def aclose(self) -> None:
        """Let what was said last be heard, within bounds."""
        if self._cancelling:
            await asyncio.wait(self._cancelling, timeout=CANCEL_TIMEOUT_S)

    async def _cancel(self, job_id: str, api_key: str) -> None:
        url = f"{self._jobs_url}/{quote(job_id)}"
        with suppress(LineError, CocoonError, TimeoutError):  # it would end by itself, only later
            async with asyncio.timeout(CANCEL_TIMEOUT_S):
                line = await self._open("DELETE", url, _auth(api_key), None, CANCEL_TIMEOUT_S)
                line.close()

    async def json(
        self, path: str, api_key: str, *, params: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """GET a JSON object. Raises the tree's error for the status, Unavailable for the rest."""
        url = self.base_url + path
        try:
            async with asyncio.timeout(JSON_WHOLE_TIMEOUT_S):
                line = await self._open("GET", url, _auth(api_key), None, JSON_TIMEOUT_S, params)
                try:
                    if line.status != 200:
                        raise await _error(line)
                    value = json.loads(await _read(line, MAX_JSON_BYTES))
                finally:
                    line.close()
        except (LineError, TimeoutError) as error:
            raise unreachable(self.base_url, error) from None
        except (ValueError, RecursionError):
            raise Unavailable(
                f"The gateway {self.base_url} answered {path} with something that is not JSON; "
                "check its address."
            ) from None
        if not isinstance(value, dict):
            raise Unavailable(f"The gateway {self.base_url} answered {path} with no object.")
        return value

    async def job(self, job_id: str, api_key: str) -> dict[str, Any]:
        """The gateway's account of a job, from the log."""
        return await self.json(f"/v1/jobs/{quote(job_id)}", api_key)

    async def post_job(
        self, envelope: bytes, *, api_key: str, idempotency_key: str, traceparent: str,
        read_timeout_s: float,
    ) -> Line:  # fmt: skip
        """POST a sealed request; returns the 200 answer with its body unread.

        Raises the tree's error for any other status, LineError when there is none.
        """
        headers = {
            **_auth(api_key),
            "content-type": SEALED_TYPE,
            "accept": SEALED_TYPE,
            "idempotency-key": idempotency_key,
            "traceparent": traceparent,
        }
        line = await self._open("POST", self._jobs_url, headers, envelope, read_timeout_s)
        return await _successful(line, (200,))

    async def stored_response(
        self, job_id: str, offset: int, *, api_key: str, read_timeout_s: float
    ) -> Line:
        """GET the sealed response from a byte offset on (206, or 200 with all of it)."""
        headers = {**_auth(api_key), "accept": SEALED_TYPE, "range": f"bytes={offset}-"}
        url = f"{self._jobs_url}/{quote(job_id)}/response"
        line = await self._open("GET", url, headers, None, read_timeout_s)
        return await _successful(line, (200, 206))

    async def _open(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None,
        read_timeout_s: float, params: Mapping[str, str] | None = None,
    ) -> Line:  # fmt: skip
        """Send, and return any answer once its head is there. Raises LineError."""
        # large bytes are written piece by piece: one write of them would hold up the loop
        large = body is not None and len(body) > _SMALL_BODY_BYTES
        try:
            async with asyncio.timeout(POOL_TIMEOUT_S + WRITE_TIMEOUT_S + read_timeout_s):
                response = await self._http.request(
                    method, url, params=params, headers=headers, allow_redirects=False,
                    data=io.BytesIO(body) if large and body else body,
                    timeout=_patience(read_timeout_s),
                )  # fmt: skip
        except (aiohttp.ClientError, OSError) as error:
            raise _line_error(error) from None
        return Line(response)


@cache
def _patience(read_timeout_s: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(
        total=None, connect=POOL_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S,
        sock_read=read_timeout_s,
    )  # fmt: skip


def _line_error(error: Exception) -> LineError:
    name = type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return Unreached(name)
    return Silent(name) if isinstance(error, TimeoutError) else Broken(name)


def _auth(api_key: str) -> dict[str, str]:
    if not api_key:
        return {}
    if not api_key.isascii() or not api_key.isprintable():
        raise Unauthenticated("The API key holds characters that no key has; check it.")
    return {"authorization": f"Bearer {api_key}"}


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
