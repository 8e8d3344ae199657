"""The queue in front of an engine: order, bounds, leaving it, cold starts and their checks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.kernel.errors import ConfigurationError, Unavailable
from services.provider.queueing import Engine


class Made:
    """Engines as they are made: a real life, and no answers."""

    def __init__(self) -> None:
        self.all: list[Made.One] = []
        self.broken = False

    class One:
        context_tokens = 64

        def __init__(self, made: Made) -> None:
            self.made, self.started, self.closed = made, 0, 0

        async def start(self) -> None:
            await asyncio.sleep(0)
            if self.made.broken:
                raise Unavailable("names the server's address")
            self.started += 1

        async def close(self) -> None:
            self.closed += 1

    def __call__(self) -> Any:
        self.all.append(Made.One(self))
        return self.all[-1]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@settings(deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.sampled_from(["come", "end", "leave", "wider", "narrower"]), max_size=40),
    st.data(),
)
def test_the_engine_never_has_more_than_its_places_and_serves_in_order(
    places: int, moves: list[str], data: st.DataObject
) -> None:
    async def play() -> None:
        engine = Engine(Made(), places)
        await engine.start()
        ends: dict[int, asyncio.Event] = {}
        tasks: dict[int, asyncio.Task[None]] = {}
        served: list[int] = []
        gone: set[int] = set()
        most = places

        async def job(number: int) -> None:
            async with engine.place():
                served.append(number)
                await ends[number].wait()

        for move in moves:
            inside = [n for n in served if n in tasks and not ends[n].is_set() and n not in gone]
            match move:
                case "come":
                    number = len(ends)
                    ends[number] = asyncio.Event()
                    tasks[number] = asyncio.create_task(job(number))
                case "end" if inside:
                    ends[data.draw(st.sampled_from(inside))].set()
                case "leave" if tasks:
                    number = data.draw(st.sampled_from(sorted(tasks)))
                    tasks[number].cancel()
                    gone.add(number)
                case "wider":
                    engine.concurrency += 1
                case "narrower" if engine.concurrency > 1:
                    engine.concurrency -= 1
            most = max(most, engine.concurrency)
            assert engine.running <= most
            await settle()
            alive = [n for n, task in tasks.items() if not task.done()]
            assert engine.running + engine.waiting == len(alive)
            if engine.waiting:
                assert engine.running >= engine.concurrency, "a place is free and somebody waits"
        for event in ends.values():
            event.set()
        await settle()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert served == sorted(served)
        assert set(served) | gone == set(ends)
        assert (engine.running, engine.waiting) == (0, 0)

    asyncio.run(play())


async def test_a_turn_that_comes_with_the_cancellation_is_given_on() -> None:
    engine = Engine(Made(), 1)
    await engine.start()
    served: list[str] = []

    async def job(name: str, hold: asyncio.Event) -> None:
        async with engine.place():
            served.append(name)
            await hold.wait()

    holds = {name: asyncio.Event() for name in "abc"}
    tasks = {}
    for name, hold in holds.items():
        tasks[name] = asyncio.create_task(job(name, hold))
        await settle()
    holds["a"].set()
    await asyncio.sleep(0)  # the place goes to b, which has not run yet
    tasks["b"].cancel()
    await settle()
    assert served == ["a", "c"]
    holds["c"].set()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert engine.running == 0


async def test_a_cold_engine_starts_once_for_all_that_wait_and_is_checked_first() -> None:
    checks: list[int] = []
    made = Made()
    engine = Engine(made, 2, lambda: checks.append(1), checked=False)

    async def job() -> None:
        async with engine.place():
            pass

    await asyncio.gather(*(job() for _ in range(5)))
    assert (made.all[0].started, len(checks), engine.up) == (1, 1, True)
    assert await engine.stop_if_idle()
    assert (made.all[0].closed, engine.up) == (1, False)
    await job()
    assert (made.all[1].started, len(checks)) == (1, 2)


async def test_a_warm_engine_whose_files_were_just_hashed_is_not_hashed_twice() -> None:
    checks: list[int] = []
    engine = Engine(Made(), 2, lambda: checks.append(1), checked=True)
    await engine.start()
    assert checks == []


async def test_files_that_changed_while_the_engine_was_cold_serve_nobody() -> None:
    def changed() -> None:
        raise ConfigurationError("'model.onnx' has other content")

    made = Made()
    engine = Engine(made, 1, changed, checked=False)
    with pytest.raises(Unavailable, match="does not start"):  # the client is told no path
        async with engine.place():
            pass
    assert (made.all[0].started, engine.up, engine.waiting) == (0, False, 0)


async def test_a_start_goes_on_when_the_job_that_asked_for_it_has_left() -> None:
    made = Made()
    engine = Engine(made, 1)

    async def job() -> None:
        async with engine.place():
            pass

    leaving = asyncio.create_task(job())
    await asyncio.sleep(0)
    leaving.cancel()
    await settle()
    assert leaving.cancelled()
    assert (engine.up, made.all[0].started, engine.waiting) == (True, 1, 0)


async def test_a_start_that_fails_is_tried_again_on_an_engine_made_anew() -> None:
    made = Made()
    made.broken = True
    engine = Engine(made, 1)
    with pytest.raises(Unavailable):
        await engine.start()
    assert made.all[0].closed == 1
    made.broken = False
    async with engine.place():
        assert engine.backend is made.all[1]
        assert not await engine.stop_if_idle()
