"""OpenAI's completions: raw text that a model continues. Honoured whole or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field

from cocoon.chat.parameters import Parameter, check_names, honoured, limited, refused
from cocoon.chat.request import (
    EVERYTHING,
    Capabilities,
    Label,
    ModelName,
    Penalty,
    Seed,
    StreamOptions,
    Strict,
    check_able,
    check_shared,
    loads,
    stop_texts,
    validated,
    whole_characters,
)
from cocoon.chat.respond import FinishReason, Json, TokenLogprob, TokenUsage, answer_json
from cocoon.kernel.errors import BadRequest

COMPLETIONS: Final = "/v1/completions"
DEFAULT_TOKENS: Final = 16  # OpenAI's own, where the request names no bound
MAX_RIVALS: Final = 5
_OBJECT: Final = "text_completion"
_MOST_OFFSET: Final = 2**40  # no offset is longer in JSON

COMPLETION_PARAMETERS: Final[dict[str, Parameter]] = {
    "prompt": honoured("One text, or a list of one. Send several requests for several."),
    "model": honoured("A model that the network offers."),
    "best_of": limited("One answer is made per request.", 1),
    "echo": limited("The prompt is not sent back; you have it.", False),
    "frequency_penalty": honoured("-2 to 2."),
    "logit_bias": honoured("Token ids to -100..100, where the model's engine can."),
    "logprobs": honoured("0 to 5, where the model's engine can."),
    "max_tokens": honoured("At least 1; 16 where it is left out, as OpenAI has it."),
    "n": limited("One choice per request; send several requests instead.", 1),
    "presence_penalty": honoured("-2 to 2."),
    "seed": honoured("The same seed and parameters give the same answer on the same engine."),
    "stop": honoured("Up to four texts; the answer ends before the first of them."),
    "stream": honoured("Chunks in OpenAI's order."),
    "stream_options": honoured("include_usage; include_obfuscation must be false or absent."),
    "suffix": refused("Nothing is filled in before a text; leave it out."),
    "temperature": honoured("0 to 2; 0 takes the likeliest token."),
    "top_p": honoured("0 to 1."),
    "user": honoured("Sealed with the prompt, seen by the enclave only, and not stored."),
}


class CompletionRequest(Strict):
    """The honoured parameters. Its bounds on tokens come with the sealed header."""

    model: ModelName
    prompt: Annotated[str, Field(min_length=1), AfterValidator(whole_characters)]
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_RIVALS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**32 - 1)] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    user: Label | None = None

    @property
    def max_output_tokens(self) -> int:
        return self.max_tokens or DEFAULT_TOKENS

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return stop_texts(self.stop)

    @property
    def bias_by_token(self) -> dict[int, float]:
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def rivals(self) -> int:
        """How many of the likeliest tokens are told beside each."""
        return self.logprobs or 0

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """Who says what, in order: one text of nobody's."""
        return (("prompt", self.prompt),)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def parse_completion_request(
    body: bytes | dict[str, Any], *, capabilities: Capabilities = EVERYTHING
) -> CompletionRequest:
    """Parse a request body and check every parameter. Raises BadRequest as chat's parser does."""
    fields = loads(body)
    check_names(fields, COMPLETION_PARAMETERS)
    fields["prompt"] = _one_text(fields.get("prompt"))
    if fields["prompt"] is None:
        del fields["prompt"]
    request = validated(CompletionRequest, fields)
    check_shared(request.stream, request.stream_options, request.stop_texts, request.logit_bias)
    check_able(
        ("logprobs", request.wants_logprobs, capabilities.logprobs),
        ("logit_bias", bool(request.logit_bias), capabilities.logit_bias),
        ("frequency_penalty", bool(request.frequency_penalty), capabilities.penalties),
        ("presence_penalty", bool(request.presence_penalty), capabilities.penalties),
        ("seed", request.seed is not None, capabilities.seed),
    )
    return request


def _one_text(prompt: Any) -> Any:
    """The one prompt of a list of one. Raises BadRequest for several, and for token ids."""
    if not isinstance(prompt, list):
        return prompt
    if any(isinstance(item, int | list) for item in prompt):
        raise BadRequest(
            "Unsupported value for 'prompt': token ids mean another text to each tokenizer; send "
            "the text.",
            param="prompt", code="unsupported_value",
        )  # fmt: skip
    if len(prompt) != 1:
        raise BadRequest(
            "Unsupported value for 'prompt': one text per request; send several requests instead.",
            param="prompt", code="unsupported_value",
        )  # fmt: skip
    return prompt[0]


@dataclass(slots=True)
class CompletionAnswer:
    """One completion's identity and the objects it is told in. Counts where its text is.

    `text_offset` of a log probability is counted in characters from the answer's own beginning.
    """

    job_id: str
    created_s: int
    system_fingerprint: str
    request: CompletionRequest = field(repr=False)
    _offset: int = 0

    def opening(self) -> Json | None:
        """Completions begin with their text."""
        return None

    def delta_chunk(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Json:
        return self._object(text, None, self._logprobs(logprobs))

    def final_chunk(self, finish_reason: FinishReason) -> Json:
        return self._object("", finish_reason, None)

    def usage_chunk(self, usage: TokenUsage) -> Json:
        """The last chunk, only where stream_options.include_usage asked for it."""
        return {**self._head(), "choices": [], "usage": usage.to_openai()}

    def completion(
        self,
        text: str,
        finish_reason: FinishReason,
        usage: TokenUsage,
        logprobs: Sequence[TokenLogprob] = (),
    ) -> Json:
        """The one body of an answer that is not streamed."""
        whole = self._object(text, finish_reason, self._logprobs(logprobs))
        return {**whole, "usage": usage.to_openai()}

    def logprob_bytes(self, token: TokenLogprob) -> int:
        """At most so many bytes of JSON does it add to the object that tells it."""
        return len(answer_json(_logprobs([token], _MOST_OFFSET)))

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> Json | None:
        if not self.request.wants_logprobs:
            return None
        told = _logprobs(tokens, self._offset)
        self._offset += sum(len(token.token) for token in tokens)
        return told

    def _object(self, text: str, finish_reason: FinishReason | None, logprobs: Json | None) -> Json:
        value = self._head()
        value["choices"] = [
            {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish_reason}
        ]
        if self.request.stream and self.request.include_usage:
            value["usage"] = None
        return value

    def _head(self) -> Json:
        return {
            "id": f"cmpl-{self.job_id}",
            "object": _OBJECT,
            "created": self.created_s,
            "model": self.request.model,
            "system_fingerprint": self.system_fingerprint,
        }


def _logprobs(tokens: Sequence[TokenLogprob], offset: int) -> Json:
    """Completions' own form: four lists of one length."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{rival.token: rival.logprob for rival in token.top} for token in tokens],
        "text_offset": offsets,
    }
