"""The client counts an answer's tokens itself, and says so when a receipt claims more."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cocoon.chat import parse_chat_request, to_json
from cocoon.client.counting import Counters, Meter
from cocoon.contracts.messages import Dispute
from cocoon.kernel.errors import ConfigurationError
from cocoon.sealing import Receipt, ResponseSealer
from tests.support import sealing_world

WORDS = "the amber apple rolls over the bridge and nobody sees it roll " * 20
REQUEST = parse_chat_request(
    to_json({"model": "skills-1", "messages": [{"role": "user", "content": "Repeat: amber"}]})
)


@pytest.fixture
def tokenizers(tmp_path: Path) -> dict[str, Path]:
    """A tokenizer of whole words, as a model's folder holds one."""
    library = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    return {"skills-1": tmp_path}


def receipt(**counts: Any) -> Receipt:
    envelope = sealing_world.sealed().envelope
    sealer = ResponseSealer(sealing_world.opened(envelope))
    sealer.data(b"{}")
    signed = Receipt.decode(sealing_world.signed_receipt(sealer))
    return replace(signed, **{"input_tokens": 20, "reasoning_tokens": 0, **counts})


def chunk(text: str | None, **delta: Any) -> bytes:
    told = {"role": "assistant", "content": text, **delta}
    return to_json({"id": "x", "choices": [{"index": 0, "delta": told, "finish_reason": None}]})


def counted(meter: Meter, **counts: Any) -> Dispute | None:
    return meter.dispute(receipt(**counts), b"\x01" * 420)


def fed(*objects: bytes, tokenizers: dict[str, Path] | None = None) -> Meter:
    meter = Counters(tokenizers).meter(REQUEST)
    for item in objects:
        meter.take(item)
    return meter


def test_without_a_tokenizer_bytes_bound_the_tokens() -> None:
    text = chunk("blå")
    assert counted(fed(text, text), output_tokens=8 + 64 + 63) is None
    found = counted(fed(text, text), output_tokens=8 + 64 + 64)
    assert found == Dispute(
        kind="output_tokens", counted_by="bytes", own_input_tokens=len("Repeat: amber"),
        own_output_tokens=8, receipt="01" * 420,
    )  # fmt: skip


def test_the_model_s_own_tokenizer_counts_closer(tokenizers: dict[str, Path]) -> None:
    body = to_json({"choices": [{"message": {"role": "assistant", "content": WORDS,
                                             "refusal": None, "annotations": []}}]})  # fmt: skip
    own = fed(body, tokenizers=tokenizers)
    found = counted(own, output_tokens=len(WORDS))
    assert found is not None
    assert (found.kind, found.counted_by) == ("output_tokens", "tokenizer")
    assert found.own_output_tokens == len(WORDS.split())
    assert counted(own, output_tokens=found.own_output_tokens) is None
    assert counted(fed(body), output_tokens=len(WORDS)) is None


def test_input_tokens_are_disputed_too(tokenizers: dict[str, Path]) -> None:
    meter = fed(chunk("yes"), tokenizers=tokenizers)
    assert counted(meter, output_tokens=3, input_tokens=300) is None
    found = counted(meter, output_tokens=3, input_tokens=600)
    assert found is not None
    assert found.kind == "input_tokens"


@pytest.mark.parametrize(
    "strange", [chunk(None, tool_calls=[{"id": "x" * 200}]), b"[" + b"1," * 200 + b"1]"]
)
def test_what_is_more_than_text_is_bounded_by_all_of_its_bytes(
    strange: bytes, tokenizers: dict[str, Path]
) -> None:
    meter = fed(strange, tokenizers=tokenizers)
    assert counted(meter, output_tokens=len(strange)) is None
    found = counted(meter, output_tokens=len(strange) + 128)
    assert found is not None
    assert found.counted_by == "bytes"


def test_a_warning_holds_numbers_and_no_words(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "cocoon.client"):
        assert counted(fed(chunk("purple wombats")), output_tokens=1000) is not None
    (record,) = caplog.records
    assert record.message == "tokens_disputed"
    assert "wombats" not in json.dumps(record.__dict__, default=str)
    assert (record.output_tokens, record.count) == (1000, 14)  # type: ignore[attr-defined]


def test_a_folder_without_a_tokenizer_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        Counters({"skills-1": tmp_path})
