"""A network under trial: load before, during and after a fault, then the sixteen invariants.

What was measured is written as a table to docs/faults.md's source, one line a trial.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cocoon.contracts.events import PaymentSettled
from tests.invariants import check_all
from tests.support.client_load import Call, ClientLoad
from tests.support.collected import Evidence
from tests.support.evidence import collect, drained
from tests.support.network import LiveNetwork

BEFORE, AFTER = 12, 12  # answers before the fault, and from requests that began after it
RECOVERY_S = 40.0
RESULTS_FILE = "COCOON_FAULT_RESULTS"  # where trials are noted, a JSON line each
TRIALS = "COCOON_FAULT_TRIALS"  # how often each fault is tried


def trials() -> int:
    return int(os.environ.get(TRIALS, "1"))


@dataclass
class Trial:
    """One fault and what it did."""

    fault: str
    at_s: float = 0.0
    restarted_s: float | None = None  # until the supervisor had started it again
    answered_s: float | None = None  # until a request that began after the fault was answered
    drained_s: float | None = None  # until every job had ended, load stopped
    rematched_s: float | None = None  # the latest next match after its provider's loss was noticed
    ok: int = 0
    failed: int = 0
    unknown: int = 0
    unpaid: int = 0  # whole answers that nobody was charged for
    told: dict[str, int] = field(default_factory=dict)  # what failed requests were told
    violations: list[str] = field(default_factory=list)

    def note(self) -> None:
        """Print the trial, and keep it where the environment says."""
        line = {name: getattr(self, name) for name in (
            "fault", "restarted_s", "answered_s", "drained_s", "rematched_s",
            "ok", "failed", "unknown", "unpaid",
        )}  # fmt: skip
        line = {k: round(v, 2) if isinstance(v, float) else v for k, v in line.items()}
        line["violations"] = len(self.violations)
        line["told"] = self.told
        print(json.dumps(line))
        if os.environ.get(RESULTS_FILE):
            with Path(os.environ[RESULTS_FILE]).open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")


@dataclass
class ChaosWorld:
    """A running network and everything that its clients have seen so far."""

    network: LiveNetwork
    canary: str = field(default_factory=lambda: _letters(12))
    history: list[Call] = field(default_factory=list)

    @asynccontextmanager
    async def load(
        self, callers: int = 4, *, only: Literal["streams", "bodies"] | None = None,
        max_retries: int = 2,
    ) -> AsyncIterator[ClientLoad]:  # fmt: skip
        async with ClientLoad(
            self.network, self.canary, callers, only, max_retries, self.history
        ) as load:
            yield load

    async def kill_under_load(self, name: str) -> Trial:
        """kill -9 one process in the middle of jobs, let the supervisor start it again, go on."""
        return await self.end_under_load(name, f"kill -9 {name}", lambda: self.network.kill(name))

    async def end_under_load(self, name: str, fault: str, end: Callable[[], object]) -> Trial:
        """The same, by whatever `end` does to it."""
        trial = Trial(fault)
        async with self.load() as load:
            first = time.monotonic()
            await load.answered(BEFORE, first)
            old_pid = self.network.pid(name)
            trial.at_s = time.monotonic()
            await asyncio.to_thread(end)
            await asyncio.to_thread(self.network.wait_restarted, name, old_pid)
            trial.restarted_s = time.monotonic() - trial.at_s
            await load.answered(AFTER, trial.at_s, RECOVERY_S)
            repeats = await self.repeat(load, before_s=trial.at_s)
        await self.judge(trial)
        if name != "sidecar":  # it remembers what it sealed in memory only, and then refuses
            assert [call.outcome for call in repeats] == ["ok", "ok"]
        return trial

    async def repeat(self, load: ClientLoad, before_s: float) -> list[Call]:
        """Ask again, with the same keys, for a body and a stream that came before the fault."""
        known = [c for c in self.history if c.outcome == "ok" and c.ended_s < before_s]
        wanted = [[c for c in known if c.stream is stream][-1] for stream in (False, True)]
        return [
            await load.ask(c.key, c.prompt, stream=c.stream, expected=c.expected) for c in wanted
        ]

    async def judge(
        self, trial: Trial, *, since_s: float | None = None,
        measure: Callable[[Evidence], object] | None = None,
    ) -> Evidence:  # fmt: skip
        """Drain, then hold the sixteen invariants and the replay against everything so far.

        `measure` sees the evidence before the trial is noted.
        """
        trial.drained_s = await drained(self.network)
        since_s = trial.at_s if since_s is None else since_s
        seen = [call for call in self.history if call.ended_s >= since_s]
        trial.ok = sum(call.outcome == "ok" for call in seen)
        trial.failed = sum(call.outcome == "failed" for call in seen)
        trial.unknown = sum(call.outcome == "unknown" for call in seen)
        trial.told = dict(Counter(f"{c.status} {c.code}" for c in seen if c.outcome != "ok"))
        after = [c.ended_s for c in seen if c.outcome == "ok" and c.began_s >= trial.at_s]
        trial.answered_s = min(after) - trial.at_s if after else None
        evidence = await self.evidence()
        trial.unpaid = sum(
            call.outcome == "ok" and not charged(evidence, call.job_id) for call in seen
        )
        trial.violations = check_all(evidence) + self.told_lies(evidence)
        replayed = await asyncio.to_thread(self.network.cli, "replay", "--verify", "--decisions")
        if replayed.returncode != 0:
            trial.violations.append(f"replay exits {replayed.returncode}: {replayed.stdout}")
        if measure is not None:
            measure(evidence)
        trial.note()
        return evidence

    async def evidence(self) -> Evidence:
        """Collect, and make sure that what was collected is not empty."""
        calls = ClientLoad(self.network, self.canary, history=self.history).calls(
            self.network.running.account_id
        )
        evidence = await collect(self.network, calls, (self.canary.encode(),))
        seen = (evidence.streams, evidence.ledgers, evidence.commands, evidence.calls)
        assert all(seen), "nothing was collected"
        assert all((evidence.streams or {}).values())
        assert all(tables.entries for tables in (evidence.ledgers or {}).values())
        return evidence

    def told_lies(self, evidence: Evidence) -> list[str]:
        """What a client was told and what the log says: the text, the price."""
        said = []
        for call in self.history:
            if call.outcome != "ok":
                continue
            if call.expected is not None and call.text != call.expected:
                said.append(f"job {call.job_id} was answered with wrong text")
            paid = charged(evidence, call.job_id)
            if paid not in ([], [call.cost_nanoton]):
                said.append(f"job {call.job_id}: told {call.cost_nanoton}, charged {paid}")
        return said

    def failures(self, since_s: float = 0.0) -> list[Call]:
        """Requests that ended without their whole answer."""
        ended = [c for c in self.history if c.ended_s and c.began_s >= since_s]
        return [c for c in ended if c.outcome != "ok"]


def charged(evidence: Evidence, job_id: str) -> list[int]:
    """What the log charged for a job, in nanoTON: one amount, or none."""
    events = (event for _, event in evidence.jobs.get(job_id, ()))
    return [event.price_nanoton for event in events if isinstance(event, PaymentSettled)]


@contextmanager
def chaos_world(folder: Path, *options: str) -> Iterator[ChaosWorld]:
    """A fresh network for a module's trials."""
    with LiveNetwork(folder / "network", options) as network:
        yield ChaosWorld(network)


async def wait_for(enough: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not enough():
        assert time.monotonic() < deadline_s, f"{what} did not come within {timeout_s:.0f} s"
        await asyncio.sleep(0.02)


def _letters(count: int) -> str:
    return "".join(secrets.choice("bcdfghjklmnpqrstvwxz") for _ in range(count))
