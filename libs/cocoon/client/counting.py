"""The client's own count of an answer's tokens, and the dispute that it opens by itself.

With the model's tokenizer where the owner names its folder, else by bytes: no token shows less than
one. It keeps a text no longer than its answer runs, and says numbers only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from cocoon.chat import to_json
from cocoon.chat.completions import CompletionRequest
from cocoon.chat.embeddings import EmbeddingRequest
from cocoon.chat.endpoints import AnyRequest
from cocoon.contracts.messages import Dispute
from cocoon.domain.metering import overcounted
from cocoon.kernel.errors import ConfigurationError
from cocoon.sealing import Receipt

TOKENIZER_FILE: Final = "tokenizer.json"
_log = logging.getLogger("cocoon.client")


class Tokenizer(Protocol):
    """What counts a text's tokens."""

    def count(self, text: str) -> int: ...


class Counters:
    """Tokenizers by the model's name. Raises ConfigurationError for a folder without one."""

    def __init__(self, folders: Mapping[str, Path | str] | None = None) -> None:
        self._by_model = {name: _load(Path(at)) for name, at in (folders or {}).items()}

    def meter(self, request: AnyRequest) -> Meter:
        return Meter(request, self._by_model.get(request.model))


class _Words(msgspec.Struct, forbid_unknown_fields=True):
    """What a counted message or delta may hold; anything else is not counted word by word."""

    content: str | None = None
    role: str | None = None
    refusal: None = None
    annotations: list[Any] = []


class _Choice(msgspec.Struct):
    delta: _Words | None = None
    message: _Words | None = None
    text: str | None = None


class _Told(msgspec.Struct):
    choices: list[_Choice] = []


_told = msgspec.json.Decoder(_Told)


class Meter:
    """One answer's. Feed it every object of the answer, then ask."""

    def __init__(self, request: AnyRequest, tokenizer: Tokenizer | None) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._texts: list[str] = []
        self._bytes = 0

    def take(self, content: bytes) -> None:
        """One JSON object of the answer: a stream's chunk, or the whole body."""
        try:
            told = _told.decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._tokenizer = None  # it holds more than text: all of its bytes bound its tokens
            self._bytes += len(content)
            return
        for choice in told.choices:
            words = choice.delta or choice.message
            text = (words.content if words else choice.text) or ""
            self._bytes += len(text.encode())
            if self._tokenizer is not None:
                self._texts.append(text)

    def dispute(self, receipt: Receipt, raw: bytes) -> Dispute | None:
        """What to dispute in a checked receipt, None where its counts may be right."""
        tokenizer = self._tokenizer
        inputs = _inputs(self._request)
        if tokenizer is None:
            own_input, own_output = sum(len(text.encode()) for text in inputs), self._bytes
        else:
            own_input = sum(map(tokenizer.count, inputs))
            own_output = tokenizer.count("".join(self._texts))
        kind = overcounted(
            claimed_input=receipt.input_tokens,
            claimed_output=receipt.output_tokens,
            claimed_reasoning=receipt.reasoning_tokens,
            own_input=own_input,
            own_output=own_output,
            by_tokenizer=tokenizer is not None,
            messages=len(inputs),
        )
        if kind is None:
            return None
        _log.warning(
            "tokens_disputed",
            extra={
                "job_id": receipt.job_id.hex(), "kind": kind,
                "input_tokens": receipt.input_tokens, "output_tokens": receipt.output_tokens,
                "count": own_output if kind == "output_tokens" else own_input,
            },
        )  # fmt: skip
        return Dispute(
            kind=kind,
            counted_by="bytes" if tokenizer is None else "tokenizer",
            own_input_tokens=own_input,
            own_output_tokens=own_output,
            receipt=raw.hex(),
        )


def _inputs(request: AnyRequest) -> list[str]:
    """The texts whose tokens are the input; the template and special tokens are the slack's."""
    if isinstance(request, CompletionRequest):
        return [request.prompt]
    if isinstance(request, EmbeddingRequest):
        return list(request.texts)
    schema = request.response_format.json_schema if request.response_format else None
    texts = [message.content for message in request.messages]
    return [*texts, to_json(schema).decode()] if schema else texts


class _Loaded:
    """A tokenizer.json of Hugging Face's library."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Library

        self._tokenizer = Library.from_file(str(path))

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _load(folder: Path) -> Tokenizer:
    path = folder / TOKENIZER_FILE
    try:
        return _Loaded(path)
    except ImportError:
        raise ConfigurationError(
            "counting with a model's tokenizer takes the package tokenizers; install it "
            "(`pip install tokenizers`), or leave the tokenizers out to count by bytes"
        ) from None
    except Exception:  # noqa: BLE001 - the library raises bare Exception
        raise ConfigurationError(
            f"{path} is no tokenizer file; name the model's folder, or leave it out"
        ) from None
