"""The embedded engine: a small model on onnxruntime, in one worker thread of this process.

Nothing of a request leaves the process. The queue in front of the thread is bounded.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from cocoon.chat import (
    Capabilities,
    ChatRequest,
    FinishReason,
    TextRequest,
    TokenLogprob,
    TokenUsage,
)
from cocoon.kernel.clock import Randomness
from cocoon.kernel.errors import CocoonError, ConfigurationError, RateLimited, Unavailable
from cocoon.models.folder import read_config
from cocoon.telemetry.metrics import ENGINE_STEP_SECONDS
from services.provider.backends.base import Ended, Output, Piece, Started, prompt_too_long
from services.provider.backends.batching import Batcher, Cache, Generation
from services.provider.backends.runtime import ort
from services.provider.backends.sampling import Pick, Sampler
from services.provider.backends.text import AnswerText, TokenTable

TEMPLATE: Final = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}"
    "<|end|>{% endif %}{% endfor %}<|assistant|>"
)
STOP_TIMEOUT_S: Final = 10.0


class _Answer:
    """One generation's end in both threads: the worker writes, the event loop reads."""

    def __init__(
        self, text: AnswerText, table: TokenTable, stops: frozenset[int], limit: int, prompt: int
    ) -> None:
        self._text = text
        self._table = table
        self._stops = stops
        self._limit = limit
        self._prompt = prompt
        self._made = 0
        self._unsent = 0  # tokens whose text is held
        self._logprobs: list[TokenLogprob] = []
        self.fresh: list[Output | CocoonError] = []
        self.arrived: asyncio.Queue[Output | CocoonError] = asyncio.Queue()
        self.gone = False

    def take(self, pick: Pick) -> bool:
        """The worker's side: a token came. False when the answer is over."""
        if pick.token in self._stops:
            self._end("stop")
            return False
        self._made += 1
        self._unsent += 1
        data = self._table.bytes_of(pick.token)
        if pick.logprob or pick.top:
            self._logprobs.append(self._logprob(pick, data))
        self._release(self._text.push(data))
        if self._text.stopped:
            self._end("stop")
            return False
        if self._made >= self._limit:
            self._end("length")
            return False
        return True

    def fail(self, error: CocoonError) -> None:
        self.fresh.append(error)

    def _release(self, text: str, *, last: bool = False) -> None:
        if not text and not (last and self._unsent):
            return
        kept = tuple(self._logprobs)
        if self._text.stopped:
            kept = _within(kept, len(text.encode()))
        self.fresh.append(Piece(text, self._unsent, kept))
        self._unsent = 0
        self._logprobs.clear()

    def _end(self, reason: FinishReason) -> None:
        self._release(self._text.finish(), last=True)
        # a stop text that only the held end completed is a stop as well
        actual: FinishReason = "stop" if self._text.stopped else reason
        self.fresh.append(Ended(actual, TokenUsage(prompt=self._prompt, completion=self._made)))

    def _logprob(self, pick: Pick, data: bytes) -> TokenLogprob:
        top = tuple(
            TokenLogprob(raw.decode("utf-8", "replace"), raw, logprob)
            for raw, logprob in ((self._table.bytes_of(token), value) for token, value in pick.top)
        )
        return TokenLogprob(data.decode("utf-8", "replace"), data, pick.logprob, top)


def _within(logprobs: Sequence[TokenLogprob], size: int) -> tuple[TokenLogprob, ...]:
    """Those whose bytes lie within the first `size`: a stop text's own tokens are not told."""
    kept: list[TokenLogprob] = []
    for item in logprobs:
        size -= len(item.raw)
        if size < 0:
            break
        kept.append(item)
    return tuple(kept)


class OnnxBackend:
    """Serves one model folder. `queue_limit` bounds running and waiting answers together."""

    kind: Literal["chat"] = "chat"
    capabilities = Capabilities(logprobs=True, logit_bias=True, penalties=True, seed=True)

    def __init__(self, folder: Path, *, queue_limit: int, randomness: Randomness) -> None:
        config = read_config(folder)
        if config.get("chat_template") != TEMPLATE:
            raise ConfigurationError(f"{folder} has a chat template that this engine does not know")
        self._folder = folder
        self._config = config
        self._table = TokenTable(folder / "tokenizer.json")
        self._stops = frozenset(int(token) for token in config["stop_token_ids"])
        self._default_temperature = float(config.get("default_temperature", 1.0))
        self._queue_limit = queue_limit
        self._randomness = randomness
        self._wake = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._answers: set[_Answer] = set()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: ort.InferenceSession | None = None
        self.context_tokens = self.request_tokens = int(config["context_length"])
        print_of = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
        self.system_fingerprint = f"fp_{print_of[:12]}"

    async def start(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            self._session = await asyncio.to_thread(
                ort.InferenceSession, str(self._folder / "model.onnx"), options,
                providers=["CPUExecutionProvider"],
            )  # fmt: skip
        except Exception:  # noqa: BLE001 - onnxruntime raises many kinds
            raise ConfigurationError(f"{self._folder}/model.onnx does not load") from None
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="onnx-engine", daemon=True)
        self._thread.start()

    async def healthy(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._closing

    async def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, STOP_TIMEOUT_S)

    async def generate(
        self, request: TextRequest, *, max_input_tokens: int, max_output_tokens: int
    ) -> AsyncGenerator[Output, None]:
        prompt = self._prompt(request)
        bound = min(max_input_tokens, self.context_tokens - 1)
        if len(prompt) > bound:
            raise prompt_too_long(
                request, bound, tokens=len(prompt), context_tokens=self.context_tokens,
                max_output_tokens=max_output_tokens,
            )  # fmt: skip
        if len(self._answers) >= self._queue_limit:
            raise RateLimited("The engine is answering as many requests as it can.", code="busy")
        sampler = Sampler(
            request, vocabulary=len(self._table), default_temperature=self._default_temperature,
            seed=int.from_bytes(self._randomness.token(8), "big"),
        )  # fmt: skip
        limit = min(max_output_tokens, self.context_tokens - len(prompt))
        answer = _Answer(
            AnswerText(request.stop_texts), self._table, self._stops, limit, len(prompt)
        )
        self._submit(Generation(prompt, sampler, answer), answer)
        try:
            yield Started(len(prompt))
            while True:
                output = await answer.arrived.get()
                if isinstance(output, CocoonError):
                    raise output
                yield output
                if isinstance(output, Ended):
                    return
        finally:
            answer.gone = True
            self._answers.discard(answer)

    def _prompt(self, request: TextRequest) -> list[int]:
        """The chat template, token by token, so that no text can pose as a turn; or the bare text
        that is to be continued.
        """
        if not isinstance(request, ChatRequest):
            return self._table.encode(request.prompt)
        ids: list[int] = []
        for message in request.messages:
            role = "system" if message.role == "developer" else message.role
            ids += [self._table.special(f"<|{role}|>"), *self._table.encode(message.content)]
            if role == "assistant":
                ids.append(self._table.special("<|end|>"))
        return [*ids, self._table.special("<|assistant|>")]

    def _submit(self, generation: Generation, answer: _Answer) -> None:
        with self._wake:
            if self._closing or self._thread is None:
                raise Unavailable("The engine has stopped.")
            self._answers.add(answer)
            self._waiting.append(generation)
            self._wake.notify()

    # ---- the worker's thread ----

    def _work(self) -> None:
        batcher = Batcher(self._run_graph, self._empty_cache)
        while True:
            with self._wake:
                while not (self._waiting or len(batcher) or self._closing):
                    self._wake.wait()
                if self._closing:
                    break
                fresh = [self._waiting.popleft() for _ in range(len(self._waiting))]
            fresh = [generation for generation in fresh if not generation.sink.gone]
            touched = [*batcher.members(), *fresh]
            began = time.perf_counter()
            try:
                batcher.step()
                batcher.add(fresh)
            except Exception:  # noqa: BLE001 - the engine's texts may quote its input
                batcher.clear()
                for generation in touched:
                    _sink(generation).fail(Unavailable("The engine failed.", code="engine_failed"))
            ENGINE_STEP_SECONDS.observe(time.perf_counter() - began)
            self._deliver([_sink(generation) for generation in touched])
        left = [*batcher.members(), *self._waiting]
        for generation in left:
            _sink(generation).fail(Unavailable("The engine has stopped."))
        self._deliver([_sink(generation) for generation in left])

    def _deliver(self, answers: list[_Answer]) -> None:
        """Hand everything new to the event loop in one call."""
        batch = []
        for answer in answers:
            if answer.fresh:
                batch.append((answer, answer.fresh))
                answer.fresh = []
        if not batch or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(_hand_over, batch)
        except RuntimeError:
            return  # the loop is closed: nobody waits

    def _run_graph(self, ids: Any, keys: Cache, values: Cache) -> Sequence[Any]:
        assert self._session is not None  # noqa: S101 - started before the thread
        feeds = {"ids": ids, "past_k": keys, "past_v": values}
        outputs: Sequence[Any] = self._session.run(None, feeds)
        return outputs

    def _empty_cache(self, batch: int) -> Cache:
        config = self._config
        shape = (config["layers"], batch, config["heads"], 0, config["head_dim"])
        return np.zeros(shape, np.float32)


def _sink(generation: Generation) -> _Answer:
    assert isinstance(generation.sink, _Answer)  # noqa: S101 - the only kind made here
    return generation.sink


def _hand_over(batch: list[tuple[_Answer, list[Output | CocoonError]]]) -> None:
    for answer, outputs in batch:
        for output in outputs:
            answer.arrived.put_nowait(output)
