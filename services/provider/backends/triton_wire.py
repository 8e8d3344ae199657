"""What travels between the agent and a Triton server, and how its replies and metrics are read.

Pure. A reply is another program's bytes: whatever is wrong with it is an Unavailable in our words,
and no text of it passes into an error.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from typing import Any, Final

from cocoon.chat import TextRequest, TokenLogprob, TokenUsage
from cocoon.kernel.errors import BadRequest, CocoonError, RateLimited, Unavailable
from services.provider.backends.base import Ended, Output, Piece, Started

PROTOCOL: Final = "1"
INPUTS: Final = {"request": "BYTES", "max_input_tokens": "INT32", "max_output_tokens": "INT32"}
OUTPUTS: Final = {
    "text": "BYTES", "tokens": "INT32", "logprobs": "BYTES", "finish_reason": "BYTES",
    "usage": "INT32",
}  # fmt: skip
MAX_TEXT_BYTES: Final = 1024 * 1024
MAX_METRICS_BYTES: Final = 1024 * 1024
MAX_TOP: Final = 20  # OpenAI's bound on top_logprobs
MAX_COUNT: Final = 2**31 - 1
_ERROR: Final = re.compile(r"cocoon-error:(request|busy|engine):([a-z_]{1,64}):([a-z_]{0,64})\Z")
_SAMPLE: Final = re.compile(rb"([a-z_]{1,64})\{([^{}]{0,512})\} (\d{1,15}(?:\.\d{1,15})?)\s*\Z")
_QUEUED: Final = b"nv_inference_pending_request_count"
_RUNNING: Final = b"cocoon_engine_running"


def request_text(request: TextRequest) -> bytes:
    """The request's own JSON: what was honoured, and nothing that the engine need not know.

    A completion has a `prompt` where a chat has `messages`.
    """
    kept = request.model_dump(
        exclude_none=True,
        exclude={"metadata", "safety_identifier", "service_tier", "stream", "stream_options",
                 "user"},
    )  # fmt: skip
    return json.dumps(kept, ensure_ascii=False, separators=(",", ":")).encode()


def stop_text(name: str) -> bytes:
    """What stops the request of this id: a request of its own in the same stream."""
    return json.dumps({"stop_request": name}).encode()


def read_outputs(tensors: Mapping[str, bytes], *, first: bool) -> list[Output]:
    """One response's tensors (name -> raw bytes as Triton lays them out) as outputs.

    A first response may tell the prompt's token count. Raises Unavailable.
    """
    try:
        text = _text(tensors["text"])
        tokens = _numbers(tensors["tokens"], 1)[0]
        told = _text(tensors["logprobs"])
        reason = _text(tensors["finish_reason"])
        prompt, completion, cached, reasoning = _numbers(tensors["usage"], 4)
        logprobs = _logprobs(json.loads(told), depth=1) if told else ()
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError, struct.error):
        raise failed("The engine's server sent what is not an answer.") from None
    outputs: list[Output] = [Started(prompt or None)] if first else []
    if text or tokens or logprobs:
        outputs.append(Piece(text, tokens, logprobs))
    if reason:
        if reason not in ("stop", "length") or cached > prompt or reasoning > completion:
            raise failed("The engine's server ended without a reason or token counts.")
        usage = TokenUsage(prompt=prompt, completion=completion, cached=cached, reasoning=reasoning)
        outputs.append(Ended("stop" if reason == "stop" else "length", usage))
    return outputs


def read_error(message: str) -> CocoonError:
    """The server's refusal in our own words; its text may quote the prompt and is not passed on."""
    found = _ERROR.search(message)
    family, code, param = found.groups() if found else ("engine", "engine_failed", "")
    if family == "busy":
        return RateLimited("The engine is answering as many requests as it can.", code="busy")
    if family == "request":
        return BadRequest(
            "The model's engine refuses this request; its parameter or length does not fit.",
            code=code, param=param or None,
        )  # fmt: skip
    return failed("The engine's server failed.")


def read_load(metrics: bytes, model: str) -> int | None:
    """How many requests the server has for `model`, waiting and running; None if it does not say.

    `metrics` is Prometheus' text, at most MAX_METRICS_BYTES of it are looked at.
    """
    label = f'model="{model}"'.encode()
    load: int | None = None
    for line in metrics[:MAX_METRICS_BYTES].split(b"\n"):
        if not line.startswith((_QUEUED, _RUNNING)):
            continue
        found = _SAMPLE.match(line)
        if found and found[1] in (_QUEUED, _RUNNING) and label in found[2].split(b","):
            load = min((load or 0) + int(float(found[3])), MAX_COUNT)
    return load


def failed(message: str) -> Unavailable:
    return Unavailable(message, code="engine_failed")


def _text(raw: bytes) -> str:
    """A BYTES tensor of one element: a little-endian length of four bytes, then as many."""
    (size,) = struct.unpack_from("<I", raw)
    if size != len(raw) - 4 or size > MAX_TEXT_BYTES:
        raise ValueError
    return raw[4:].decode("utf-8")


def _numbers(raw: bytes, count: int) -> tuple[int, ...]:
    if len(raw) != 4 * count:
        raise ValueError
    numbers: tuple[int, ...] = struct.unpack(f"<{count}i", raw)
    if min(numbers) < 0:
        raise ValueError
    return numbers


def _logprobs(entries: Any, *, depth: int) -> tuple[TokenLogprob, ...]:
    """Entries are [bytes in hex, natural log probability, rivals in the same form]."""
    if not isinstance(entries, list) or (depth == 0 and len(entries) > MAX_TOP):
        raise ValueError
    return tuple(_logprob(entry, depth) for entry in entries)


def _logprob(entry: Any, depth: int) -> TokenLogprob:
    shown, value, rivals = entry
    raw, logprob = bytes.fromhex(shown), float(value)
    if not math.isfinite(logprob) or (rivals and depth == 0):
        raise ValueError
    top = _logprobs(rivals, depth=depth - 1) if rivals else ()
    return TokenLogprob(raw.decode("utf-8", "replace"), raw, logprob, top)
