"""A running OpenAI-compatible server as the adapters reach it: addresses, connections, refusals.

Only loopback or https addresses are taken: the prompt is in the clear on that way, so it stays in
the machine, or goes to a peer that proves its name and may ask for ours (a client certificate). A
server's own words never reach an error: they may quote the prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import ssl
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from cocoon.chat import to_json
from cocoon.kernel.errors import (
    BadRequest,
    CocoonError,
    ConfigurationError,
    RateLimited,
    Unavailable,
)
from services.provider.backends.openai_answers import failed, named

MAX_LISTED: Final = 10
MAX_ERROR_BYTES: Final = 64 * 1024
MAX_WHOLE_BYTES: Final = 64 * 1024 * 1024
CONNECT_TIMEOUT_S: Final = 5.0
HEALTH_TIMEOUT_S: Final = 5.0
KEEPALIVE_S: Final = 4.0  # less than uvicorn's 5: a connection must not close as it is used again
LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
# TimeoutError: only aiohttp's own, for a deadline of the caller arrives here as a cancellation
BROKEN: Final = (aiohttp.ClientError, TimeoutError, OSError)
NOT_SERVED: Final = (404, 405, 501)


def check_url(url: str) -> str:
    """Return the server's base address without a slash. Raises ConfigurationError."""
    parts = urlsplit(url)
    near = parts.scheme == "http" and parts.hostname in LOOPBACK
    if not (near or parts.scheme == "https") or not parts.hostname or parts.username:
        raise ConfigurationError(
            "an engine's address is http:// on loopback or https://: prompts travel there in the "
            "clear, and nobody on the way may read them"
        )
    return url.rstrip("/").removesuffix("/v1")


def tls_context(
    ca_file: Path | None, client_cert: tuple[Path, Path] | None
) -> ssl.SSLContext | None:
    """What a server's certificate is checked against, and ours; None: the system's alone.

    `client_cert` is a certificate and its key, PEM. Raises ConfigurationError.
    """
    if ca_file is None and client_cert is None:
        return None
    try:
        context = ssl.create_default_context(cafile=ca_file)
        if client_cert is not None:
            context.load_cert_chain(*client_cert)
    except (OSError, ssl.SSLError):
        names = ", ".join(str(path) for path in (ca_file, *(client_cert or ())) if path)
        raise ConfigurationError(
            f"the certificates for the engine's server cannot be used: {names}"
        ) from None
    return context


class OpenAIServer:
    """One server and the model that it is asked for. Times in seconds."""

    def __init__(
        self, url: str, model: str, *, connections: int, read_timeout_s: float, deadline_s: float,
        api_key: str | None, ca_file: Path | None, client_cert: tuple[Path, Path] | None,
    ) -> None:  # fmt: skip
        self._base = check_url(url)
        self.address = f"{self._base}/v1"  # as people write it
        self.model = model
        self._tls = tls_context(ca_file, client_cert)
        if self._tls is not None and not self._base.startswith("https:"):
            raise ConfigurationError("certificates are checked and shown over https:// only")
        # compressed answers would need a bound of their own; nobody compresses on loopback
        self._headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=read_timeout_s
        )
        self._silent = aiohttp.ClientTimeout(  # until one body comes
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=deadline_s
        )
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None

    @property
    def fingerprint(self) -> str:
        return f"fp_{hashlib.sha256(self.model.encode()).hexdigest()[:12]}"

    @property
    def http(self) -> aiohttp.ClientSession:
        """The connections, made when first asked for: they belong to the running event loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # one more than jobs, so that a full engine still answers the health check
                connector=aiohttp.TCPConnector(
                    limit=self._connections + 1, keepalive_timeout=KEEPALIVE_S,
                    ssl=True if self._tls is None else self._tls,
                ),
                headers=self._headers,
                timeout=self._timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
                auto_decompress=False,
            )  # fmt: skip
        return self._session

    def post(
        self, endpoint: str, body: dict[str, Any], *, stream: bool = False
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self.http.post(
            self._base + endpoint, data=to_json(body), allow_redirects=False,
            timeout=self._timeout if stream else self._silent,
        )  # fmt: skip

    async def check_served(self) -> None:
        """Raises Unavailable unless the server lists the model."""
        served = await self.served()
        if self.model not in served:
            raise Unavailable(
                f"the engine's server {self.address} answers, but does not serve the model "
                f"{self.model}; it serves {_listed(served)}"
            )

    async def healthy(self) -> bool:
        """Whether the server lists the model."""
        try:
            return self.model in await self.served()
        except CocoonError:
            return False

    async def served(self) -> list[str]:
        """The models that the server lists. Raises Unavailable naming its address and the cause."""
        try:
            async with (
                asyncio.timeout(HEALTH_TIMEOUT_S),
                self.http.get(f"{self.address}/models", allow_redirects=False) as answer,
            ):
                raw = await whole_body(answer)
            if answer.status != 200:
                raise Unavailable(
                    f"the engine's server {self.address} answers {answer.status} when it is asked "
                    "for its models; an OpenAI-compatible server lists them at /v1/models"
                )
            return [str(item["id"]) for item in json.loads(raw)["data"]]
        except BROKEN as error:
            raise Unavailable(
                f"the engine's server {self.address} does not answer ({_cause(error)}); "
                "start it first"
            ) from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Unavailable(
                f"what answers at {self.address} does not list models as an OpenAI-compatible "
                "server does; name another address"
            ) from None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def _cause(error: Exception) -> str:
    """Why there is no answer, in the system's words."""
    if isinstance(error, TimeoutError):
        return f"nothing within {HEALTH_TIMEOUT_S:.0f} s"
    if not isinstance(error, OSError):
        return "the connection broke"
    known = error.errno is not None and error.errno > 0  # else it is the resolver's
    return (os.strerror(error.errno or 0) if known else str(error.strerror)).lower()


def _listed(names: list[str]) -> str:
    """Some of a server's models, as far as a terminal can show them."""
    shown = ["".join(filter(str.isprintable, name))[:80] for name in names[:MAX_LISTED]]
    more = len(names) - len(shown)
    return ", ".join([*shown, *([f"{more} more"] if more else [])]) or "none"


async def whole_body(answer: aiohttp.ClientResponse) -> bytes:
    raw = bytearray()
    async for chunk in answer.content.iter_any():
        raw += chunk
        if len(raw) > MAX_WHOLE_BYTES:
            raise failed("The engine's server sent an answer that is too long.")
    return bytes(raw)


async def refusal(answer: aiohttp.ClientResponse) -> CocoonError:
    """A server's refusal in our own words; its text may quote the prompt and is not passed on."""
    body = b""
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > MAX_ERROR_BYTES:
            break
    code, param = named(body)
    if answer.status == 429:
        return RateLimited("The engine is answering as many requests as it can.", code="busy")
    if answer.status in (400, 413, 422):
        return BadRequest(
            "The model's engine refuses this request; its parameter or length does not fit.",
            code=code or "engine_refused", param=param,
        )  # fmt: skip
    return failed(f"The engine's server answered {answer.status}.")


def broke(error: Exception) -> Unavailable:
    return failed(f"The engine's server failed ({type(error).__name__}).")
