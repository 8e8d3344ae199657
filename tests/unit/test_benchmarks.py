"""The benchmarks import, count and compare rightly. What they measure is nobody's assertion."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import benchmarks
from benchmarks.__main__ import QUESTIONS, _asked, main
from benchmarks.caller import Answer, Lines, Load, Spec
from benchmarks.parts import parts
from benchmarks.path import client_shares
from benchmarks.processes import cpu_s
from benchmarks.report import Aim, Finding, markdown, middle, percentile, ratio, table, written
from benchmarks.stages import ENDS, stage_rows
from benchmarks.zero_work_engine import Engine

ROOT = Path(benchmarks.__file__).parent
MODULES = [module.name for module in pkgutil.iter_modules([str(ROOT)])]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__main__"])
def test_every_module_imports(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}").__doc__


def test_progress_does_not_look_like_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    _asked(QUESTIONS[0], lambda: Finding({}, []))
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"measuring: {QUESTIONS[0].title}\n")


# ---- the report's arithmetic ----


def test_an_aim_is_met_at_its_limit_and_missed_beyond_it() -> None:
    assert Aim("", "at most", 0.2, 0.2).verdict == "met"
    assert Aim("", "at most", 0.2, 0.5).verdict == "missed by 2.50x"
    assert Aim("", "at least", 20, 20.0).verdict == "met"
    assert Aim("", "at least", 20, 8.0).verdict == "missed by 2.50x"


def test_an_aim_without_its_figure_is_neither_met_nor_missed() -> None:
    aim = Aim("", "at most", 0.2, None)
    assert not aim.met
    assert aim.verdict == "not measured"


def test_a_ratio_needs_both_figures() -> None:
    rows = {"a": {"x": 1.0}, "b": {"x": 4.0}, "c": {"x": 0.0}}
    assert ratio(rows, "a", "b", "x") == 0.25
    assert ratio(rows, "a", "c", "x") is None
    assert ratio(rows, "a", "missing", "x") is None
    assert ratio(rows, "a", "b", "y") is None


def test_a_figure_is_the_median_of_the_rounds_that_have_it() -> None:
    assert middle([{"x": 1.0}, {"x": 9.0, "y": 2.0}, {"x": 3.0}]) == {"x": 3.0, "y": 2.0}


def test_percentiles_are_by_nearest_rank() -> None:
    values = [float(n) for n in range(1, 101)]
    assert percentile(values, 99) == 99.0
    assert percentile([7.0], 99) == 7.0
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0


def test_the_sdks_share_is_what_a_plain_caller_does_not_cost() -> None:
    parts = {"Cocoon, sidecar": {"sidecar": 700.0}, "Cocoon, SDK": {"client": 500.0}}
    shares = client_shares(parts, {"Cocoon, sidecar": {"caller_us": 40.0}})
    assert shares["the sidecar's share"] == {"sidecar": 700.0}
    assert shares["the SDK's share (less a plain caller)"] == {"client": 460.0}


def test_every_aim_of_the_issue_is_computed_from_the_rows() -> None:
    """With rows as good as the aims, every aim is met; with none, none is measured."""
    rows = {
        "LiteLLM": {"added_ms": 10.0, "half_ms": 10.0, "jobs_per_s": 50.0, "cpu_us": 12_000.0,
                    "chunks_per_s": 1000.0},
        **{
            name: {"added_ms": 2.0, "half_ms": 2.0, "half_p99_ms": 6.0, "jobs_per_s": 1000.0,
                   "cpu_us": 1000.0, "chunks_per_s": 25_000.0}
            for name in ("Cocoon, sidecar", "Cocoon, SDK")
        },
        **{
            f"{arm}, {waiters} waiters": {"events_per_s": events}
            for arm, events in (("log.append", 60.0), ("raw", 100.0)) for waiters in (64, 256)
        },
        **{
            name: {"cpu_us": 1000.0}
            for name in ("1 provider", "3 providers", "1,000 providers")
        },
        **{
            f"{count:,} events": {"cpu_us": 1000.0}
            for count in (10_000, 1_000_000, 10_000_000)
        },
    }  # fmt: skip
    aims = [aim for question in QUESTIONS for aim in question.aims(rows)]
    assert len(aims) == 18
    assert [aim.what for aim in aims if not aim.met] == []
    assert {aim.verdict for question in QUESTIONS for aim in question.aims({})} == {"not measured"}


def test_the_report_is_made_again_from_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = {"rows": {"LiteLLM": {"jobs_per_s": 50.0}, "Cocoon, SDK": {"jobs_per_s": 1000.0}},
               "notes": ["Portkey could not be installed"]}  # fmt: skip
    stored = tmp_path / "figures.json"
    stored.write_text(json.dumps({"machine": "2 cores", "findings": {"jobs": finding}}))
    main(["--from", str(stored), "--markdown"])
    told = capsys.readouterr().out
    assert "| Cocoon, SDK | 1,000 |" in told
    assert "| jobs/s of LiteLLM's, SDK | 20.0 | at least 20.0 | met |" in told
    assert "| jobs/s of LiteLLM's, sidecar |  | at least 20.0 | not measured |" in told
    assert "Portkey could not be installed" in told


def test_columns_without_figures_are_left_out() -> None:
    question = next(q for q in QUESTIONS if q.name == "jobs")
    lines = table(question, Finding({"LiteLLM": {"jobs_per_s": 1234.5}}))
    assert lines == [["", "jobs/s"], ["LiteLLM", "1,234"]]
    assert markdown(lines).splitlines()[1] == "| --- | --- |"
    assert written([question], {}) == ""


def test_a_stage_lasts_from_the_end_of_the_one_before() -> None:
    """Requests without all their spans are left out."""
    at = {"sent": 0} | {name: 1000 * (n + 1) ** 2 for n, (name, _) in enumerate(ENDS)}
    rows = stage_rows([at, at, {"sent": 0, "first": 10**9}])
    assert [row["us"] for row in rows.values()] == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0]
    assert [row["until_us"] for row in rows.values()][-1] == 49.0
    assert stage_rows([]) == {}


# ---- the caller and the engine ----


@pytest.fixture
async def engine() -> AsyncIterator[str]:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/v1"
    server.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_the_caller_counts_every_word_of_the_engine(engine: str, stream: bool) -> None:
    lines = Lines(Spec(engine, "any", stream=stream, words=300))
    try:
        answers = [await lines.ask() for _ in range(3)]
    finally:
        await lines.close()
    assert [answer.words for answer in answers] == [300, 300, 300]
    # a stream's other events: the role, the end, the counts, [DONE]
    assert answers[0].events == (304 if stream else 0)
    assert answers[0].first_s > 0


def test_words_and_events_are_counted_wherever_the_network_cuts() -> None:
    sent = b'data: {"content": "this word that word "}\n\ndata: [DONE]\n\n'
    answer = Answer()
    for number in range(len(sent)):
        answer.take(sent[number : number + 1])
    assert (answer.words, answer.events) == (2, 2)


async def test_an_arm_that_drops_a_word_is_not_measured(engine: str) -> None:
    lines = Lines(Spec(engine, "any", words=3))
    load = Load(Spec(engine, "any", words=4), lines)
    try:
        with pytest.raises(RuntimeError, match="3 words came of 4"):
            await load.one()
    finally:
        await lines.close()


async def test_every_kind_of_load_asks_as_often_as_it_says(engine: str) -> None:
    for spec, wanted in (
        (Spec(engine, "any", mode="one", count=3, pause_s=0.0), 3),
        (Spec(engine, "any", mode="paced", rate=200.0, seconds=0.05), 10),
    ):
        lines = Lines(spec)
        load = Load(spec, lines)
        await load.run()
        await lines.close()
        assert len(load.first_ms) == len(load.whole_ms) == wanted


def test_a_groups_cpu_is_its_processes_but_not_another_groups() -> None:
    busy = "import sys\nsum(range(30_000_000))\nprint(1, flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        own, pid = frozenset({os.getpid()}), frozenset({child.pid})
        before, apart, after = (
            cpu_s({"all": own}), cpu_s({"all": own, "child": pid}), cpu_s({"all": own})
        )  # fmt: skip
        child.communicate()
    assert apart["child"] > 0
    # what this process spends between two looks is its own: the sum lies between them
    assert before["all"] <= apart["all"] + apart["child"] <= after["all"]


# ---- the volatile arm ----


def test_the_volatile_arm_changes_its_own_process_alone() -> None:
    look = (
        "from benchmarks import volatile\nvolatile.arrange()\n"
        "from pathlib import Path\n"
        "from cocoon.devnet.nats_server import NatsServer\n"
        "from cocoon.devnet.postgres import PostgresServer\n"
        "print(PostgresServer(Path('x'))._settings['fsync'])\n"
        "print('always' in NatsServer(Path('x'))._config())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", look], cwd=ROOT.parent, capture_output=True, text=True, check=True,
        timeout=60,
    )  # fmt: skip
    assert done.stdout.split() == ["off", "False"]


def test_the_parts_of_a_job_add_up_to_all_of_them() -> None:
    rows = parts(count=8).rows
    whole = rows.pop("all of them")["job_us"]
    assert whole == pytest.approx(sum(row["us"] * row["times"] for row in rows.values()))
    assert all(row["us"] > 0 for row in rows.values())
    assert sum("alone_us" in row for row in rows.values()) == 2
