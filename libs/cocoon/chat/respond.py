"""OpenAI's answer objects: chat.completion, its chunks in their order, usage and errors.

Builders of plain JSON values. The stream's end marker [DONE] is the sidecar's to write.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from cocoon.chat.request import ChatRequest
from cocoon.kernel.errors import CocoonError

ENDPOINT: Final = "/v1/chat/completions"
FinishReason = Literal["stop", "length"]
Json = dict[str, Any]


def to_json(value: Json) -> bytes:
    """Compact UTF-8 JSON."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def answer_json(value: Json | str) -> bytes:
    """The same for an answer's objects, built here of finite numbers: a quarter of the time."""
    return msgspec.json.encode(value)


def error_body(error: CocoonError) -> bytes:
    """The OpenAI error object as JSON bytes."""
    return to_json(error.to_openai())


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Exact counts. `prompt` includes `cached`; `completion` includes `reasoning`."""

    prompt: int
    completion: int
    cached: int = 0
    reasoning: int = 0

    def to_openai(self) -> Json:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's natural log probability and its likeliest rivals. Its repr shows no text."""

    token: str = field(repr=False)
    raw: bytes = field(repr=False)
    logprob: float
    top: tuple[TokenLogprob, ...] = field(default=(), repr=False)

    def to_openai(self) -> Json:
        return {**self._entry(), "top_logprobs": [rival._entry() for rival in self.top]}

    def _entry(self) -> Json:
        return {"token": self.token, "logprob": self.logprob, "bytes": list(self.raw)}


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer's identity and the objects it is told in. `created_s` is Unix seconds."""

    job_id: str
    created_s: int
    system_fingerprint: str
    request: ChatRequest = field(repr=False)

    def opening(self) -> Json:
        """What a stream begins with."""
        return self.role_chunk()

    def logprob_bytes(self, token: TokenLogprob) -> int:
        """So many bytes of JSON does it add to the object that tells it."""
        return len(answer_json(token.to_openai())) + 1

    def role_chunk(self) -> Json:
        """The first chunk: the role and an empty content."""
        return self._chunk({"role": "assistant", "content": "", "refusal": None})

    def delta_chunk(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Json:
        return self._chunk({"content": text}, logprobs=self._logprobs(logprobs))

    def final_chunk(self, finish_reason: FinishReason) -> Json:
        return self._chunk({}, finish_reason=finish_reason)

    def usage_chunk(self, usage: TokenUsage) -> Json:
        """The last chunk, only where stream_options.include_usage asked for it."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage.to_openai()}

    def completion(
        self,
        text: str,
        finish_reason: FinishReason,
        usage: TokenUsage,
        logprobs: Sequence[TokenLogprob] = (),
    ) -> Json:
        """The one body of an answer that is not streamed."""
        message: Json = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
        whole = self._head("chat.completion")
        if self.request.metadata:
            whole["metadata"] = self.request.metadata
        whole["choices"] = [
            {
                "index": 0,
                "message": message,
                "logprobs": self._logprobs(logprobs),
                "finish_reason": finish_reason,
            }
        ]
        whole["usage"] = usage.to_openai()
        return whole

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> Json | None:
        if not self.request.logprobs:
            return None
        return {"content": [token.to_openai() for token in tokens], "refusal": None}

    def _chunk(
        self,
        delta: Json,
        *,
        finish_reason: FinishReason | None = None,
        logprobs: Json | None = None,
    ) -> Json:
        chunk = self._head("chat.completion.chunk")
        chunk["choices"] = [
            {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        ]
        if self.request.include_usage:
            chunk["usage"] = None
        return chunk

    def _head(self, kind: str) -> Json:
        head: Json = {
            "id": f"chatcmpl-{self.job_id}",
            "object": kind,
            "created": self.created_s,
            "model": self.request.model,
            "system_fingerprint": self.system_fingerprint,
        }
        if self.request.service_tier is not None:
            asked = self.request.service_tier
            head["service_tier"] = "default" if asked == "auto" else asked
        return head
