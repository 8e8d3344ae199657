"""The matching policy: decisions a second, and what it does to a market, against simpler ones.

    python -m benchmarks.matching [--decisions N] [--jobs N] [--seed N]

The market is a discrete-event model of providers that differ in speed, price and reliability and
keep the prefixes of their latest conversations; the policy that runs in it is the product's own.
The oracle knows what nobody can: each provider's true speed, its queue now, and its cache.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.report import percentile
from cocoon.contracts.commands import Candidate
from cocoon.contracts.matching import BALANCED
from cocoon.domain.job import JobState
from cocoon.domain.leasing import decide_request_job
from cocoon.domain.matching import Need, choose
from cocoon.domain.reputation import moved
from services.matcher import decide
from services.matcher.memory import Memory
from tests.support import job_world as world
from tests.support.example_events import stored

PROVIDERS, MODELS, RECIPIENTS = 1000, 100, 3
FUNDS = 10**15


def decisions_per_s(count: int, seed: int) -> float:
    """Whole decisions: candidates from memory, the command, the events; one core."""
    draw = random.Random(seed)  # noqa: S311
    memory = Memory(world.FEE_BPS, silence_s=3.0)
    crowd = [world.Provider(f"provider {n}", concurrency=8) for n in range(PROVIDERS)]
    models = [world.hex32(f"model {n}") for n in range(MODELS)]
    by_model: dict[str, list[world.Provider]] = {model: [] for model in models}
    for number, provider in enumerate(crowd):
        model = models[number % MODELS]
        by_model[model].append(provider)
        events = provider.network_events(model)
        for event in stored(0, f"provider/{provider.id}", events):
            memory.apply_network(event)
        memory.heartbeat(provider.beat(), 0.0)
    asked = []
    for number in range(count):
        model = draw.choice(models)
        to = tuple(draw.sample(by_model[model], RECIPIENTS))
        asked.append(
            world.job_request(
                f"job{number}", providers=to, model_id=model, affinity=world.hex16(f"c{number}")
            )
        )
    seeds = [world.hex32(f"seed {number}") for number in range(count)]
    began_s = time.process_time()
    for request, drawn in zip(asked, seeds, strict=True):
        candidates = memory.candidates(request.recipient_key_ids, request.model_id, 0.0)
        command = decide.request_command(
            request, FUNDS, candidates, world.LEASE_TTL_MS, drawn, world.NOW_MS, memory.policy
        )
        decide_request_job(JobState(), command)
    return count / (time.process_time() - began_s)


# ---- the market ----

CROWD, CONVERSATIONS, KEPT = 24, 1000, 40
PREFILL_MS, CACHED_MS, TURN_MS = 400.0, 40.0, 2500.0
PLACES = 4


@dataclass
class Machine:
    """A provider of the model: its true speed, its jobs, its cache and what the network saw."""

    provider: world.Provider
    speed: float
    price: float
    fails: float
    running: int = 0
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    first_token_us: int = 0
    samples: int = 0
    ended: int = 0
    success_ppm: int = 1_000_000
    income: float = 0.0

    def candidate(self) -> Candidate:
        quote = world.QUOTE.model_copy(update={
            "input_nanoton_per_mtok": int(1_000_000 * self.price),
            "output_nanoton_per_mtok": int(4_000_000 * self.price),
        })  # fmt: skip
        return self.provider.candidate(
            quote=quote, running=self.running, concurrency=PLACES, ended_jobs=self.ended,
            first_token_us=self.first_token_us, success_ppm=self.success_ppm,
        )  # fmt: skip

    def first_token_ms(self, conversation: int) -> float:
        prefill_ms = CACHED_MS if conversation in self.cache else PREFILL_MS
        return prefill_ms * (1 + self.running / PLACES) / self.speed


Policy = Callable[[list[Machine], int, random.Random], Machine]
_NEED = Need(
    model_id=world.MODEL, recipient_key_ids=(), max_price_nanoton=20_000, max_input_tokens=1000,
    max_output_tokens=1000, now_ms=world.NOW_MS,
)  # fmt: skip


def _ours(free: list[Machine], conversation: int, draw: random.Random) -> Machine:
    by_id = {machine.provider.id: machine for machine in free}
    need = Need(
        **{name: getattr(_NEED, name) for name in Need.__slots__}
        | {
            "recipient_key_ids": tuple(machine.provider.key_id for machine in free),
            "affinity": hashlib.sha256(conversation.to_bytes(4, "big")).hexdigest()[:32],
        }
    )
    chosen = choose(
        tuple(machine.candidate() for machine in free), need, draw.randbytes(32).hex(), BALANCED
    )
    assert isinstance(chosen, Candidate)
    return by_id[chosen.provider_id]


POLICIES: dict[str, Policy] = {
    "balanced-1": _ours,
    "random": lambda free, _, draw: draw.choice(free),
    "least loaded": lambda free, _, draw: min(
        free, key=lambda machine: (machine.running, draw.random())
    ),
    "cheapest": lambda free, _, draw: min(free, key=lambda m: (m.price, draw.random())),
    "oracle": lambda free, conversation, _: min(
        free, key=lambda machine: machine.first_token_ms(conversation) / (1 - machine.fails)
    ),
}


def market(policy: Policy, jobs: int, seed: int) -> dict[str, float]:
    """One model, a crowd of machines at about 60 % of their places; the same arrivals for all."""
    draw = random.Random(seed)  # noqa: S311
    crowd = [
        Machine(
            world.Provider(f"machine {n}", concurrency=PLACES), draw.uniform(0.5, 2.0),
            draw.uniform(0.6, 1.6), 0.15 if n % 8 == 0 else 0.005,
        )
        for n in range(CROWD)
    ]  # fmt: skip
    arrivals, own = random.Random(seed + 1), random.Random(seed + 2)  # noqa: S311
    now_ms, between_ms = 0.0, (TURN_MS + PREFILL_MS) / (CROWD * PLACES * 0.6)
    ends: list[tuple[float, int, int]] = []
    waits_ms: list[float] = []
    hits = failed = paid = 0
    spent = 0.0
    for _ in range(jobs):
        now_ms += arrivals.expovariate(1 / between_ms)
        conversation = int(arrivals.random() ** 2 * CONVERSATIONS)
        length, bad = arrivals.expovariate(1 / TURN_MS), arrivals.random()
        while ends and ends[0][0] <= now_ms:
            _, _, index = heapq.heappop(ends)
            crowd[index].running -= 1
        free = [machine for machine in crowd if machine.running < PLACES]
        if not free:
            continue
        chosen = policy(free, conversation, own)
        wait_ms = chosen.first_token_ms(conversation)
        hits += conversation in chosen.cache
        chosen.cache[conversation] = None
        chosen.cache.move_to_end(conversation)
        if len(chosen.cache) > KEPT:
            chosen.cache.popitem(last=False)
        good = bad >= chosen.fails
        waits_ms.append(wait_ms if good else wait_ms + 3000)  # and somebody else does it again
        chosen.first_token_us = moved(chosen.first_token_us, int(wait_ms * 1000), chosen.samples)
        chosen.samples += 1
        chosen.ended += 1
        chosen.success_ppm += ((1_000_000 if good else 0) - chosen.success_ppm) // 20
        chosen.running += 1
        heapq.heappush(ends, (now_ms + wait_ms + length / chosen.speed, len(waits_ms),
                              crowd.index(chosen)))  # fmt: skip
        failed += not good
        if good:
            chosen.income += chosen.price
            spent += chosen.price
            paid += 1
    incomes = sorted(machine.income for machine in crowd)
    return {
        "p50 ms": percentile(waits_ms, 50), "p95 ms": percentile(waits_ms, 95),
        "cache hits %": hits / len(waits_ms) * 100, "failed %": failed / len(waits_ms) * 100,
        "price paid": spent / max(paid, 1), "income Gini": _gini(incomes),
        "top provider %": incomes[-1] / sum(incomes) * 100,
    }  # fmt: skip


def _gini(incomes: list[float]) -> float:
    """0: all earn the same. 1: one earns everything."""
    total, count = sum(incomes), len(incomes)
    ranked = sum((index + 1) * income for index, income in enumerate(incomes))
    return 2 * ranked / (count * total) - (count + 1) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decisions", type=int, default=5000)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    rates = sorted(decisions_per_s(chosen.decisions, chosen.seed + turn) for turn in range(3))
    print(
        f"decisions a second, {PROVIDERS} providers, {MODELS} models: {rates[1]:,.0f} (aim 5,000)"
    )
    found = {name: market(policy, chosen.jobs, chosen.seed) for name, policy in POLICIES.items()}
    columns = list(next(iter(found.values())))
    print(f"{'':14}" + "".join(f"{column:>16}" for column in columns))
    for name, row in found.items():
        print(f"{name:14}" + "".join(f"{row[column]:16.2f}" for column in columns))


if __name__ == "__main__":
    main()
