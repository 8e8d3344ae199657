"""Stock OpenAI clients whose requests are sealed: the two lines most programs need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cocoon.client.network import NetworkOptions
from cocoon.client.transports import async_transport, transport

if TYPE_CHECKING:
    import openai  # half a second to import, which the sidecar need not wait for


def openai_client(options: NetworkOptions, **more: Any) -> openai.OpenAI:
    """An `openai.OpenAI` over a sealed transport; `more` goes to its constructor.

    Close it when done: that ends the transport's thread.
    """
    import openai

    http_client = openai.DefaultHttpxClient(transport=_for_openai(transport(options)))
    return openai.OpenAI(http_client=http_client, **_defaults(options, more))


def async_openai_client(options: NetworkOptions, **more: Any) -> openai.AsyncOpenAI:
    """An `openai.AsyncOpenAI` over a sealed transport; `more` goes to its constructor."""
    import openai

    http_client = openai.DefaultAsyncHttpxClient(transport=_for_openai(async_transport(options)))
    return openai.AsyncOpenAI(http_client=http_client, **_defaults(options, more))


def _for_openai(made: Any) -> Any:
    """The transports answer in either library, which no type can say."""
    return made


def _defaults(options: NetworkOptions, more: dict[str, Any]) -> dict[str, Any]:
    base_url = options.gateway_url.rstrip("/").removesuffix("/v1") + "/v1"
    # the network's key is in the options; without one the caller's api_key is used
    return {"base_url": base_url, "api_key": options.api_key or None, **more}
