"""The client: sealed transports for the OpenAI SDK, and the sidecar for everything else.

It verifies providers itself, seals to their attested keys and shows no answer without a valid
receipt. It never sends a prompt in the clear.
"""

from cocoon.client.answers import Settlement
from cocoon.client.job import Began, Chunk, Ended, Job, Piece
from cocoon.client.manifests import manifest_of
from cocoon.client.network import Network, NetworkOptions
from cocoon.client.openai_clients import async_openai_client, openai_client
from cocoon.client.serve import run_sidecar
from cocoon.client.session import Preferences, SealedSession
from cocoon.client.settings import SidecarSettings
from cocoon.client.sidecar import Sidecar
from cocoon.client.transports import (
    AsyncCocoonTransport,
    CocoonTransport,
    async_transport,
    transport,
)

__all__ = [
    "AsyncCocoonTransport",
    "Began",
    "Chunk",
    "CocoonTransport",
    "Ended",
    "Job",
    "Network",
    "NetworkOptions",
    "Piece",
    "Preferences",
    "SealedSession",
    "Settlement",
    "Sidecar",
    "SidecarSettings",
    "async_openai_client",
    "async_transport",
    "manifest_of",
    "openai_client",
    "run_sidecar",
    "transport",
]
