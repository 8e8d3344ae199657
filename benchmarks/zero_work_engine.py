"""An OpenAI-compatible engine that does no work: a raw asyncio protocol, so that only the path is
measured.

Answers one body, or streams one word a chunk, each written alone; `max_tokens` says how many
words (32 without it). Counts tokens as words. With "stamps" as its second argument a stream's
first word comes with the times when the request was whole and when the word was written.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Mapping
from functools import cache
from typing import cast

import httptools
import uvloop

WORDS = 32
MODEL = "zero-work"
WORD = b"word "
_HEAD = {"id": "chatcmpl-0", "created": 1_700_000_000, "model": MODEL}
_CHUNK = {**_HEAD, "object": "chat.completion.chunk"}
_MAX_TOKENS = re.compile(rb'"max(?:_completion)?_tokens": ?(\d+)')
_STREAMS = re.compile(rb'"stream": ?true')
_MODELS = {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0}]}
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _framed(data: bytes) -> bytes:
    """One chunk of a chunked HTTP body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(value: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _delta(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    return _event({**_CHUNK, "choices": [choice]})


_ROLE = _framed(_delta({"role": "assistant", "content": ""}))
# not one word for ever: LiteLLM takes a hundred equal chunks for an engine that hangs
_WORDS = tuple(_framed(_delta({"content": f"{which} word "})) for which in ("this", "that"))


def _usage(words: int) -> dict[str, int]:
    return {"prompt_tokens": 16, "completion_tokens": words, "total_tokens": 16 + words}


@cache
def _end(words: int) -> bytes:
    counts = _event({**_CHUNK, "choices": [], "usage": _usage(words)})
    return _framed(_delta({}, "stop")) + _framed(counts + b"data: [DONE]\n\n") + b"0\r\n\r\n"


def _json(value: Mapping[str, object]) -> bytes:
    body = json.dumps(value).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


@cache
def _body(words: int) -> bytes:
    message = {"role": "assistant", "content": WORD.decode() * words}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    whole = {**_HEAD, "object": "chat.completion", "choices": [choice], "usage": _usage(words)}
    return _json(whole)


class Engine(asyncio.Protocol):
    """One connection; one request at a time on it."""

    stamps = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._url, self._sent = b"", b""
        self._left, self._words, self._full = 0, 0, False

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        if self._left:
            self._loop.call_soon(self._next)

    # ---- httptools' callbacks ----

    def on_message_begin(self) -> None:
        self._url, self._sent = b"", b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._sent += body

    def on_message_complete(self) -> None:
        if not self._url.endswith(b"/chat/completions"):
            self._transport.write(_json(_MODELS))
            return
        asked = _MAX_TOKENS.search(self._sent)
        self._words = int(asked[1]) if asked else WORDS
        if _STREAMS.search(self._sent):
            self._transport.write(_STREAM_HEAD + _ROLE)
            self._left, self._asked_ns = self._words, time.time_ns()
            self._loop.call_soon(self._next)
        else:
            self._transport.write(_body(self._words))

    def _next(self) -> None:
        """One word, then whatever else waits in the loop, then the next word."""
        if self._full or self._transport.is_closing():
            return
        word = _WORDS[self._left % 2]
        if self.stamps and self._left == self._words:
            told = f"asked={self._asked_ns} told={time.time_ns()} word "
            word = _framed(_delta({"content": told}))
        self._transport.write(word)
        self._left -= 1
        if self._left:
            self._loop.call_soon(self._next)
        else:
            self._transport.write(_end(self._words))


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    Engine.stamps = "stamps" in sys.argv[2:]
    uvloop.run(serve(int(sys.argv[1])))
