"""A chat completion request, parsed strictly: honoured whole or refused by name.

Errors are OpenAI's (message, param, code) and hold no value of the request; reprs show nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from cocoon.chat.parameters import check_names
from cocoon.chat.refusals import refuse_validation
from cocoon.kernel.errors import BadRequest

MAX_MESSAGES: Final = 4096
MAX_SCHEMA_DEPTH: Final = 64
_INT64: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do beside plain text. The client does not know them: EVERYTHING."""

    logprobs: bool = False
    logit_bias: bool = False
    penalties: bool = False
    seed: bool = False
    json_object: bool = False
    json_schema: bool = False


EVERYTHING: Final = Capabilities(True, True, True, True, True, True)


class Strict(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, hide_input_in_errors=True, allow_inf_nan=False
    )

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Nothing of a request prints."""
        return iter(())


def whole_characters(text: str) -> str:
    """JSON can name half of a character; no engine and no count can take it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text is whole characters") from None
    return text


_Form = TypeVar("_Form", bound=Strict)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn. `content` is the joined text of its parts."""

    role: Literal["developer", "system", "user", "assistant"]
    content: Annotated[str, AfterValidator(whole_characters)]

    @model_validator(mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        return _message_fields(value) if isinstance(value, dict) else value


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


def _writable(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema goes to the engine as JSON again: no halves of characters, no endless nesting."""
    _check_depth(schema, MAX_SCHEMA_DEPTH)
    try:
        json.dumps(schema, ensure_ascii=False, allow_nan=False).encode()
    except TypeError:
        raise ValueError("a schema is JSON") from None
    return schema


def _check_depth(value: Any, left: int) -> None:
    if isinstance(value, dict | list):
        if not left:
            raise ValueError("a schema is not nested so deeply")
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, left - 1)


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[dict[str, Any], AfterValidator(_writable)] | None = None


Penalty = Annotated[float, Field(ge=-2, le=2)]
Label = Annotated[str, StringConstraints(max_length=512)]
Seed = Annotated[int, Field(ge=-_INT64 - 1, le=_INT64)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class ChatRequest(Strict):
    """The honoured parameters. Limited ones were checked by the table and need no field.

    Times and money are none of its business: bounds come with the sealed header.
    """

    model: ModelName
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**32 - 1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**32 - 1)] | None = None
    metadata: dict[str, Label] | None = None
    response_format: ResponseFormat | None = None
    safety_identifier: Annotated[str, StringConstraints(max_length=128)] | None = None
    seed: Seed | None = None
    service_tier: str | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    user: Label | None = None

    @property
    def max_output_tokens(self) -> int | None:
        """The caller's bound on the answer, under either of its names."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return stop_texts(self.stop)

    @property
    def bias_by_token(self) -> dict[int, float]:
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    @property
    def rivals(self) -> int:
        """How many of the likeliest tokens are told beside each."""
        return self.top_logprobs or 0

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """Who says what, in order."""
        return tuple((message.role, message.content) for message in self.messages)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def format(self) -> str:
        return self.response_format.type if self.response_format else "text"


def parse_chat_request(
    body: bytes | dict[str, Any], *, capabilities: Capabilities = EVERYTHING
) -> ChatRequest:
    """Parse a request body (UTF-8 JSON, or the parsed object) and check every parameter.

    Raises BadRequest with OpenAI's `param` and `code`: unknown_parameter, unsupported_parameter,
    unsupported_value, missing_required_parameter, invalid_type, invalid_value, ...
    """
    fields = loads(body)
    check_names(fields)
    request = validated(ChatRequest, fields)
    _check_together(request)
    _check_capabilities(request, capabilities)
    return request


def validated(form: type[_Form], fields: dict[str, Any]) -> _Form:
    """The fields that a form has, checked one by one. Raises BadRequest."""
    taken = {name: value for name, value in fields.items() if name in form.model_fields}
    try:
        return form.model_validate(taken)
    except ValidationError as error:
        refuse_validation(error)


def loads(body: bytes | dict[str, Any]) -> dict[str, Any]:
    """A request's body as an object. Raises BadRequest."""
    return _loads(body) if isinstance(body, bytes) else dict(body)


def _loads(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise BadRequest(
            "We could not parse the JSON body of your request.", code="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise BadRequest("The body of your request must be a JSON object.", code="invalid_json")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Null in these is what an SDK sends back when it repeats an earlier answer; `annotations` is too.
_EMPTY_FIELDS: Final = ("annotations", "audio", "function_call", "name", "refusal", "tool_calls")


def _message_fields(value: dict[str, Any]) -> dict[str, Any]:
    """Join text parts and drop empty companions of an assistant's message."""
    fields = {
        name: item
        for name, item in value.items()
        if name not in _EMPTY_FIELDS or item not in (None, [])
    }
    role = fields.get("role")
    if role in ("tool", "function"):
        raise BadRequest(
            "Messages of tools are not supported; put their text in a user message.",
            param="messages.role", code="unsupported_value",
        )  # fmt: skip
    for name in _EMPTY_FIELDS:
        if name in fields:
            raise BadRequest(
                f"Unsupported parameter: 'messages.{name}'. A message here has a role and text.",
                param=f"messages.{name}", code="unsupported_parameter",
            )  # fmt: skip
    content = fields.get("content")
    if isinstance(content, list):
        fields["content"] = "".join(_part_text(part) for part in content)
    return fields


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        known = kind if kind in ("image_url", "input_audio", "file", "refusal") else "of that type"
        raise BadRequest(
            f"Content parts {known} are not supported; send text parts.",
            param="messages.content", code="unsupported_value",
        )  # fmt: skip
    return TextPart.model_validate(part).text


def _check_together(request: ChatRequest) -> None:
    """Rules between parameters, as OpenAI has them."""
    check_shared(request.stream, request.stream_options, request.stop_texts, request.logit_bias)
    if request.top_logprobs is not None and not request.logprobs:
        invalid("top_logprobs", "is only allowed when 'logprobs' is true")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        invalid("max_tokens", "and 'max_completion_tokens' mean the same; give one of them")
    metadata = request.metadata or {}
    if len(metadata) > 16 or any(len(key) > 64 for key in metadata):
        invalid("metadata", "takes up to 16 keys of at most 64 characters")
    wants_schema = request.format == "json_schema"
    if request.response_format and wants_schema != bool(request.response_format.json_schema):
        invalid("response_format", "needs 'json_schema' exactly when its type is json_schema")


def check_shared(
    stream: bool | None, options: StreamOptions | None, stops: tuple[str, ...],
    bias: dict[str, float] | None,
) -> None:  # fmt: skip
    """The rules that chat and completions have in common. Raises BadRequest."""
    if options is not None and not stream:
        invalid("stream_options", "is only allowed when 'stream' is true")
    if options is not None and options.include_obfuscation:
        raise BadRequest(
            "Unsupported value for 'stream_options.include_obfuscation': sealed records are padded "
            "already; set it to false or leave it out.",
            param="stream_options.include_obfuscation", code="unsupported_value",
        )  # fmt: skip
    if len(stops) > 4 or "" in stops:
        invalid("stop", "takes up to four texts, none of them empty")
    for token in bias or {}:
        if not (token.isascii() and token.isdigit() and len(token) <= 9):
            invalid("logit_bias", "maps token ids (as strings of digits) to numbers")


def stop_texts(stop: str | list[str] | None) -> tuple[str, ...]:
    """The texts that end an answer, in either of their forms."""
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def invalid(param: str, rule: str) -> NoReturn:
    """Raise BadRequest for a value that a rule does not take."""
    raise BadRequest(f"Invalid value: '{param}' {rule}.", param=param, code="invalid_value")


def _check_capabilities(request: ChatRequest, can: Capabilities) -> None:
    check_able(
        ("logprobs", request.wants_logprobs, can.logprobs),
        ("logit_bias", bool(request.logit_bias), can.logit_bias),
        ("frequency_penalty", bool(request.frequency_penalty), can.penalties),
        ("presence_penalty", bool(request.presence_penalty), can.penalties),
        ("seed", request.seed is not None, can.seed),
        ("response_format", request.format == "json_object", can.json_object),
        ("response_format", request.format == "json_schema", can.json_schema),
    )


def check_able(*asked: tuple[str, bool, bool]) -> None:
    """Refuse by name what is wanted and not able. Raises BadRequest."""
    for param, wanted, able in asked:
        if wanted and not able:
            raise BadRequest(
                f"Unsupported parameter: '{param}' is not supported with this model's engine.",
                param=param, code="unsupported_parameter",
            )  # fmt: skip
