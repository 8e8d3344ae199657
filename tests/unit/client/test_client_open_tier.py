"""Which candidates a request is sealed to where some have no TEE; how a caller names the tier."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoon.client.choice import HOW_TO_ASK, Candidate, choose, with_assurance
from cocoon.client.session import Preferences as Accepted
from cocoon.client.wishes import split_wishes, with_tiers
from cocoon.contracts.matching import Preferences
from cocoon.evidence.verdict import Assurance
from cocoon.kernel.errors import BadRequest, EvidenceRejected
from tests.support.sealing_world import Counted
from tests.support.sentences import says_why
from tests.unit.client.test_client_bounds_and_choice import candidate, draw

LIMIT = 10**9
PROTECTED = [Assurance.FACILITY, Assurance.ATTESTED, Assurance.SIMULATED]


def unprotected(name: str, **more: Any) -> Candidate:
    return candidate(name, assurance=Assurance.OPEN, **more)


def drawn(candidates: list[Candidate], seed: int = 0, **more: Any) -> set[str]:
    return set(draw(candidates, str(seed), open_job_nanoton=LIMIT, **more))


# ---- who may be sealed to at all ----


@pytest.mark.parametrize("tiers", [(), ("attested",), ("attested", "simulated", "facility")])
def test_open_is_accepted_only_where_somebody_named_it(tiers: tuple[Any, ...]) -> None:
    wishes = Preferences(tiers=tiers)
    for told in (None, wishes):
        assert Assurance.OPEN not in Accepted(PROTECTED, open_on_request=True).accepted(told)
        assert Assurance.OPEN in Accepted([Assurance.OPEN]).accepted(told)
    asked = Preferences(tiers=(*tiers, "open"))
    assert Assurance.OPEN in Accepted(PROTECTED, open_on_request=True).accepted(asked)
    assert Assurance.OPEN not in Accepted(PROTECTED).accepted(asked)


def test_who_is_refused_for_the_tier_learns_how_to_ask_for_it() -> None:
    with pytest.raises(EvidenceRejected, check=says_why) as refused:
        with_assurance([unprotected("o")], PROTECTED)
    assert refused.value.message.endswith(HOW_TO_ASK)
    with pytest.raises(EvidenceRejected) as other:
        with_assurance([candidate("s", assurance=Assurance.SIMULATED)], [Assurance.ATTESTED])
    assert HOW_TO_ASK not in other.value.message


# ---- who is sealed to of those ----

KNOWN = st.builds(
    lambda number, tier, running, price: candidate(
        f"p{number}", assurance=tier, running=running, price=price
    ),
    st.integers(0, 99), st.sampled_from(Assurance), st.integers(0, 5),
    st.sampled_from([1, 1000, 1_000_000]),
)  # fmt: skip


@given(
    st.lists(KNOWN, min_size=1, max_size=8, unique_by=lambda one: one.provider_id),
    st.sampled_from(["", "ab" * 16]),
    st.integers(0, 1000),
)
def test_an_open_one_is_chosen_only_where_no_other_has_a_free_place(
    pool: list[Candidate], affinity: str, seed: int
) -> None:
    chosen = choose(
        pool, max_input_tokens=100, max_output_tokens=100, max_price_nanoton=None,
        randomness=Counted(str(seed)), affinity=affinity, open_job_nanoton=LIMIT,
    )  # fmt: skip
    assert chosen
    free = [c for c in pool if c.assurance is not Assurance.OPEN and c.running < c.concurrency]
    if free:
        assert all(c.assurance is not Assurance.OPEN for c in chosen)


def test_a_name_or_a_sorting_of_the_caller_s_own_comes_before_the_tier() -> None:
    pool = [candidate("a"), unprotected("o"), unprotected("u", price=1)]
    assert drawn(pool) == {"a"}
    assert drawn(pool, wishes=Preferences(order=("o",))) == {"a", "o"}
    assert draw(pool, open_job_nanoton=LIMIT, wishes=Preferences(order=("o",)))[0] == "o"
    assert drawn(pool, wishes=Preferences(only=("a", "o"))) == {"a"}
    for sort in ("price", "latency", "throughput"):
        assert drawn(pool, wishes=Preferences(sort=sort)) == {"a", "o", "u"}
    assert draw(pool, open_job_nanoton=LIMIT, wishes=Preferences(sort="price"))[0] == "u"


@pytest.mark.parametrize(("limit", "fits"), [(200, True), (199, False), (None, False)])
def test_a_job_over_the_policy_s_limit_goes_to_no_open_one(limit: int | None, fits: bool) -> None:
    assert draw([candidate("a"), unprotected("o")], open_job_nanoton=limit) == ["a"]
    if fits:
        assert draw([unprotected("o")], open_job_nanoton=limit) == ["o"]
        return
    with pytest.raises(BadRequest, check=says_why) as refused:
        draw([unprotected("o")], open_job_nanoton=limit)
    assert refused.value.code == "open_tier_limit"


# ---- the header ----

BODY = b'{"model": "m", "messages": []}'


def test_a_header_names_the_tiers_as_the_body_would() -> None:
    assert with_tiers(BODY, None) == BODY
    body, wishes = split_wishes(with_tiers(BODY, "open, attested"))
    assert json.loads(body) == json.loads(BODY)
    assert wishes == Preferences(tiers=("open", "attested"))
    kept = with_tiers(BODY[:-1] + b', "provider": {"sort": "price"}}', "open")
    assert split_wishes(kept)[1] == Preferences(tiers=("open",), sort="price")
    null = with_tiers(BODY[:-1] + b', "provider": null}', "open")
    assert split_wishes(null)[1] == Preferences(tiers=("open",))


@pytest.mark.parametrize(
    "body",
    [
        BODY[:-1] + b', "provider": {"tiers": ["attested"]}}',
        BODY[:-1] + b', "provider": {"tiers": []}}',
        BODY[:-1] + b', "provider": [1]}',
        b"[]", b"{", b"\xff",
    ],
)  # fmt: skip
def test_a_body_that_says_it_itself_or_is_no_object_stays(body: bytes) -> None:
    assert with_tiers(body, "open") == body


@pytest.mark.parametrize("header", ["", "free", "open;attested", "OPEN", "open,", "open,,facility"])
def test_a_header_that_is_no_list_of_tiers_is_refused_by_its_name(header: str) -> None:
    with pytest.raises(BadRequest, check=says_why) as refused:
        with_tiers(BODY, header)
    assert refused.value.param == "x-cocoon-tiers"
