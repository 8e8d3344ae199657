"""Replies under fire: OpenAI's JSON and Triton's tensors as the agent reads them, an enclave's
answers as a client reads and shows them. What is accepted can be written as OpenAI's JSON."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from cocoon.chat import (
    CompletionAnswer,
    TokenUsage,
    parse_chat_request,
    parse_completion_request,
    parse_embedding_request,
    to_json,
)
from cocoon.chat.embeddings import embedding_answer, embedding_bytes
from cocoon.chat.respond import Answer, answer_json, error_body
from cocoon.client.answers import Settlement, StreamShaper, enclave_error, sse_event, whole_body
from cocoon.client.lines import MAX_OVERHEAD_BYTES, Broken, _Connection
from cocoon.kernel.errors import CocoonError, EvidenceRejected, Unavailable
from cocoon.sealing import Receipt, Status
from services.provider.backends.base import Ended, Output, Piece
from services.provider.backends.openai_answers import (
    StreamReader,
    named,
    read_embeddings,
    read_whole,
)
from services.provider.backends.triton_wire import (
    MAX_COUNT,
    OUTPUTS,
    read_error,
    read_load,
    read_outputs,
)
from tests.support import sealing_world as world

REQUEST = parse_chat_request(
    b'{"model":"m","messages":[{"role":"user","content":"hi"}],"logprobs":true,"top_logprobs":2}'
)
ANSWER = Answer("0f" * 16, 1_790_000_000, "fp_0123456789ab", REQUEST)
RECEIPT = Receipt(
    job_id=world.JOB, key_id=bytes(16), model_id=world.MODEL, req_hash=bytes(32),
    resp_hash=bytes(32), prompt_commit=bytes(32), output_commit=bytes(32),
    **world.RECEIPT_FIELDS,  # type: ignore[arg-type]
)  # fmt: skip
SETTLEMENT = Settlement(
    "0f" * 16, "prov", "11" * 32, "simulated", RECEIPT, RECEIPT.sign(world.SIGNER)
)


def _has_code(error: CocoonError, code: str) -> None:
    assert error.code == code


def _is_json(content: bytes) -> None:
    json.loads(content.decode("utf-8"), parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def _can_be_told(outputs: Iterable[Output | None]) -> None:
    """Every output becomes an object of OpenAI's, in JSON that everybody reads."""
    for output in outputs:
        if isinstance(output, Piece):
            assert 0 <= output.tokens <= MAX_COUNT
            assert all(math.isfinite(item.logprob) for item in output.logprobs)
            _is_json(to_json(ANSWER.delta_chunk(output.text, output.logprobs)))
        elif isinstance(output, Ended):
            _sound(output.usage)
            _is_json(to_json(ANSWER.completion("", output.reason, output.usage)))


def _sound(usage: TokenUsage) -> None:
    assert 0 <= usage.cached <= usage.prompt <= MAX_COUNT
    assert 0 <= usage.reasoning <= usage.completion <= MAX_COUNT


def openai_body(data: bytes) -> None:
    """A whole answer, and the same bytes as an error's body."""
    for name in named(data):
        assert name is None or (name.isidentifier() and len(name) <= 64)
    try:
        _can_be_told(read_whole(data))
    except Unavailable as error:
        _has_code(error, "engine_failed")


def openai_completion(data: bytes) -> None:
    """A whole completion: what was read can be told in completions' own objects."""
    try:
        piece, end = read_whole(data, completions=True)
    except Unavailable as error:
        _has_code(error, "engine_failed")
        return
    _can_be_told((piece, end))
    asked = parse_completion_request(b'{"model":"m","prompt":"hi","logprobs":2}')
    answer = CompletionAnswer("0f" * 16, 1_790_000_000, "fp_0123456789ab", asked)
    text, logprobs = (piece.text, piece.logprobs) if piece else ("", ())
    _is_json(answer_json(answer.completion(text, end.reason, end.usage, logprobs)))


def openai_embeddings(data: bytes) -> None:
    """A whole body of two vectors: what was read can be told in both forms, within its bound."""
    try:
        made = read_embeddings(data, 2)
    except Unavailable as error:
        _has_code(error, "engine_failed")
        return
    (size,) = {len(vector) for vector in made.vectors}
    for form in ("float", "base64"):
        asked = parse_embedding_request(
            {"model": "m", "input": ["a", "b"], "encoding_format": form}
        )
        told = answer_json(embedding_answer(asked, made))
        _is_json(told)
        assert len(told) <= embedding_bytes(asked, size // 4)


def openai_stream(data: bytes) -> None:
    """A stream's items, one a line, then its end. However it is cut, it says the same."""
    items = data.split(b"\n")
    lines = b"".join(b"data: %b\n" % item for item in items)
    told = []
    for cut in (0, len(lines) // 2):
        reader, outputs = StreamReader(), []
        try:
            outputs = [*reader.feed(lines[:cut]), *reader.feed(lines[cut:])]
            _can_be_told(outputs)
            _can_be_told([reader.end()])
        except Unavailable as error:
            _has_code(error, "engine_failed")
            told.append(error.message)
        else:
            pieces = [output for output in outputs if isinstance(output, Piece)]
            told.append((
                "".join(piece.text for piece in pieces),
                sum(piece.tokens for piece in pieces),
                [entry for piece in pieces for entry in piece.logprobs],
                reader.end(),
            ))  # fmt: skip
    assert told[0] == told[1]


def triton_reply(data: bytes) -> None:
    """Five tensors in a row, each a length u16 and bytes; the same bytes as an error's text."""
    tensors, at = {}, 0
    for name in OUTPUTS:
        length = int.from_bytes(data[at : at + 2], "big")
        tensors[name] = data[at + 2 : at + 2 + length]
        at += 2 + length
    for first in (True, False):
        try:
            _can_be_told(read_outputs(tensors, first=first))
        except Unavailable as error:
            _has_code(error, "engine_failed")
    refusal = read_error(data.decode("utf-8", "replace"))
    assert len(error_body(refusal)) < 1000


def triton_metrics(data: bytes) -> None:
    load = read_load(data, "skills-1")
    assert load is None or 0 <= load <= MAX_COUNT


def client_stream(data: bytes) -> None:
    """An enclave's stream, an object a zero byte: shown as events of one line, or refused."""
    for include_usage in (False, True):
        shaper, shown = StreamShaper(include_usage=include_usage), []
        try:
            *chunks, usage = data.split(b"\0")
            for chunk in chunks:
                now = shaper.take(chunk)
                shown += [] if now is None else [now]
            shown += shaper.finish(SETTLEMENT, usage or None)
        except EvidenceRejected as error:
            _has_code(error, "bad_answer")
            continue
        for content in shown:
            event = sse_event(content)
            assert event.startswith(b"data: ")
            assert event.endswith(b"\n\n")
            assert b"\n" not in event[:-2]
            assert b"\r" not in event
            _is_json(event[6:])


def client_body(data: bytes) -> None:
    """An enclave's one body and its error record."""
    try:
        _is_json(whole_body(data, SETTLEMENT))
    except EvidenceRejected as error:
        _has_code(error, "bad_answer")
    for status in (Status.REFUSED, Status.FAILED):
        told: CocoonError | None = enclave_error(replace(RECEIPT, status=status), data)
        assert told is not None
        _is_json(error_body(told))


class _Wire(asyncio.Transport):
    """Where a request goes to and no answer comes from by itself."""

    def write(self, data: object) -> None: ...
    def abort(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


_LOOP = asyncio.new_event_loop()


def gateway_answer(data: bytes) -> None:
    """HTTP as a client hears it, a piece a zero byte: a whole answer, or a broken line."""
    _LOOP.run_until_complete(_heard(data.split(b"\0")))


async def _heard(pieces: list[bytes]) -> None:
    connection = _Connection()
    connection.connection_made(_Wire())
    asking = asyncio.ensure_future(connection.ask(b"GET / HTTP/1.1\r\n\r\n", b"", 5.0))
    await asyncio.sleep(0)
    for piece in pieces:
        if not connection.lost:
            connection.data_received(piece)
    connection.connection_lost(None)
    body = b""
    try:
        await asking
        while taken := await connection.next():
            body += taken
    except Broken:
        return
    assert 200 <= connection.status <= 999
    assert len(body) <= sum(map(len, pieces))
    assert sum(map(len, connection.headers)) <= MAX_OVERHEAD_BYTES + max(map(len, pieces))
    assert not connection.release()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "openai_body": openai_body,
    "openai_completion": openai_completion,
    "openai_embeddings": openai_embeddings,
    "openai_stream": openai_stream,
    "triton_reply": triton_reply,
    "triton_metrics": triton_metrics,
    "client_stream": client_stream,
    "client_body": client_body,
    "gateway_answer": gateway_answer,
}
