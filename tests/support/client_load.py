"""Stock OpenAI clients at work on the sidecar, and what they saw: the history that is judged.

Each caller asks one request after the other with an Idempotency-Key, every second one as a
stream. The client's own retries are left as they are.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

import httpx
import openai
from openai import AsyncOpenAI

from cocoon.sealing.receipt import Receipt
from tests.support.collected import ClientCall
from tests.support.network import LiveNetwork

MODEL = "skills-1"
CALL_TIMEOUT_S = 40.0
Outcome = Literal["ok", "failed", "unknown"]


@dataclass
class Call:
    """One request as its caller saw it. Times are monotonic seconds."""

    number: int
    key: str
    stream: bool
    prompt: str
    expected: str | None
    began_s: float
    ended_s: float = 0.0
    outcome: Outcome = "unknown"
    status: int = 0
    code: str = ""
    message: str = ""
    job_id: str = ""
    text: str = ""
    sha256: str | None = None
    cost_nanoton: int | None = None
    epoch: int = 0


def count_to(last: int) -> str:
    return " ".join(str(n) for n in range(1, last + 1))


@dataclass
class ClientLoad:
    """Callers that go on until told to stop. Use it as an async context manager."""

    network: LiveNetwork
    canary: str
    callers: int = 8
    only: Literal["streams", "bodies"] | None = None
    max_retries: int = 2
    history: list[Call] = field(default_factory=list)
    base_url: str = ""  # of another sidecar than the network's own
    api_key: str = "any"

    def __post_init__(self) -> None:
        self._numbers = itertools.count(len(self.history))
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._client: AsyncOpenAI | None = None

    async def __aenter__(self) -> Self:
        self._client = AsyncOpenAI(
            base_url=self.base_url or self.network.sidecar, api_key=self.api_key,
            timeout=CALL_TIMEOUT_S, max_retries=self.max_retries,
        )  # fmt: skip
        self._tasks = [asyncio.create_task(self._caller()) for _ in range(self.callers)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Let every caller finish its request, then close the connections."""
        self._stopping = True
        tasks, self._tasks = self._tasks, []
        await asyncio.gather(*tasks)
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def until(self, enough: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        """Let the load go on until `enough`. Raises AssertionError after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while not enough():
            for task in self._tasks:
                if task.done():
                    task.result()
            assert time.monotonic() < deadline_s, f"{what} did not come within {timeout_s:.0f} s"
            await asyncio.sleep(0.02)

    async def answered(self, count: int, since_s: float = 0.0, timeout_s: float = 60.0) -> None:
        """Until so many requests that began after `since_s` were answered."""
        await self.until(
            lambda: len(self.ok(since_s)) >= count, f"the answer number {count}", timeout_s
        )

    def ok(self, since_s: float = 0.0) -> list[Call]:
        return [c for c in self.history if c.outcome == "ok" and c.began_s >= since_s]

    def calls(self, account_id: str) -> list[ClientCall]:
        """The history in the form that the invariants judge."""
        return [
            ClientCall(
                account_id=account_id,
                idempotency_key=c.key,
                job_id=c.job_id,
                status=c.status,
                received_bytes=len(c.text),
                response_sha256=c.sha256,
                epoch=c.epoch,
            )
            for c in self.history
            if c.job_id and c.status
        ]

    async def ask(self, key: str, prompt: str, *, stream: bool, expected: str | None) -> Call:
        """One request, outside of the callers' turns if need be."""
        call = Call(next(self._numbers), key, stream, prompt, expected, time.monotonic())
        self.history.append(call)
        try:
            await (self._stream(call) if stream else self._body(call))
            call.outcome = "ok"
        except openai.APIStatusError as error:
            call.outcome, call.status = "failed", error.status_code
            call.code, call.message = str(error.code), error.message
            call.job_id = error.response.headers.get("x-cocoon-job-id", "")
        except (openai.APIConnectionError, httpx.TransportError) as error:
            call.outcome, call.code = "unknown", type(error).__name__
        except openai.APIError as error:
            # an error event inside a stream that had begun
            call.outcome, call.code, call.message = "failed", str(error.code), error.message
        finally:
            call.ended_s = time.monotonic()
        return call

    # ---- inside ----

    async def _caller(self) -> None:
        while not self._stopping:
            number = len(self.history)
            stream = number % 2 == 0 if self.only is None else self.only == "streams"
            prompt, expected = f"Repeat: {self.canary}", None
            if number % 4 < 2:
                last = 40 + number % 20
                prompt, expected = f"Count from 1 to {last}", count_to(last)
            call = await self.ask(f"key-{number}-{self.canary}", prompt,
                                  stream=stream, expected=expected)  # fmt: skip
            if call.outcome != "ok":
                await asyncio.sleep(0.1)

    async def _body(self, call: Call) -> None:
        assert self._client is not None
        raw = await self._client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": call.prompt}], temperature=0,
            extra_headers={"Idempotency-Key": call.key},
        )  # fmt: skip
        call.status, call.job_id = raw.status_code, raw.headers["x-cocoon-job-id"]
        answer = raw.parse()
        call.text = answer.choices[0].message.content or ""
        call.sha256 = hashlib.sha256(raw.content).hexdigest()
        assert answer.usage is not None
        _settled(call, answer.usage.model_extra)

    async def _stream(self, call: Call) -> None:
        assert self._client is not None
        stream = await self._client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": call.prompt}], temperature=0,
            stream=True, stream_options={"include_usage": True},
            extra_headers={"Idempotency-Key": call.key},
        )  # fmt: skip
        call.status = stream.response.status_code
        call.job_id = stream.response.headers["x-cocoon-job-id"]
        digest = hashlib.sha256()
        finished = False
        async for chunk in stream:
            digest.update(chunk.model_dump_json().encode())
            for choice in chunk.choices:
                call.text += choice.delta.content or ""
                finished = finished or choice.finish_reason is not None
            if chunk.usage is not None:
                _settled(call, chunk.usage.model_extra)
        assert finished, "a stream ended in silence"
        assert call.cost_nanoton is not None, "a stream ended without its receipt"
        call.sha256 = digest.hexdigest()


def _settled(call: Call, extra: dict[str, object] | None) -> None:
    told = (extra or {})["cocoon"]
    assert isinstance(told, dict)
    call.cost_nanoton = int(told["cost_nanoton"])
    receipt = Receipt.decode(bytes.fromhex(told["receipt"]))
    call.epoch = receipt.epoch
    assert receipt.job_id.hex() == call.job_id == told["job_id"]
