"""`./cocoon sim`, or `python -m tests.sim`: run histories and print how they went."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections import Counter
from collections.abc import Sequence

from tests.sim.edges import wall_s
from tests.sim.history import Outcome, run_history

STEPS = 4_000
PROGRESS_S = 10.0
_asked_to_end: list[bool] = []  # by SIGTERM


def run(
    seed: int, steps: int, histories: int, *, say: bool = False, go_on: bool = False
) -> tuple[Counter[str], list[Outcome]]:
    """Run the seeds from `seed` on; the totals, and the histories that violated something.

    It ends at the first of these unless `go_on`.
    """
    total: Counter[str] = Counter()
    failed: list[Outcome] = []
    began_s = told_s = wall_s()
    for number in range(histories):
        if _asked_to_end:
            break  # what was run until now is told
        outcome = run_history(seed + number, steps)
        add(total, outcome)
        if outcome.violations:
            failed.append(outcome)
            if say:
                print(failure(outcome, steps), flush=True)
            if not go_on:
                break
        if say and wall_s() - told_s >= PROGRESS_S:
            told_s = wall_s()
            rate = (total["steps"] + total["drain_steps"]) / (told_s - began_s)
            print(
                f"{_histories(number + 1)}, {total['steps']:,} steps under faults, "
                f"{total['drain_steps']:,} in drains, {rate:,.0f}/s, seed {seed + number}, "
                f"{len(failed)} violated",
                flush=True,
            )  # fmt: skip
    total["wall_ms"] = int((wall_s() - began_s) * 1000)
    return total, failed


def add(total: Counter[str], outcome: Outcome) -> None:
    total["histories"] += 1
    total["hash"] = int(outcome.digest, 16) ^ total["hash"]
    for name in ("steps", "drain_steps", "events", "appends", "messages", "looks"):
        total[name] += getattr(outcome, name)
    total["simulated_s"] += int(outcome.simulated_s)
    for group in ("faults", "kinds", "jobs", "answers"):
        for name, count in getattr(outcome, group).items():
            total[f"{group}.{name}"] += count


def group(total: Counter[str], name: str) -> dict[str, int]:
    found = {k.partition(".")[2]: n for k, n in total.items() if k.startswith(f"{name}.")}
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def summary(total: Counter[str]) -> str:
    wall = max(1, total["wall_ms"]) / 1000
    steps = total["steps"] + total["drain_steps"]
    lines = [
        f"{_histories(total['histories'])}, {total['steps']:,} steps under faults and "
        f"{total['drain_steps']:,} in drains, {wall:,.1f} s, {steps / wall:,.0f} steps/s",
        f"{total['simulated_s']:,} s simulated, {total['events']:,} events in the logs, "
        f"{total['appends']:,} appends, {total['messages']:,} messages, "
        f"{total['looks']:,} steps that changed what the invariants see",
    ]
    for title in ("faults", "jobs", "answers", "kinds"):
        told = ", ".join(f"{name} {count:,}" for name, count in group(total, title).items())
        lines.append(f"{'steps by cause' if title == 'kinds' else title}: {told}")
    lines.append(f"hash of these histories: {total['hash']:064x}")
    return "\n".join(lines)


def _histories(count: int) -> str:
    return "1 history" if count == 1 else f"{count:,} histories"


def failure(outcome: Outcome, steps: int) -> str:
    said = "\n".join(f"  {sentence}" for sentence in outcome.violations[:10])
    last = "\n".join(f"  {line}" for line in outcome.last_steps)
    return (
        f"VIOLATED at step {outcome.at_step} of seed {outcome.seed}:\n{said}\nthe last steps:\n"
        f"{last}\nagain: ./cocoon sim --seed {outcome.seed} --steps {steps}"
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all invariants held. 1: one did not."""
    parser = argparse.ArgumentParser(prog="cocoon sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the first history")
    parser.add_argument("--steps", type=int, default=STEPS, help="under faults, of each history")
    parser.add_argument("--histories", type=int, default=1, help="one seed each, counted up")
    parser.add_argument("--go-on", action="store_true", help="after a violation, the next seed")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead")
    chosen = parser.parse_args(arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: _asked_to_end.append(True))
    total, failed = run(
        chosen.seed, chosen.steps, chosen.histories, say=not chosen.json, go_on=chosen.go_on
    )
    if chosen.json:
        told: dict[str, object] = {k: n for k, n in total.items() if "." not in k}
        told["hash"] = f"{total['hash']:064x}"
        told |= {name: group(total, name) for name in ("faults", "jobs", "answers", "kinds")}
        told["failed"] = [
            {"seed": f.seed, "step": f.at_step, "violations": f.violations} for f in failed
        ]
        print(json.dumps(told, sort_keys=True))
    else:
        print(summary(total))
        print(f"{_histories(len(failed))} violated an invariant" if failed else "no violation")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
