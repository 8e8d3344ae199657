"""The caller's way through the SDK: requests are sealed in its own process, without a sidecar.

It asks the transport itself: what an OpenAI client above it costs is the same for every arm.
"""

from __future__ import annotations

from pathlib import Path

import httpx

from benchmarks.caller import Answer, Spec
from cocoon.client import NetworkOptions, async_transport


class SealedLines:
    """`ask` through cocoon.client's asynchronous transport."""

    def __init__(self, spec: Spec) -> None:
        self._transport = async_transport(
            NetworkOptions(gateway_url=spec.url, api_key=spec.key, trust=Path(spec.trust))
        )
        self._body = spec.body()

    async def ask(self) -> Answer:
        request = httpx.Request(
            "POST", "http://cocoon/v1/chat/completions", content=self._body,
            headers={"content-type": "application/json"},
        )  # fmt: skip
        response = await self._transport.handle_async_request(request)
        if response.status_code != 200:
            told = await response.aread()
            raise RuntimeError(f"refused: {response.status_code} {told[:300]!r}")
        answer = Answer()
        async for part in response.aiter_raw():
            answer.take(part)
        await response.aclose()
        return answer

    async def close(self) -> None:
        await self._transport.aclose()
