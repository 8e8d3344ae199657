"""How an agent stands, from what it hears: the first reason stays, a better one replaces it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoon.agent.dropped import BARRED, sentence
from cocoon.evidence.codes import REJECTIONS
from cocoon.kernel.clock import SystemClock
from cocoon.kernel.errors import EvidenceRejected
from services.provider.announcing import Announcer, Identity
from services.provider.standing import Standing

REASONS = ["banned", "canary", "expired", "evidence_missing", "not_attested", "open_tier_full"]


@pytest.mark.parametrize(
    ("heard", "kept"),
    [
        (("not_attested", "model_denied"), "model_denied"),
        (("model_denied", "not_attested"), "model_denied"),
        (("canary", "banned"), "canary"),
        (("banned", "canary"), "canary"),
        (("expired", "banned"), "banned"),
    ],
)
def test_of_two_reasons_the_one_that_says_more_is_told(heard: tuple[str, str], kept: str) -> None:
    standing = Standing()
    for at_ms, reason in enumerate(heard):
        standing.dropped(reason, at_ms)
    told = standing.told(0)["revoked"]
    assert (told["reason"], told["message"]) == (kept, sentence(kept))


@pytest.mark.parametrize("code", sorted(BARRED))
def test_a_refusal_that_new_evidence_cannot_cure_bars_until_evidence_is_taken(code: str) -> None:
    standing = Standing()
    standing.attested(10, "attested")
    standing.refused(EvidenceRejected("no", code=code), 1)
    assert (standing.barred, standing.revoked) == (True, True)
    assert not standing.told(2)["attested"]
    standing.attested(10, "attested")
    assert (standing.barred, standing.revoked) == (False, False)
    assert standing.told(2)["attested"]


def test_any_other_refusal_leaves_what_stands() -> None:
    standing = Standing()
    standing.attested(10, "attested")
    standing.refused(EvidenceRejected("no", code="model_denied"), 1)
    assert (standing.barred, standing.revoked) == (False, False)


@pytest.mark.parametrize("reason", [*REASONS, *REJECTIONS])
def test_each_reason_of_the_network_has_its_own_words(reason: str) -> None:
    assert sentence(reason) != sentence("nobody knows this one")


@given(st.lists(st.sampled_from([*REASONS, *REJECTIONS]), min_size=1))
def test_the_same_reason_is_news_once_and_what_is_told_ends_with_the_last_news(
    heard: list[str],
) -> None:
    standing, news = Standing(), []
    for reason in heard:
        if standing.dropped(reason, 0):
            news.append(reason)
        assert not standing.dropped(reason, 1)
    assert standing.told(0)["revoked"]["reason"] == news[-1]


async def test_while_barred_nothing_is_announced_however_much_is_due() -> None:
    asked: list[str] = []

    async def make(_now_ms: int) -> None:
        asked.append("a key")
        raise EvidenceRejected("no", code="banned")

    epochs = SimpleNamespace(prune=lambda _now_ms: None, make=make)
    announcer = Announcer(
        cast("Any", None), Identity("prov_1", bytes(32)),
        cast("Any", SimpleNamespace(wanted=(SimpleNamespace(model_id="m"),))),
        cast("Any", SimpleNamespace(epochs=epochs)), cast("Any", None), SystemClock(),
        evidence_ms=1, renew_ms=1, tick_s=1.0,
    )  # fmt: skip
    announcer.standing.barred = True
    await announcer.tick()
    assert asked == []
    announcer.prove_again()
    with pytest.raises(EvidenceRejected):
        await announcer.tick()
    assert asked == ["a key"]
