"""`./cocoon canary`: audit jobs that look like any other, and what they found."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cocoon.cli.session import Data, Json, as_operator, folder_of
from cocoon.kernel.errors import BadRequest, ConfigurationError, Unavailable
from cocoon.kernel.money import format_ton

if TYPE_CHECKING:
    from nats.aio.client import Client

    from cocoon.audit.prompts import Prompts
    from cocoon.audit.running import Canary, Plan, Round
    from cocoon.client import Network
    from cocoon.contracts.honesty import HonestyRule
    from cocoon.devnet.folder import DataFolder, RunningNetwork

app = typer.Typer(
    help="Audit jobs: whether providers run the model that they are paid for.",
    no_args_is_help=True, rich_markup_mode=None,
)  # fmt: skip

CHEATING_PPM = 100_000

_Model = Annotated[str, typer.Option("--model", help="The model's name.")]
_Reference = Annotated[
    str,
    typer.Option(
        metavar="URL|provider:ID",
        help="Who is trusted: an OpenAI-compatible server, or a provider of yours.",
    ),
]
_Key = Annotated[
    Path | None,
    typer.Option("--api-key-file", help="The account that pays; one that audits nothing else."),
]
_Prompts = Annotated[
    Path | None, typer.Option("--prompts", metavar="FILE", help="Your corpus: a prompt a line.")
]
_Style = Annotated[Literal["chat", "skills"], typer.Option(help="What is asked without a corpus.")]
_Tokens = Annotated[int, typer.Option(min=1, max=4096, help="The longest answer asked for.")]


@app.command("run")
def run_canaries(
    model: _Model,
    reference: _Reference,
    count: Annotated[int, typer.Option(min=1, max=100_000, help="How many to send.")] = 50,
    per_hour: Annotated[
        float | None, typer.Option(min=0.01, max=3600, help="So many an hour, at random times.")
    ] = None,
    providers: Annotated[
        list[str] | None, typer.Option(help="Put these first now and then (default: all listed).")
    ] = None,
    api_key_file: _Key = None,
    prompts: _Prompts = None,
    style: _Style = "chat",
    max_tokens: _Tokens = 64,
    tolerance_bps: Annotated[
        int, typer.Option(min=0, max=10_000, help="A distance that passes, in basis points.")
    ] = 1000,
    honest_ppm: Annotated[
        int,
        typer.Option(min=1, max=999_999, help="An honest provider's that differ, of a million."),
    ] = 10_000,
    cheating_ppm: Annotated[
        int, typer.Option(min=1, max=999_999, help="A cheat's that differ, of a million.")
    ] = CHEATING_PPM,
    false_alarm_ppm: Annotated[
        int, typer.Option(min=1, max=499_999, help="Honest providers accused, of a million tests.")
    ] = 100,
    miss_ppm: Annotated[
        int, typer.Option(min=1, max=499_999, help="Cheats called honest, of a million tests.")
    ] = 10_000,
    logprobs: Annotated[
        bool, typer.Option(help="Ask the reference server for log probabilities (near ties).")
    ] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Send paid audit jobs, compare with the reference, record; who fails the test is revoked."""
    from cocoon.audit.running import ITSELF, Plan
    from cocoon.domain.honesty import make_rule

    rule = make_rule(
        tolerance_bps=tolerance_bps, honest_ppm=honest_ppm, cheating_ppm=cheating_ppm,
        false_alarm_ppm=false_alarm_ppm, miss_ppm=miss_ppm,
    )  # fmt: skip
    plan = Plan(model, count, tolerance_bps, max_tokens, per_hour, targets=tuple(providers or ()))

    async def work(nc: Client, running: RunningNetwork, folder: DataFolder) -> Round:
        key = _key(api_key_file or folder.api_key)
        async with _network(running, folder, key) as network:
            return await _run(nc, network, key, plan, rule, _drawn(prompts, style), reference,
                              logprobs)  # fmt: skip

    found = as_operator(data, work).told()
    print(json.dumps(found) if as_json else "\n".join(_lines(found)))
    if not found["canaries"] and set(found["failed"]) - {ITSELF}:
        raise Unavailable("no canary came out, so nobody was judged")


async def _run(
    nc: Client, network: Network, key: str, plan: Plan, rule: HonestyRule, prompts: Prompts,
    reference: str, logprobs: bool,
) -> Round:  # fmt: skip
    from cocoon.audit import asking, running
    from cocoon.bus.requests import ask
    from cocoon.contracts import subjects
    from cocoon.contracts.messages import CanaryRequest, DirectoryRequest
    from cocoon.kernel.clock import SystemRandomness

    if not plan.targets:
        listed = json.loads(
            await ask(nc, subjects.DIRECTORY_REQUEST, DirectoryRequest(model=plan.model))
        )
        known = {entry["provider_id"] for entry in listed["providers"]}
        trusted = reference.removeprefix("provider:")
        plan = replace(plan, targets=tuple(sorted(known - {trusted})))

    async def report(canary: Canary) -> dict[str, Any]:
        answered, judgement = canary.answered, canary.judgement
        told = CanaryRequest(
            provider_id=answered.provider_id, model_id=answered.model_id, job_id=answered.job_id,
            outcome=judgement.outcome, distance_bps=judgement.distance_bps, rule=rule,
        )  # fmt: skip
        said: dict[str, Any] = json.loads(
            await ask(nc, subjects.attestation("platform", "canary"), told)
        )
        return said

    async def ask_one(body: asking.Body) -> asking.Answered:
        return await asking.ask_network(network, key, body)

    async with asking.reference_of(
        reference, network, key, plan.model, logprobs=logprobs
    ) as trusted_engine:
        # a sentence now rather than `count` paid jobs that nothing can be held against
        await trusted_engine.ask({
            "model": plan.model, "messages": prompts.draw(), "temperature": 0, "max_tokens": 16,
            "stream": False,
        })  # fmt: skip
        return await running.run(plan, prompts, ask_one, trusted_engine, report, SystemRandomness())


@app.command("calibrate")
def calibrate(
    model: _Model,
    reference: _Reference,
    other: Annotated[
        str, typer.Option(metavar="URL|provider:ID", help="A second engine that you trust.")
    ],
    count: Annotated[int, typer.Option(min=20, max=10_000, help="How many pairs.")] = 50,
    api_key_file: _Key = None,
    prompts: _Prompts = None,
    style: _Style = "chat",
    max_tokens: _Tokens = 64,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Ask two engines that are honest the same, and say which tolerance and share they need."""
    from cocoon.audit import asking, running
    from cocoon.domain.honesty import calibrate as calibrated
    from cocoon.kernel.clock import SystemRandomness

    async def work(_nc: Client, net: RunningNetwork, folder: DataFolder) -> list[int]:
        key = _key(api_key_file or folder.api_key)
        plan = running.Plan(model, count, 0, max_tokens)
        async with (
            _network(net, folder, key) as network,
            asking.reference_of(reference, network, key, model, logprobs=False) as first,
            asking.reference_of(other, network, key, model, logprobs=False) as second,
        ):
            return await running.distances(
                plan, _drawn(prompts, style), first, second, SystemRandomness()
            )

    apart = as_operator(data, work)
    tolerance, honest = calibrated(apart)
    if as_json:
        print(json.dumps({"distances_bps": apart, "tolerance_bps": tolerance,
                          "honest_ppm": honest}))  # fmt: skip
        return
    print(
        f"{len(apart)} pairs, {sum(d == 0 for d in apart)} of them equal, the furthest "
        f"{max(apart) / 100:.1f} % apart\n--tolerance-bps {tolerance} --honest-ppm {honest}"
    )
    if honest >= CHEATING_PPM:
        print(
            f"`canary run` takes that only with a --cheating-ppm above it ({CHEATING_PPM} unless "
            "said); more pairs (--count) bring the bound down"
        )


@app.command("report")
def report(data: Data = None, as_json: Json = False) -> None:
    """Tell what the log holds of each provider: canaries, verdicts, clients' disputes."""
    folder = folder_of(data)
    running = folder.read_running()
    dsn = folder.dsn("reader").read_text(encoding="utf-8").strip()
    found = asyncio.run(_read(dsn, running.shards[1:]))
    if as_json:
        print(json.dumps(found))
        return
    print("\n".join(_standing(name, one) for name, one in found.items()) or "nothing yet")


async def _read(dsn: str, shards: tuple[int, ...]) -> dict[str, Any]:
    from cocoon.eventlog.connection import connect
    from cocoon.eventlog.honesty import standings

    conn = await connect(dsn, "cocoon-canary-report")
    try:
        found = await standings(conn, shards)
    finally:
        await conn.close(timeout=2)
    return {name: one.told() for name, one in sorted(found.items())}


def _standing(name: str, one: dict[str, Any]) -> str:
    counts = one["canaries"]
    told = ", ".join(f"{counts.get(word, 0)} {word}" for word in ("passed", "differed", "unclear"))
    word = "DISHONEST" if one["dishonest"] else "no cheat found"
    disputes = sum(one["disputes"].values())
    return f"{name}  {word}; canaries: {told}; disputes of clients: {disputes}"


def _lines(found: dict[str, Any]) -> list[str]:
    from cocoon.audit.running import ITSELF

    cost = format_ton(int(found["cost_nanoton"]))
    failed = dict(found["failed"])
    itself = failed.pop(ITSELF, 0)
    lines = [f"{found['canaries']} canaries for {cost} TON, {sum(failed.values())} failed"]
    lines += [f"  failed: {count} {code}" for code, count in sorted(failed.items())]
    if itself:
        lines.append(f"  {itself} more went to the reference itself, which says nothing of anybody")
    for name, one in found["providers"].items():
        told = ", ".join(f"{one[w]} {w}" for w in ("passed", "differed", "unclear") if w in one)
        verdict = "no verdict yet" if one["verdict"] == "open" else one["verdict"]
        lines.append(f"  {name}  {told}; {verdict}")
    return lines


def _key(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigurationError(
            f"the key file {path} cannot be read ({error.strerror}); make a key for an account of "
            "its own with `./cocoon keys create`"
        ) from None


def _drawn(prompts: Path | None, style: str) -> Prompts:
    from cocoon.audit.prompts import Generated, read_corpus
    from cocoon.kernel.clock import SystemRandomness

    randomness = SystemRandomness()
    return Generated(style, randomness) if prompts is None else read_corpus(prompts, randomness)


@asynccontextmanager
async def _network(running: RunningNetwork, folder: DataFolder, key: str) -> AsyncIterator[Network]:
    from cocoon.client import Network, NetworkOptions

    if not key:
        raise BadRequest("the key file is empty")
    network = Network(NetworkOptions(running.gateway_url, folder.trust, api_key=key))
    try:
        yield network
    finally:
        await network.aclose()
