"""One history of the simulated network: everybody in it, what befalls them, and the drain.

A history is a function of its seed and its number of steps. A step is one event of the world (a
message delivered, a call served, a timer, a fault, a client's act) with all that follows at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from cocoon.contracts.commands import Command, CreditDeposit, OpenAccount
from cocoon.contracts.envelope import AppendItem, NewEvent
from cocoon.domain import account as accounts
from cocoon.domain import decide as domain
from cocoon.domain.account import AccountState
from cocoon.eventlog.append import LogAppender
from cocoon.kernel.errors import CocoonError
from services.billing import decide as billing
from tests.sim import platform
from tests.sim.bus import Bus
from tests.sim.clients import Clients
from tests.sim.database import BASE_US, Database
from tests.sim.faults import Faults
from tests.sim.loop import START_S, Process, SimLoop
from tests.sim.providers import Agent
from tests.sim.troubles import RESTART_S, Troubles
from tests.support.collected import ClientCall, Evidence, LedgerTables

ACCOUNTS = ("acct_rich", "acct_middle", "acct_poor")
DEPOSITS = {"acct_rich": 2_000_000, "acct_middle": 60_000, "acct_poor": 14_000}
DRAIN_S = 1_800.0


@dataclass
class SimClock:
    """One machine's clocks: its wall clock may be wrong and step; its monotonic one never does."""

    loop: SimLoop
    skew_ms: int = 0

    def now_ms(self) -> int:
        return BASE_US // 1000 + int((self.loop.now_s - START_S) * 1000) + self.skew_ms

    def monotonic_s(self) -> float:
        return self.loop.now_s


@dataclass
class SimRandomness:
    source: random.Random

    def token(self, size: int) -> bytes:
        return self.source.randbytes(size)


class World:
    """Everything of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)  # noqa: S311 - one seed, one history
        self.loop = SimLoop()
        self.faults = Faults.drawn(self.random)
        self.bus = Bus(self.loop, self.faults)
        self.database = Database(self.loop, self.faults, START_S)
        self.clock = SimClock(self.loop)
        self.clocks: list[SimClock] = []
        self.randomness = SimRandomness(self.random)
        self.accounts = ACCOUNTS
        self.calls: list[ClientCall | None] = []
        self.changed_calls: set[int] = set()
        self.calls_of: dict[object, list[int]] = {}  # by job, and by account and key
        self.processes: dict[Agent, Process] = {}
        self.started = 0
        self.services: dict[str, Process] = {}
        self.doors: dict[str, platform.Door] = {}
        self.forged: set[str] = set()  # responses that end in a forged receipt
        self.remains: dict[Process, Callable[[], dict[str, int]]] = {}  # in a service's memory
        self.deposits: tuple[Process, LogAppender] | None = None
        self.references = 0
        self.clients = Clients(self)
        self.troubles = Troubles(self)
        self.agents = [
            Agent(self, name, self.random.choice((1, 2, 3))) for name in ("ada", "ben", "cleo")
        ]
        self.pace_s = self.random.choice((0.01, 0.04, 0.15))  # between two clients' acts
        self.draining = False

    # ---- beginning ----

    def begin(self) -> None:
        for name in ("billing", "matcher", "gw1", "gw2"):
            self.start(name)
        for agent in self.agents:
            self.start_agent(agent)
        for account in self.accounts:
            self.loop.at(0.5, "operator", self.credit, account, DEPOSITS[account])
        self.loop.at(1.0, "client", self._ask)
        self.loop.at(3.0, "fault", self.troubles.befall)

    def start(self, name: str) -> None:
        """Start a service's process beside whatever else runs under its name."""
        process = self._new_process(name)
        self.services[name] = process
        if name.startswith("gw"):
            door = platform.Door(self, process, f"{name}x{process.name.rpartition('_')[2]}")
            self.doors[name] = door
            self._spawn(process, door.run(), lambda: None)
            return
        run = platform.run_matcher if name == "matcher" else platform.run_billing
        self._spawn(process, run(self, process), lambda: self._ended(name, process))

    def _new_process(self, name: str) -> Process:
        self.started += 1
        return Process(name, self.started)

    def start_agent(self, agent: Agent) -> None:
        process = self._new_process(agent.name)
        self.processes[agent] = process
        self._spawn(process, agent.run(), lambda: None)

    def _spawn(
        self, process: Process, work: Coroutine[Any, Any, None], ended: Callable[[], None]
    ) -> None:
        async def run() -> None:
            try:
                await work
            except CocoonError:
                pass  # it ends, as its supervisor sees
            finally:
                if process.alive and not self.loop.closing:
                    ended()

        self.loop.run_as(process, asyncio.create_task, run())

    def _ended(self, name: str, process: Process) -> None:
        """A service that stopped by itself is dead; if nobody else has its place, it comes back."""
        process.alive = False
        if self.services.get(name) is process:
            self.loop.at(self.random.uniform(*RESTART_S), "restart", self.restart, name, process)

    def process_of(self, owner: Agent) -> Process:
        return self.processes[owner]

    # ---- ends and returns of processes ----

    def kill(self, process: Process) -> None:
        process.alive = False

    def restart(self, name: str, process: Process) -> None:
        """Start a service again, unless somebody else has its place already."""
        if self.services.get(name) is process:
            self.start(name)

    def restart_agent(self, agent: Agent, process: Process) -> None:
        if self.processes[agent] is process:
            self.start_agent(agent)

    # ---- clients and operators ----

    def _ask(self) -> None:
        if self.draining:
            return
        self.loop.at(self.random.expovariate(1 / self.pace_s), "client", self._ask)
        if self.random.random() < 0.02:
            self.credit(self.random.choice(self.accounts), self.random.choice((5_000, 50_000)))
        self.clients.ask_something()

    def open_door(self) -> platform.Door | None:
        doors = [d for d in self.doors.values() if d.process.alive and d.listening]
        return self.random.choice(doors) if doors else None

    def new_call(self) -> int:
        self.calls.append(None)
        return len(self.calls) - 1

    def saw(self, call: int, seen: ClientCall) -> None:
        if self.calls[call] is None:
            self.calls_of.setdefault(seen.job_id, []).append(call)
            self.calls_of.setdefault((seen.account_id, seen.idempotency_key), []).append(call)
        self.calls[call] = seen
        self.changed_calls.add(call)

    def credit(self, account: str, amount_nanoton: int) -> None:
        """An operator's deposit, through billing's appender if one runs."""
        self.references += 1
        reference = f"deposit {self.references}".replace(" ", "-")
        if self.deposits is None or not self.deposits[0].alive:
            if not self.draining:
                self.loop.at(1.0, "operator", self.credit, account, amount_nanoton)
            return
        process, appender = self.deposits
        work = self._credit(appender, account, amount_nanoton, reference)
        self.loop.run_as(process, asyncio.create_task, work)

    async def _credit(
        self, appender: LogAppender, account: str, amount_nanoton: int, reference: str
    ) -> None:
        stream = f"account/{account}"
        command: OpenAccount | CreditDeposit
        try:
            for command_id in (f"open-{account}", reference):
                rows = self.database.logs[1].stream(stream)
                state = AccountState()
                for stored in rows:
                    state = accounts.evolve(state, stored.decode())
                if command_id == reference:
                    command = CreditDeposit(
                        account_id=account, amount_nanoton=amount_nanoton, source="dev",
                        reference=reference,
                    )  # fmt: skip
                    events = accounts.decide_credit_deposit(state, command)
                else:
                    command = OpenAccount(account_id=account)
                    events = accounts.decide_open_account(state, command)
                if events:
                    item = billing.account_item(
                        command_id, command, account, events, state.version
                    )  # fmt: skip
                    await appender.append(item)
        except CocoonError:
            return  # the operator tries again some day

    # ---- attestation ----

    def decide_in_network(self, *commands: Command) -> None:
        """Append what attestation decides to shard 0, at once or when Postgres is back."""
        if self.database.down:
            self.loop.at(0.5, "attestation", self.decide_in_network, *commands)
            return
        log = self.database.logs[0]
        for command in commands:
            stream = domain.stream_of(command)
            state = domain.initial(stream)
            for stored in log.stream(stream):
                state = domain.evolve(state, stored.decode(), stream)
            try:
                events = domain.decide(state, command)
            except CocoonError:
                continue
            if events:
                log.append(
                    AppendItem(
                        f"attest-{len(log.events)}", command.to_stored(), "attestation",
                        stream.partition("/")[2], ((stream, log.versions.get(stream, 0)),),
                        tuple(NewEvent(stream, event) for event in events),
                    )
                )  # fmt: skip
        self.database.notify(0)

    # ---- the end ----

    def new_clock(self) -> SimClock:
        skew = (
            self.random.choice((0, 0, 0, -3_000, 3_000)) if self.faults.enabled("clock_step") else 0
        )
        clock = SimClock(self.loop, skew)
        self.clocks.append(clock)
        return clock

    def stop_faults(self) -> None:
        """From here on nothing goes wrong, nobody asks, and everybody who is away comes back."""
        self.draining, self.faults.on = True, False
        self.bus.down = self.database.down = False
        self.bus.cut_off.clear()
        # A wiped stream is made anew with the next event, not before: let there be one.
        self.credit(self.accounts[0], 1)
        self.agents[0].revoke()
        for process in [*self.services.values(), *self.processes.values()]:
            if process.frozen:
                self.loop.thaw(process)

    def is_quiet(self) -> bool:
        """Nothing is under way: no open job, no unsettled result, no reader, no lagging copy."""
        return not self.unquiet()

    def unquiet(self) -> str:
        """What is still under way, or nothing."""
        log, tables = self.database.logs[1], self.database.tables[1]
        jobs = self.unfinished_jobs()
        busy = {
            "jobs without an end": len(jobs),
            "open answers": len(self.clients.open),
            "results in INGRESS": len(self.bus.submitted),
            "spools' files": sum(len(agent.spool.files) for agent in self.agents),
            "events not posted": len(log.events) - tables.applied,
            "dead services": sum(not process.alive for process in self.services.values()),
            "events not relayed": sum(
                len(self.database.logs[shard].events) - self._stream_end(shard) for shard in (0, 1)
            ),
        }
        return ", ".join(f"{count} {what}" for what, count in busy.items() if count)

    def remaining(self) -> list[str]:
        """What living services still hold in memory, when nothing is under way: leaks."""
        return [
            f"{process} holds {count} {what}"
            for process in self.services.values()
            for what, count in self.remains.get(process, dict)().items()
            if count
        ]

    def _stream_end(self, shard: int) -> int:
        return self.bus.first_sequence[shard] + len(self.bus.streams[shard]) - 1

    def unfinished_jobs(self) -> set[str]:
        open_jobs: set[str] = set()
        for stored in self.database.logs[1].events:
            if stored.type == "JobRequested":
                open_jobs.add(stored.stream)
            elif stored.type in ("PaymentSettled", "FundsRefused", "JobFailed", "JobCancelled"):
                open_jobs.discard(stored.stream)
        return open_jobs

    def close(self) -> None:
        """End every task, so that nothing is left to the garbage collector."""
        self.bus.down = self.database.down = True
        self.loop.close()

    def evidence(self, *, quiet: bool) -> Evidence:
        logs = {shard: tuple(log.events) for shard, log in self.database.logs.items()}
        return Evidence(
            logs=logs, quiet=quiet,
            commands={s: list(log.commands.values()) for s, log in self.database.logs.items()},
            streams=dict(self.bus.streams), ledgers={1: self.ledger()},
            calls=[call for call in self.calls if call is not None],
        )  # fmt: skip

    def ledger(self) -> LedgerTables:
        tables = self.database.tables[1]
        return LedgerTables(
            tables.applied, tables.entries, tables.balances, tables.settlements
        )  # fmt: skip

    def digest(self) -> str:
        """The history's hash: both chains, what clients saw, and how many steps it took."""
        told = "\n".join(str(call) for call in self.calls)
        parts = [self.database.logs[0].head_hash, self.database.logs[1].head_hash, told.encode(),
                 str(sorted(self.loop.steps.items())).encode()]  # fmt: skip
        return hashlib.sha256(b"\0".join(parts)).hexdigest()
