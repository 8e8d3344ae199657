"""The agent publishes the manifests that the network asks for; what is not taken costs no job."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from cocoon.contracts.messages import OfferRequest
from cocoon.kernel.errors import CocoonError, Forbidden, Unavailable
from cocoon.models.describing import describe_folder
from cocoon.models.manifest import parse_published
from services.provider import publishing
from services.provider.settings import SHIPPED_MODEL
from tests.support.provider_file import ProviderFile, model
from tests.support.provider_world import ProviderWorld

SKILLS = describe_folder(SHIPPED_MODEL, "skills-1")


class Shelf:
    """Attestation's part: asks for what it lacks, refuses what it is told to."""

    def __init__(self, world: ProviderWorld) -> None:
        self.kept: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.errors: list[CocoonError] = []
        self._take_offer = world._do_publish_offer
        answers: Any = world
        answers._do_publish_offer = self._offer
        answers._do_publish_manifest = self._take

    def _offer(self, body: bytes) -> dict[str, Any]:
        answer = self._take_offer(body)
        offered = {one.model_id for one in OfferRequest.model_validate_json(body).models}
        return {**answer, "manifests_wanted": sorted(offered - set(self.kept))}

    def _take(self, body: bytes) -> dict[str, Any]:
        model_id = hashlib.sha256(body).hexdigest()
        self.sent.append(model_id)
        if self.errors:
            raise self.errors.pop(0)
        parse_published(body, model_id)
        self.kept[model_id] = body
        return {"model_id": model_id, "new": True}


async def ticks(world: ProviderWorld) -> None:
    """So many heartbeats that the announcer has had its turn between them."""
    until = len(world.heartbeats) + 8
    await world.until(lambda: len(world.heartbeats) > until, "more heartbeats")


async def test_what_the_network_lacks_is_sent_once_and_is_what_is_served(
    world: ProviderWorld,
) -> None:
    shelf = Shelf(world)
    file = ProviderFile(world, model())
    async with world.agent(**file.settings):
        await world.until(lambda: shelf.kept, "published")
        assert shelf.kept == {SKILLS.model_id: SKILLS.to_canonical()}
        assert world.offers[-1].models[0].model_id == SKILLS.model_id
        file.write(model(), model("dear"))
        assert (await file.post("/reload")).status_code == 200
        await world.until(lambda: len(shelf.kept) == 2, "the new one published")
    assert shelf.sent == list(shelf.kept)  # each once, though the offer was published twice


async def test_a_network_that_asks_for_none_gets_none(world: ProviderWorld) -> None:
    shelf = Shelf(world)
    shelf.kept[SKILLS.model_id] = b"another provider sent it"
    async with world.agent():
        answer = await world.ask()
        assert answer.receipt.output_tokens > 0
        await ticks(world)
    assert shelf.sent == []


@pytest.mark.parametrize(
    ("error", "times"), [(Unavailable("try again"), 2), (Forbidden("no", code="x"), 1)]
)
async def test_what_is_not_taken_is_tried_again_if_that_may_help_and_costs_no_job(
    world: ProviderWorld, monkeypatch: pytest.MonkeyPatch, error: CocoonError, times: int
) -> None:
    monkeypatch.setattr(publishing, "RETRY_S", 0.05)
    shelf = Shelf(world)
    shelf.errors = [error]
    async with world.agent():
        await world.until(lambda: len(shelf.sent) == times, "sent")
        answer = await world.ask()
        assert answer.receipt.output_tokens > 0
        await ticks(world)
    assert (len(shelf.sent), len(shelf.kept)) == (times, times - 1)


async def test_a_manifest_that_is_too_long_is_not_sent_and_the_model_is_served(
    world: ProviderWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "MAX_PUBLISHED_BYTES", 100)
    shelf = Shelf(world)
    async with world.agent():
        answer = await world.ask()
        assert answer.receipt.output_tokens > 0
        await ticks(world)
    assert shelf.sent == []
