"""The published detection figures come from a function of the seed that uses the product's test."""

from __future__ import annotations

from benchmarks import honesty


def test_the_same_seed_gives_the_same_figures() -> None:
    cheat = honesty.swapping(0.2, 0.95)
    assert honesty.detection(cheat, [0.01], 20, 1) == honesty.detection(cheat, [0.01], 20, 1)
    assert honesty.detection(cheat, [0.01], 20, 1) != honesty.detection(cheat, [0.01], 20, 2)


def test_the_more_it_cheats_the_sooner_it_is_found() -> None:
    found = [honesty.detection(honesty.swapping(f, 0.95), [0.01], 60, 1) for f in (1, 0.5, 0.2)]
    assert all(one.share_found == 1 for one in found)
    jobs = [one.jobs[0][0] for one in found]
    assert jobs == sorted(jobs)
    assert found[0].median_canaries in (4, 5)


def test_a_tenth_of_the_canaries_takes_ten_times_the_jobs() -> None:
    ((often, _), (seldom, _)) = honesty.detection(
        honesty.swapping(0.5, 0.95), [0.01, 0.001], 60, 1
    ).jobs
    assert 5 < seldom / often < 20


def test_an_inflation_within_the_tolerance_is_never_found() -> None:
    assert honesty.detection(honesty.inflating(0.1), [0.01], 2, 1).share_found == 0
    assert honesty.detection(honesty.inflating(0.5), [0.01], 20, 1).share_found == 1


def test_an_honest_provider_is_seldom_accused() -> None:
    assert honesty.false_alarms(0.001, [1000], 60, 1) == [0]
    assert honesty.false_alarms(0.3, [2, 1000], 20, 1) == [0, 1]
