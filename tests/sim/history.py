"""Runs one history and says how it went: its hash, its first violation, its last steps, counts."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter, deque
from dataclasses import dataclass, field

from tests.sim.edges import simulated, wall_s
from tests.sim.loop import START_S
from tests.sim.watch import Watch
from tests.sim.world import DRAIN_S, World

REMEMBERED = 30
REST_S = 30.0  # simulated, after which a service's memory holds nothing of ended jobs


@dataclass
class Outcome:
    """What one seed gave. `steps` were run under faults, `drain_steps` after they stopped."""

    seed: int
    steps: int = 0
    drain_steps: int = 0
    violations: list[str] = field(default_factory=list)
    at_step: int = 0  # of the first violation
    last_steps: list[str] = field(default_factory=list)
    digest: str = ""
    faults: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)  # steps by what caused them
    jobs: Counter[str] = field(default_factory=Counter)  # by their last event
    answers: Counter[str] = field(default_factory=Counter)  # what clients got
    events: int = 0
    appends: int = 0
    messages: int = 0
    looks: int = 0
    simulated_s: float = 0.0
    wall_s: float = 0.0


def run_history(seed: int, steps: int) -> Outcome:
    """Run `steps` steps under faults, then drain; stop at the first violation."""
    began_s = wall_s()
    world = World(seed)
    outcome = Outcome(seed)
    running = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    asyncio._set_running_loop(world.loop)
    collecting = gc.isenabled()
    gc.disable()  # a history is small and ends soon; its garbage goes with it
    try:
        with simulated(world.loop):
            try:
                _run(world, steps, outcome)
            finally:
                world.close()
    finally:
        asyncio._set_running_loop(running)
        if collecting:
            gc.enable()
    outcome.wall_s = wall_s() - began_s
    return outcome


def _run(world: World, steps: int, outcome: Outcome) -> None:
    watch = Watch(world)
    remembered: deque[str] = deque(maxlen=REMEMBERED)
    world.begin()
    world.loop.drain()
    while outcome.steps < steps and not outcome.violations:
        outcome.steps += 1
        _step(world, watch, outcome, remembered)
    if not outcome.violations:
        world.stop_faults()
        until_s = world.loop.now_s + DRAIN_S
        while not outcome.violations and world.loop.now_s < until_s:
            outcome.drain_steps += 1
            _step(world, watch, outcome, remembered)
            if outcome.drain_steps % 64 == 0 and world.is_quiet():
                break
    if not outcome.violations:
        outcome.violations = watch.at_everything(quiet=True)
        outcome.at_step = outcome.steps + outcome.drain_steps
        if not outcome.violations and not world.is_quiet():
            outcome.violations = [f"liveness: {world.unquiet()} after {DRAIN_S:.0f} s of calm"]
        elif not outcome.violations:
            outcome.violations = _after_rest(world, watch, outcome)
    outcome.last_steps = list(remembered)
    _count(world, watch, outcome)


def _after_rest(world: World, watch: Watch, outcome: Outcome) -> list[str]:
    """What memories still hold, a little after nothing is under way any more."""
    until_s = world.loop.now_s + REST_S
    while world.loop.now_s < until_s and world.remaining():
        world.loop.step()
        outcome.drain_steps += 1
        if said := watch.after_step():
            return said
    return [f"leak: {left}" for left in world.remaining()]


def _step(world: World, watch: Watch, outcome: Outcome, remembered: deque[str]) -> None:
    label = world.loop.step()
    head = len(world.database.logs[1].events)
    remembered.append(f"{world.loop.now_s - START_S:9.4f} s  {label}  (log at {head})")
    said = watch.after_step()
    said += [f"a task of the services broke: {error}" for error in world.loop.errors]
    if said:
        outcome.violations, outcome.at_step = said, outcome.steps + outcome.drain_steps


def _count(world: World, watch: Watch, outcome: Outcome) -> None:
    log = world.database.logs[1]
    ends: dict[str, str] = {}
    for stored in log.events:
        if stored.stream.startswith("job/") and stored.type != "ResultRejected":
            ends[stored.stream] = stored.type
    outcome.jobs = Counter(ends.values())
    outcome.faults, outcome.kinds = world.faults.counts, world.loop.steps
    outcome.answers = Counter(world.clients.outcomes)
    outcome.events = len(log.events) + len(world.database.logs[0].events)
    outcome.appends, outcome.messages = world.database.appends, world.bus.messages
    outcome.looks = watch.looks
    outcome.simulated_s = world.loop.now_s - START_S
    outcome.digest = world.digest()
