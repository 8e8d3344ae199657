"""What exactly a model id names, asked of a gateway and believed only by its hash."""

from __future__ import annotations

import re
from typing import Final

from cocoon.client.gateway import Gateway, check_url
from cocoon.client.lines import Lines
from cocoon.kernel.errors import BadRequest, EvidenceRejected
from cocoon.models import ModelManifest
from cocoon.models.manifest import MAX_PUBLISHED_BYTES, parse_published

MANIFESTS_PATH: Final = "/v1/manifests/"
_MODEL_ID: Final = re.compile(r"[0-9a-f]{64}\Z")


async def fetch_manifest(gateway: Gateway, model_id: str) -> ModelManifest:
    """The manifest whose SHA-256 is `model_id`. No key is needed, and none is sent.

    Raises BadRequest for what is no id, NotFound if nobody published it, EvidenceRejected if the
    gateway sent other bytes, Unavailable.
    """
    if _MODEL_ID.match(model_id) is None:
        raise BadRequest(
            "A model id is 64 hex digits in lower case; answers tell it in x-cocoon-model-id.",
            param="model_id",
        )
    document = await gateway.document(MANIFESTS_PATH + model_id, "", MAX_PUBLISHED_BYTES)
    try:
        return parse_published(document, model_id)
    except ValueError:
        raise EvidenceRejected(
            f"The gateway {gateway.base_url} sent something else than the manifest of {model_id}: "
            "its SHA-256 is another, or it is no manifest. Ask another gateway.",
            code="manifest_mismatch",
        ) from None


async def manifest_of(gateway_url: str, model_id: str) -> ModelManifest:
    """As `fetch_manifest`, over a line of its own: for who has no open `Network`."""
    check_url(gateway_url)
    lines = Lines(gateway_url)
    try:
        return await fetch_manifest(Gateway(lines), model_id)
    finally:
        await lines.aclose()
