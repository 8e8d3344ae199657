"""Another policy on the same snapshots: nothing moves under the same one, and the sums are true."""

from __future__ import annotations

from cocoon.contracts.matching import BALANCED
from cocoon.domain.backtest import Backtest
from tests.support.job_world import ALICE, BOB, QUOTE, hex32, request_command

CHEAP = QUOTE.model_copy(update={"output_nanoton_per_mtok": 1_000_000})
POOL = (
    ALICE.candidate(quote=CHEAP, first_token_us=90_000, ended_jobs=1000),
    BOB.candidate(first_token_us=30_000, ended_jobs=1000),
)
BY_PRICE = BALANCED.model_copy(
    update={"name": "by-price", "speed_weight": 0, "price_weight": 1000, "success_weight": 0}
)


def fifty(policy: object) -> Backtest:
    found = Backtest(policy)  # type: ignore[arg-type]
    for number in range(50):
        found.take(
            request_command(
                f"job{number}", candidates=POOL, seed=hex32(f"seed {number}"), policy=BALANCED
            )
        )
    return found


def test_under_the_same_policy_nothing_moves() -> None:
    found = fifty(BALANCED)
    assert (found.decisions, found.moved) == (50, 0)
    assert found.then == found.other
    assert found.then.jobs == {BOB.id: 50}


def test_another_policy_s_choices_are_counted_and_priced() -> None:
    found = fifty(BY_PRICE)
    assert found.moved == 50
    assert found.other.jobs == {ALICE.id: 50}
    assert (found.then.nanoton, found.other.nanoton) == (50 * 5000, 50 * 2000)
    assert (found.then.wait_us, found.other.wait_us) == (50 * 15_000, 50 * 45_000)


def test_who_nobody_could_serve_is_counted_apart() -> None:
    found = Backtest(BALANCED)
    found.take(request_command(candidates=(ALICE.candidate(alive=False),), policy=BALANCED))
    assert (found.then.unmatched, found.other.unmatched, found.moved) == (1, 1, 0)
