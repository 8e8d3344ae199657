"""What befalls the simulated network: kills, pauses, zombies, outages, partitions, wrong clocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.sim.loop import Process
from tests.sim.providers import Agent

if TYPE_CHECKING:
    from tests.sim.world import World

RESTART_S = (0.2, 3.0)


class Troubles:
    """One occasion after the other until the drain."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._postgres_rests_until_s = 0.0

    def befall(self) -> None:
        """One occasion for each kind of trouble, then the next occasion."""
        world = self._world
        if world.draining:
            return
        world.loop.at(world.random.uniform(0.1, 1.0), "fault", self.befall)
        for kind, cause in (
            ("kill", self._kill_somebody), ("freeze", self._freeze_somebody),
            ("zombie", self._make_zombie), ("postgres_restart", self._restart_postgres),
            ("bus_outage", self._cut_bus), ("bus_wipe", world.bus.wipe),
            ("partition", self._cut_somebody_off), ("clock_step", self._step_a_clock),
            ("revocation", self._revoke_somebody),
        ):  # fmt: skip
            if world.faults.happens(kind, 4):
                cause()

    def _kill_somebody(self) -> None:
        world = self._world
        names = [*world.services, *world.agents]
        victim = world.random.choice(names)
        delay_s = world.random.uniform(*RESTART_S)
        if isinstance(victim, Agent):
            self._kill_agent(victim, delay_s * 2)
            return
        process = world.services[victim]
        if not process.alive:
            return
        world.kill(process)
        if victim in world.doors:
            world.clients.reset(world.doors[victim])
        world.loop.at(delay_s, "restart", world.restart, victim, process)

    def _kill_agent(self, agent: Agent, delay_s: float) -> None:
        world = self._world
        process = world.processes[agent]
        if process.alive:
            world.kill(process)
            world.loop.at(delay_s, "restart", world.restart_agent, agent, process)

    def _somebody(self) -> Process:
        world = self._world
        everybody = [*world.services.values(), *(world.processes[agent] for agent in world.agents)]
        return world.random.choice(everybody)

    def _freeze_somebody(self) -> None:
        """A pause of the machine: nobody takes its place."""
        world = self._world
        process = self._somebody()
        if process.alive and not process.frozen:
            process.frozen = True
            world.loop.at(world.random.uniform(0.1, 4.0), "thaw", world.loop.thaw, process)

    def _make_zombie(self) -> None:
        """The owner of the shard stands still, another takes over, and then the first wakes up."""
        world = self._world
        name = world.random.choice(("matcher", "billing"))
        process = world.services[name]
        if not process.alive or process.frozen:
            return
        if world.random.random() < 0.7:
            process.frozen = True
            world.loop.at(world.random.uniform(0.5, 15.0), "thaw", world.loop.thaw, process)
        world.loop.at(world.random.uniform(0.0, 2.0), "restart", world.restart, name, process)

    def _restart_postgres(self) -> None:
        """Away for two seconds at most, with a pause: an append may be repeated all that time, and
        invariant 7 compares when a match was committed with when its provider was revoked.
        """
        world = self._world
        if world.database.down or world.loop.now_s < self._postgres_rests_until_s:
            return
        world.database.down = True
        world.database.restart()
        away_s = world.random.uniform(0.1, 2.0)
        self._postgres_rests_until_s = world.loop.now_s + away_s + 5.0
        world.loop.at(away_s, "restart", self._postgres_is_back)

    def _postgres_is_back(self) -> None:
        self._world.database.down = False

    def _cut_bus(self) -> None:
        world = self._world
        world.bus.down = True
        world.loop.at(world.random.uniform(0.1, 6.0), "restart", self._bus_is_back)

    def _bus_is_back(self) -> None:
        world = self._world
        world.bus.down = False

    def _cut_somebody_off(self) -> None:
        world = self._world
        process = self._somebody()
        world.bus.cut_off.add(process)
        world.loop.at(
            world.random.uniform(0.2, 8.0), "restart", world.bus.cut_off.discard, process
        )  # fmt: skip

    def _step_a_clock(self) -> None:
        world = self._world
        step_ms = world.random.choice((-30_000, -2_000, -50, 50, 2_000, 30_000))
        clock = world.random.choice([world.clock, *world.clocks])
        clock.skew_ms += step_ms
        if world.random.random() < 0.2:
            # Within what invariant 7 allows a revocation to be late: it compares two shards' times.
            world.database.skew_us = world.random.choice((-1_000_000, -500_000, 0, 500_000))

    def _revoke_somebody(self) -> None:
        """A ban, or expired collateral; after a while the provider attests anew."""
        world = self._world
        agent = world.random.choice(world.agents)
        agent.revoke()
        self._kill_agent(agent, world.random.uniform(1.0, 8.0))
