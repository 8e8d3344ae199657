"""The embedded engine for embeddings: a small encoder on onnxruntime, in one thread of its own.

Nothing of a request leaves the process. The inputs of one request share batches, those of two
never; who waits is bounded, and takes turns batch by batch.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Literal, TypeVar

import numpy as np
from tokenizers import Tokenizer

from cocoon.chat import MAX_REQUEST_TOKENS, Capabilities, Embedded, EmbeddingRequest, TokenUsage
from cocoon.chat.embeddings import finite
from cocoon.kernel.errors import ConfigurationError, RateLimited, Unavailable
from cocoon.models.folder import read_config
from cocoon.telemetry.metrics import ENGINE_STEP_SECONDS
from services.provider.backends.base import input_too_long, inputs_too_long
from services.provider.backends.runtime import ort

MAX_BATCH: Final = 32  # inputs
MAX_BATCH_TOKENS: Final = 4096  # with what fills the shorter ones up
_NEEDED: Final = ("context_length", "dimensions", "start_token", "end_token", "pad_token")
_Ids = list[int]
_In = TypeVar("_In")
_Out = TypeVar("_Out")


class OnnxEmbedder:
    """Serves one model folder. `queue_limit` bounds running and waiting requests together."""

    kind: Literal["embeddings"] = "embeddings"
    capabilities = Capabilities()

    def __init__(self, folder: Path, *, queue_limit: int) -> None:
        config = read_config(folder)
        missing = [name for name in _NEEDED if name not in config]
        if config.get("kind") != "embeddings" or missing:
            raise ConfigurationError(
                f"{folder}/config.json is not that of a model for embeddings"
                + (f"; it names no {', '.join(missing)}" if missing else "")
            )
        self._folder = folder
        self._tokenizer = _tokenizer(folder / "tokenizer.json")
        start, end, pad = (self._special(config[name]) for name in _NEEDED[2:])
        self._around, self._pad = (start, end), pad
        self._queue_limit = queue_limit
        self._running = 0
        self._pool: ThreadPoolExecutor | None = None
        self._session: ort.InferenceSession | None = None
        self.context_tokens = int(config["context_length"])
        self.request_tokens = MAX_REQUEST_TOKENS
        self.dimensions = int(config["dimensions"])
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
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="onnx-embeddings")

    async def healthy(self) -> bool:
        return self._pool is not None

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            await asyncio.to_thread(pool.shutdown, cancel_futures=True)

    async def embed(self, request: EmbeddingRequest, *, max_input_tokens: int) -> Embedded:
        if self._running >= self._queue_limit:
            raise RateLimited("The engine is answering as many requests as it can.", code="busy")
        self._running += 1
        try:
            inputs = await self._do(self._read, request.texts)
            tokens = sum(map(len, inputs))
            for index, ids in enumerate(inputs):
                if len(ids) > self.context_tokens:
                    raise input_too_long(index, len(ids), self.context_tokens)
            if tokens > min(max_input_tokens, self.request_tokens):
                raise inputs_too_long(tokens, min(max_input_tokens, self.request_tokens))
            vectors: dict[int, bytes] = {}
            for batch in batches([len(ids) for ids in inputs]):
                made = await self._do(self._run, [inputs[index] for index in batch])
                vectors.update(zip(batch, made, strict=True))
            return Embedded(
                tuple(vectors[index] for index in range(len(inputs))), TokenUsage(tokens, 0)
            )
        finally:
            self._running -= 1

    async def _do(self, work: Callable[[_In], _Out], argument: _In) -> _Out:
        """Run it in the engine's thread. Raises Unavailable when that stops, or when it fails."""
        pool = self._pool
        if pool is None:
            raise Unavailable("The engine has stopped.")
        running = asyncio.get_running_loop().run_in_executor(pool, work, argument)
        try:
            return await running
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._pool is None and not (task and task.cancelling()):
                raise Unavailable("The engine has stopped.") from None  # it never ran
            raise
        except Exception:  # noqa: BLE001 - the engine's texts may quote its input
            raise Unavailable("The engine failed.", code="engine_failed") from None

    # ---- in the thread ----

    def _read(self, texts: Sequence[str]) -> list[_Ids]:
        start, end = self._around
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [[start, *one.ids, end] for one in found]

    def _run(self, inputs: Sequence[_Ids]) -> list[bytes]:
        assert self._session is not None  # noqa: S101 - started before the pool
        began = time.perf_counter()
        longest = max(map(len, inputs))
        ids = np.full((len(inputs), longest), self._pad, np.int64)
        mask = np.zeros_like(ids)
        for row, one in enumerate(inputs):
            ids[row, : len(one)] = one
            mask[row, : len(one)] = 1
        (vectors,) = self._session.run(None, {"ids": ids, "mask": mask})
        ENGINE_STEP_SECONDS.observe(time.perf_counter() - began)
        return [finite(row.astype("<f4").tobytes()) for row in vectors]

    def _special(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ConfigurationError(f"the tokenizer has no token {token}")
        return int(token_id)


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Inputs' numbers in batches of alike lengths, each within its bounds: little is filled up."""
    made: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda one: (lengths[one], one)):
        batch = made[-1] if made else []
        full = len(batch) >= MAX_BATCH or (len(batch) + 1) * lengths[index] > MAX_BATCH_TOKENS
        if not made or (batch and full):
            made.append([index])
        else:
            batch.append(index)
    return made


def _tokenizer(path: Path) -> Tokenizer:
    try:
        found = Tokenizer.from_file(str(path))
    except Exception:  # noqa: BLE001 - the library raises bare Exception
        raise ConfigurationError(f"{path} is not a tokenizer file") from None
    found.no_truncation()  # what is too long is refused, never cut
    found.no_padding()
    found.encode_special_tokens = True  # a text that holds "[SEP]" is text
    return found
