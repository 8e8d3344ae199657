"""An OpenAI-compatible engine that does no work: raw ASGI, so that only the path is measured.

Streams 32 one-word chunks, or answers one body; counts tokens as words.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import uvicorn

CHUNKS = 32
MODEL = "zero-work"
_HEAD = {"id": "chatcmpl-0", "created": 1_700_000_000, "model": MODEL}


def _chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    body = {**_HEAD, "object": "chat.completion.chunk", "choices": [choice]}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


_USAGE = {"prompt_tokens": 16, "completion_tokens": CHUNKS, "total_tokens": 16 + CHUNKS}
_FIRST = _chunk({"role": "assistant", "content": ""})
_WORD = _chunk({"content": "word "})
_LAST = _chunk({}, "stop")
_END = (
    b"data: "
    + json.dumps(
        {**_HEAD, "object": "chat.completion.chunk", "choices": [], "usage": _USAGE}
    ).encode()
    + b"\n\ndata: [DONE]\n\n"
)
_BODY = json.dumps(
    {
        **_HEAD,
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "word " * CHUNKS},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": _USAGE,
    }
).encode()
_MODELS = json.dumps(
    {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "x"}]}
).encode()


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if scope["path"].endswith("/chat/completions") and json.loads(body).get("stream"):
        await _stream(send)
        return
    answer = _BODY if scope["path"].endswith("/chat/completions") else _MODELS
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


async def _stream(send: Any) -> None:
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for part in (_FIRST, *([_WORD] * CHUNKS), _LAST):
        await send({"type": "http.response.body", "body": part, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": _END})


if __name__ == "__main__":
    uvicorn.run(
        app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False,
        loop="uvloop", http="httptools",
    )  # fmt: skip
