"""The client's HTTP to one gateway: every call bounded in size and time, errors as the tree's.

Knows no keys and opens nothing; what it carries is sealed already.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import quote

import httpx

from cocoon.kernel.errors import CocoonError, Unavailable, error_for_status

SEALED_TYPE: Final = "application/vnd.cocoon.cai1"
MAX_JSON_BYTES: Final = 32 * 1024 * 1024  # a model's whole directory, evidence included
MAX_ERROR_BYTES: Final = 64 * 1024
CONNECT_TIMEOUT_S: Final = 5.0
JSON_TIMEOUT_S: Final = 15.0
_MAX_MESSAGE: Final = 1000


class Gateway:
    """Calls to one gateway. `http` stays its owner's to close."""

    def __init__(self, base_url: str, http: httpx.AsyncClient) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._http = http

    async def json(
        self, path: str, api_key: str, *, params: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """GET a JSON object. Raises the tree's error for the status, Unavailable for the rest."""
        timeout = httpx.Timeout(JSON_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        try:
            async with self._http.stream(
                "GET", self.base_url + path, params=params, headers=_auth(api_key), timeout=timeout
            ) as response:
                if response.status_code != 200:
                    raise await _error(response)
                value = json.loads(await _read(response, MAX_JSON_BYTES))
        except httpx.HTTPError as error:
            raise _unreachable(self.base_url, error) from None
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

    @asynccontextmanager
    async def post_job(
        self, envelope: bytes, *, api_key: str, idempotency_key: str, traceparent: str,
        read_timeout_s: float,
    ) -> AsyncIterator[httpx.Response]:  # fmt: skip
        """POST a sealed request; yields the 200 response with its body unread.

        Raises the tree's error for any other status, httpx.TransportError when the line breaks.
        """
        headers = {
            **_auth(api_key),
            "content-type": SEALED_TYPE,
            "accept": SEALED_TYPE,
            "idempotency-key": idempotency_key,
            "traceparent": traceparent,
        }
        async with self._http.stream(
            "POST", f"{self.base_url}/v1/jobs", content=envelope, headers=headers,
            timeout=_patient(read_timeout_s),
        ) as response:  # fmt: skip
            if response.status_code != 200:
                raise await _error(response)
            yield response

    @asynccontextmanager
    async def stored_response(
        self, job_id: str, offset: int, *, api_key: str, read_timeout_s: float
    ) -> AsyncIterator[httpx.Response]:
        """GET the sealed response from a byte offset on (206, or 200 with all of it)."""
        headers = {**_auth(api_key), "accept": SEALED_TYPE, "range": f"bytes={offset}-"}
        async with self._http.stream(
            "GET", f"{self.base_url}/v1/jobs/{quote(job_id)}/response", headers=headers,
            timeout=_patient(read_timeout_s),
        ) as response:  # fmt: skip
            if response.status_code not in (200, 206):
                raise await _error(response)
            yield response


def _auth(api_key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _patient(read_timeout_s: float) -> httpx.Timeout:
    return httpx.Timeout(JSON_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, read=read_timeout_s)


def _unreachable(base_url: str, error: Exception) -> Unavailable:
    return Unavailable(
        f"The gateway {base_url} cannot be reached ({type(error).__name__}); "
        "check its address and try again.",
        code="gateway_unreachable",
    )


async def _read(response: httpx.Response, limit: int) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > limit:
            raise Unavailable(f"The gateway's answer is larger than {limit} bytes; it was dropped.")
    return bytes(body)


async def _error(response: httpx.Response) -> CocoonError:
    """The tree's error for an answer that is not a success."""
    status = response.status_code
    message, code, param = f"The gateway answered {status}.", None, None
    try:
        told = json.loads(await _read(response, MAX_ERROR_BYTES))["error"]
        message = str(told["message"])[:_MAX_MESSAGE] or message
        code = _text(told.get("code"))
        param = _text(told.get("param"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, httpx.HTTPError):
        pass  # not OpenAI's error object: the status speaks for itself
    return error_for_status(
        status, message, code=code, param=param,
        retry_after_s=_seconds(response.headers.get("retry-after")),
    )  # fmt: skip


def _text(value: object) -> str | None:
    return value[:128] if isinstance(value, str) else None


def _seconds(text: str | None) -> int | None:
    return min(int(text), 3600) if text and text.isascii() and text.isdigit() else None
