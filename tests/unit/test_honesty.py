"""Canaries: distances, one judgement, and the sequential test that follows from many."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoon.contracts.commands import JudgeCanary, LiftHonesty, decode_command
from cocoon.contracts.events import CanaryJudged, HonestyDecided
from cocoon.domain import comparing, decide, honesty
from cocoon.domain.comparing import Token, Told
from cocoon.domain.honesty import HonestyState, make_rule
from cocoon.kernel.errors import BadRequest

PROVIDER, MODEL = "prov_" + "ab" * 16, "11" * 32
RULE = make_rule(
    tolerance_bps=1000, honest_ppm=10_000, cheating_ppm=100_000, false_alarm_ppm=100,
    miss_ppm=10_000,
)  # fmt: skip
texts = st.text(max_size=40)
shares = st.integers(1, 400_000)


def judgement(outcome: str, job: int = 0, model: str = MODEL, **changes: object) -> JudgeCanary:
    fields = {"provider_id": PROVIDER, "model_id": model, "job_id": f"{job:032x}",
              "outcome": outcome, "distance_bps": 0, "rule": RULE, **changes}  # fmt: skip
    return JudgeCanary(**fields)


def told(text: str, tokens: int | None = None, detail: tuple[Token, ...] = ()) -> Told:
    return Told(text, len(text.split()) if tokens is None else tokens, detail)


def after_canaries(
    outcomes: str, state: HonestyState | None = None
) -> tuple[HonestyState, list[str]]:
    """The state after so many canaries (p, d, u), and the verdicts on the way."""
    state, verdicts = state or HonestyState(), []
    words = {"p": "passed", "d": "differed", "u": "unclear"}
    for job, letter in enumerate(outcomes):
        for event in honesty.decide_judge_canary(state, judgement(words[letter], job)):
            state = honesty.evolve(state, event)
            if isinstance(event, HonestyDecided):
                verdicts.append(event.verdict)
    return state, verdicts


# ---- distances ----


@given(texts, texts)
def test_a_distance_is_symmetric_bounded_and_zero_only_for_the_same(one: str, two: str) -> None:
    apart = comparing.text_distance_bps(one, two)
    assert apart == comparing.text_distance_bps(two, one)
    assert 0 <= apart <= 10_000
    assert (apart == 0) == (one == two)


@given(texts, texts, texts)
def test_the_edit_distance_keeps_the_triangle(one: str, two: str, three: str) -> None:
    far = comparing.edit_distance(one, three)
    assert far <= comparing.edit_distance(one, two) + comparing.edit_distance(two, three)


@given(texts.filter(bool), st.data())
def test_one_changed_character_is_one_edit(text: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + chr((ord(text[at]) + 1) % 0xD800) + text[at + 1 :]
    assert comparing.edit_distance(text, changed) == 1


def test_long_texts_are_compared_by_words() -> None:
    words = [f"word{n}" for n in range(300)]
    other = [*words[:150], "else", *words[151:]]
    assert comparing.text_distance_bps(" ".join(words), " ".join(other)) == 10_000 // 300
    assert comparing.text_distance_bps(" " * 500, " " * 501) == 10_000


vectors = st.lists(st.floats(-100, 100).filter(lambda x: abs(x) > 1e-3), min_size=2, max_size=8)


@given(vectors, st.floats(0.01, 100))
def test_an_embedding_s_length_says_nothing_and_its_direction_all(
    vector: list[float], scale: float
) -> None:
    assert comparing.compare_embeddings(vector, [scale * x for x in vector]) == 0
    assert comparing.compare_embeddings(vector, [-x for x in vector]) == 10_000
    assert comparing.compare_embeddings(vector, [*vector, 1.0]) == 10_000
    assert comparing.compare_embeddings([0.0] * len(vector), vector) == 10_000


def test_logprobs_are_compared_over_the_shared_beginning() -> None:
    one = (Token("a", -0.1), Token("b", -0.2), Token("c", -3.0))
    two = (Token("a", -0.1), Token("b", -0.7), Token("x", -0.1))
    assert comparing.compare_logprobs(one, one) == 0
    assert comparing.compare_logprobs(one, two) == 2500
    assert comparing.compare_logprobs(one, (Token("z", -0.1),)) is None


# ---- one canary ----


@pytest.mark.parametrize(
    ("reference", "given_told", "outcome", "why"),
    [
        (told("blue green"), told("blue green"), "passed", "text"),
        (told("x" * 100), told("x" * 91 + "y" * 9), "passed", "text"),
        (told("x" * 100), told("x" * 89 + "y" * 11), "differed", "text"),
        (told("blue"), told("red"), "differed", "text"),
        (told("blue"), told(""), "differed", "text"),
        (told(""), told("blue"), "unclear", "nothing_said"),
        (told("same words", 100), told("same words", 100 + 12 + 8), "passed", "text"),
        (told("same words", 100), told("same words", 100 + 12 + 9), "differed", "counts"),
        (told("same words", 100), told("same words", 1), "passed", "text"),
    ],
)
def test_a_canary_is_judged_by_text_and_counts(
    reference: Told, given_told: Told, outcome: str, why: str
) -> None:
    found = comparing.judge(reference, given_told, 1000)
    assert (found.outcome, found.why) == (outcome, why)


@pytest.mark.parametrize(
    ("rival", "outcome"),
    [((" red", -0.75), "unclear"), ((" red", -0.85), "differed"), ((" teal", -0.7), "differed"),
     (("", -0.7), "differed")],
)  # fmt: skip
def test_a_near_tie_of_the_reference_is_unclear(rival: tuple[str, float], outcome: str) -> None:
    detail = (Token("sky", -0.1), Token(" blue", -0.7, ((" blue", -0.7), rival)))
    reference = told("sky blue and wide", detail=detail)
    assert comparing.judge(reference, told("sky red it seems to me"), 1000).outcome == outcome


def test_no_content_is_in_a_repr() -> None:
    secret = told("purple", detail=(Token("purple", -0.1, (("wombat", -0.2),)),))
    assert "purple" not in repr(secret)
    assert "wombat" not in repr(secret)


# ---- the test ----


@given(shares, shares, st.integers(1, 100_000), st.integers(1, 100_000))
def test_a_rule_is_made_for_any_two_shares_in_order(
    one: int, two: int, alarm: int, miss: int
) -> None:
    honest, cheating = sorted((one, two))
    fields = {"tolerance_bps": 0, "false_alarm_ppm": alarm, "miss_ppm": miss}
    if honest == cheating:
        with pytest.raises(BadRequest):
            make_rule(honest_ppm=honest, cheating_ppm=cheating, **fields)
        return
    rule = make_rule(honest_ppm=honest, cheating_ppm=cheating, **fields)
    assert rule.differ_unats > 0
    assert rule.pass_unats > 0
    assert rule.dishonest_at_unats > 0
    assert rule.honest_at_unats > 0


@given(st.text("pdu", max_size=200))
def test_every_canary_counts_once_and_a_verdict_begins_anew(outcomes: str) -> None:
    state, verdicts = after_canaries(outcomes)
    test = state.test(MODEL)
    if test is not None:
        assert -RULE.honest_at_unats < test.score_unats < RULE.dishonest_at_unats
        assert test.judged + test.unclear <= len(outcomes)
        passed = test.judged - test.differed
        assert test.score_unats == test.differed * RULE.differ_unats - passed * RULE.pass_unats
    assert verdicts.count("dishonest") == len(state.dishonest) <= 1


@given(st.text("pdu", max_size=60), st.text("pdu", max_size=60))
def test_other_models_do_not_matter(own: str, others: str) -> None:
    state = HonestyState()
    for job, letter in enumerate(others):
        outcome = {"p": "passed", "d": "differed", "u": "unclear"}[letter]
        for event in honesty.decide_judge_canary(state, judgement(outcome, job, "22" * 32)):
            state = honesty.evolve(state, event)
    alone, verdicts = after_canaries(own)
    beside, same = after_canaries(own, state)
    assert (alone.test(MODEL), verdicts) == (beside.test(MODEL), same)


def test_four_that_differ_are_found_and_forty_nine_that_pass_are_honest() -> None:
    assert after_canaries("ddd")[1] == []
    assert after_canaries("dddd")[1] == ["dishonest"]
    assert after_canaries("p" * 48)[1] == []
    assert after_canaries("p" * 49)[1] == ["honest"]


def test_who_was_found_is_tested_no_more_until_it_is_lifted() -> None:
    state, _ = after_canaries("dddd")
    assert state.dishonest == (MODEL,)
    assert honesty.decide_judge_canary(state, judgement("passed", 9)) == ()
    (lifted,) = honesty.decide_lift_honesty(state, LiftHonesty(provider_id=PROVIDER))
    state = honesty.evolve(state, lifted)
    assert (state.dishonest, state.tests) == ((), ())
    assert honesty.decide_lift_honesty(state, LiftHonesty(provider_id=PROVIDER)) == ()
    assert len(honesty.decide_judge_canary(state, judgement("passed", 10))) == 1


def test_another_rule_begins_another_test() -> None:
    state, _ = after_canaries("ddd")
    other = RULE.model_copy(update={"tolerance_bps": 500})
    (event,) = honesty.decide_judge_canary(state, judgement("differed", 9, rule=other))
    test = honesty.evolve(state, event).test(MODEL)
    assert test is not None
    assert (test.rule, test.judged) == (other, 1)


def test_false_alarms_and_misses_keep_to_the_rule() -> None:
    draw = random.Random(7)  # noqa: S311

    def verdict(share: float) -> str:
        state = HonestyState()
        for job in range(2000):
            outcome = "differed" if draw.random() < share else "passed"
            for event in honesty.decide_judge_canary(state, judgement(outcome, job)):
                state = honesty.evolve(state, event)
                if isinstance(event, HonestyDecided):
                    return event.verdict
        return "open"

    assert [verdict(0.01) for _ in range(300)].count("dishonest") == 0
    assert [verdict(0.1) for _ in range(300)].count("dishonest") >= 290


@given(st.text("pdu", max_size=80))
def test_the_log_replays_the_same(outcomes: str) -> None:
    stream, state, replayed = f"honesty/{PROVIDER}", HonestyState(), decide.initial("honesty/x")
    words = {"p": "passed", "d": "differed", "u": "unclear"}
    for job, letter in enumerate(outcomes):
        command = judgement(words[letter], job)
        assert decide.stream_of(command) == stream
        events = honesty.decide_judge_canary(state, command)
        assert decide.decide(replayed, decode_command(command.to_stored())) == events
        for event in events:
            state = honesty.evolve(state, event)
            replayed = decide.evolve(replayed, event, stream)
    assert replayed == state


def test_calibration_takes_the_ninth_tenth_and_an_upper_bound() -> None:
    assert honesty.calibrate([0] * 20) == (100, 3 * 1_000_000 // 23)
    assert honesty.calibrate([0] * 18 + [700, 9000]) == (100, 5 * 1_000_000 // 23)
    assert honesty.calibrate([0] * 17 + [400, 700, 9000]) == (500, 5 * 1_000_000 // 23)
    with pytest.raises(BadRequest):
        honesty.calibrate([0] * 19)


def test_a_judgement_s_event_is_the_command_s() -> None:
    command = judgement("differed", 3, distance_bps=77)
    (event,) = honesty.decide_judge_canary(HonestyState(), command)
    assert event == CanaryJudged(**command.model_dump())
