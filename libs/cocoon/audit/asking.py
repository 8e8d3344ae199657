"""The two who are asked the same: the network, as any client asks it, and the trusted reference.

Content stays in memory until it is compared. Nothing that leaves a client marks a canary.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import httpx

from cocoon.client import Chunk, Ended, Network
from cocoon.domain.comparing import Token, Told
from cocoon.kernel.errors import Unavailable

REFERENCE_TIMEOUT_S: Final = 120.0
RIVALS: Final = 5
Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answered:
    """What the network answered, by whom, for how much."""

    job_id: str
    provider_id: str
    model_id: str
    cost_nanoton: int
    told: Told = field(repr=False)


class Reference(Protocol):
    """An engine that the auditor trusts to serve the model's very files.

    provider_id: the network's name for it, "" for none.
    """

    provider_id: str

    async def ask(self, body: Body) -> tuple[Told, str | None]:
        """Its answer, and the model id that it has proven, if it has."""


async def ask_network(network: Network, api_key: str, body: Body) -> Answered:
    """Send one paid job and return its checked answer. Raises what the client raises."""
    job = await network.session.prepare(json.dumps(body).encode(), api_key=api_key)
    text: list[str] = []
    ended: Ended | None = None
    async with aclosing(job.run()) as pieces:
        async for piece in pieces:
            if isinstance(piece, Chunk):
                text += _deltas(json.loads(piece.content))
            elif isinstance(piece, Ended):
                ended = piece
    if ended is None:
        raise Unavailable("the answer did not come to its end; ask again")
    receipt = ended.settlement.receipt
    told = Told("".join(text), receipt.output_tokens)
    if ended.body is not None:
        told = _told(json.loads(ended.body))
    return Answered(
        ended.settlement.job_id, ended.settlement.provider_id, ended.settlement.model_id,
        ended.settlement.cost_nanoton, told,
    )  # fmt: skip


class TrustedProvider:
    """A provider of the network that the auditor runs or trusts, asked by its name."""

    def __init__(self, network: Network, api_key: str, provider_id: str) -> None:
        self._network, self._api_key, self.provider_id = network, api_key, provider_id

    async def ask(self, body: Body) -> tuple[Told, str | None]:
        wanted = {**body, "provider": {"only": [self.provider_id]}}
        answered = await ask_network(self._network, self._api_key, wanted)
        return answered.told, answered.model_id


class TrustedServer:
    """An OpenAI-compatible server of the auditor's own. It proves no model id."""

    provider_id = ""

    def __init__(self, http: httpx.AsyncClient, url: str, model: str, *, logprobs: bool) -> None:
        self._http, self._url, self._model = http, url.rstrip("/"), model
        self._logprobs = {"logprobs": True, "top_logprobs": RIVALS} if logprobs else {}

    async def ask(self, body: Body) -> tuple[Told, str | None]:
        """Raises Unavailable; nothing of the server's text is in the error."""
        asked = {**body, "model": self._model, "stream": False, **self._logprobs}
        asked.pop("provider", None)
        try:
            answer = await self._http.post(f"{self._url}/chat/completions", json=asked)
            answer.raise_for_status()
            return _told(answer.json()), None
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            raise Unavailable(
                f"the reference at {self._url} gave no answer; is it up, and is its model named "
                f"{self._model}?"
            ) from None


@asynccontextmanager
async def reference_of(
    named: str, network: Network, api_key: str, model: str, *, logprobs: bool
) -> AsyncIterator[Reference]:
    """`provider:ID`, or an OpenAI-compatible server's base URL."""
    kind, _, rest = named.partition(":")
    if kind == "provider":
        yield TrustedProvider(network, api_key, rest)
        return
    async with httpx.AsyncClient(timeout=REFERENCE_TIMEOUT_S, trust_env=False) as http:
        yield TrustedServer(http, named, model, logprobs=logprobs)


def _deltas(chunk: Body) -> list[str]:
    return [str(one["delta"].get("content") or "") for one in chunk.get("choices", ())]


def _told(body: Body) -> Told:
    choice = body["choices"][0]
    found = (choice.get("logprobs") or {}).get("content") or ()
    return Told(
        str(choice["message"].get("content") or ""),
        int(body["usage"]["completion_tokens"]),
        tuple(_token(one) for one in found),
    )


def _token(entry: Body) -> Token:
    rivals = tuple(
        (str(one["token"]), float(one["logprob"])) for one in entry.get("top_logprobs") or ()
    )
    return Token(str(entry["token"]), float(entry["logprob"]), rivals)
