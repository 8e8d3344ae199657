"""`./cocoon provider init`: at most three questions, then one file, one key, the next command."""

from __future__ import annotations

import secrets
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar
from urllib.parse import urlsplit

import typer

from cocoon.agent.market import Prices, median, offers
from cocoon.cli import provider_engines as engines
from cocoon.cli import provider_network as networks
from cocoon.cli.provider_engines import Engine
from cocoon.cli.provider_network import NetworkFacts
from cocoon.cli.provider_session import FILE_NAME, default_folder
from cocoon.kernel.errors import BadRequest, CocoonError, ConfigurationError, Unavailable
from cocoon.kernel.money import format_ton, parse_ton

if TYPE_CHECKING:
    from cocoon.agent.config import AgentConfig

TSM_REPORTS = Path("/sys/kernel/config/tsm/report")
# without a market to look at, in nanoTON per million tokens
FIRST_PRICES = Prices(20_000_000, 10_000_000, 80_000_000)
MOST_NANOTON = 10**15  # what the file takes
MAX_ASKED = 10
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answers:
    """What the options answer already; None is asked."""

    network: str | None
    engine: str | None
    model: str | None
    price: str | None
    trust: Path | None
    ca: Path | None
    fingerprint: str | None
    yes: bool


def init(
    folder: Annotated[
        Path | None,
        typer.Option("--folder", metavar="DIR", help="Where to write (default: .cocoon-provider "
                     "in the checkout)."),
    ] = None,
    network: Annotated[
        str | None, typer.Option(metavar="URL|DIR", help="A gateway, or a folder of `./cocoon up`.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="What runs the model: `embedded`, an OpenAI-compatible server's address "
            "(http://127.0.0.1:8000/v1) or a Triton's (grpc://127.0.0.1:8001).",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Which of the engine's models.")] = None,
    price: Annotated[
        str | None,
        typer.Option(metavar="P", help="TON per million tokens of the answer (default: the "
                     "middle of what others ask)."),
    ] = None,
    trust: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The network's trust file, from its operator."),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The authority behind the network's certificates, where it is a private one "
            "(bus-ca.pem), from its operator.",
        ),
    ] = None,
    fingerprint: Annotated[
        str | None,
        typer.Option(
            metavar="HEX",
            help="The trust document's fingerprint, from its operator: then it may come from the "
            "gateway.",
        ),
    ] = None,
    region: Annotated[
        str | None, typer.Option(help="Where the machine is, for example eu-west.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Take every default and ask nothing.")
    ] = False,
) -> None:  # fmt: skip
    """Set this machine up as a provider: three questions, one file, one key."""
    place = folder or default_folder()
    _check_new(place)
    answers = Answers(network, engine, model, price, trust, ca, fingerprint, yes)
    _check_can_ask(answers)
    facts = _network(answers)
    chosen = _engine(answers)
    prices = _price(answers, facts, chosen)
    config = write(place, facts, chosen, prices, region)
    _tell(place, config, facts)


def _check_new(place: Path) -> None:
    if (place / FILE_NAME).exists():
        raise ConfigurationError(
            f"{place / FILE_NAME} is there already and nothing was changed; edit it, or name "
            "another folder with --folder DIR"
        )


def _check_can_ask(answers: Answers) -> None:
    if not answers.yes and not sys.stdin.isatty():
        raise BadRequest(
            "there is no terminal to ask in; give --yes, and --network where it is not the one "
            "that runs in .cocoon"
        )


def _again(what: str, default: str | None, take: Callable[[str], T]) -> T:
    """Ask until an answer can be taken: whoever mistypes a price need not begin anew."""
    for _ in range(MAX_ASKED):
        try:
            return take(str(typer.prompt(f"   {what}", default=default)).strip())
        except (BadRequest, ConfigurationError, Unavailable) as error:
            print(f"   {error.message}")
    raise BadRequest("no answer could be taken; nothing was written")


# ---- question 1 ----


def _network(answers: Answers) -> NetworkFacts:
    from cocoon.devnet.folder import DataFolder, default_root

    here = DataFolder(default_root())
    default = str(here.root) if here.is_running() else None
    asked = answers.network
    if asked is None and answers.yes:
        asked = default
        if asked is None:
            raise ConfigurationError(
                "no network runs in .cocoon; name one with --network (a gateway's address, or the "
                "folder of a `./cocoon up`)"
            )
    if asked is None:
        print(
            "1. Which network? A gateway's address (https://...), or the folder of a network that "
            "`./cocoon up` runs on this machine."
        )
        return _again("network", default, lambda said: _reach(said, answers))
    return _reach(asked, answers)


def _reach(asked: str, answers: Answers) -> NetworkFacts:
    if urlsplit(asked).scheme in ("http", "https"):
        facts = networks.from_gateway(asked, answers.trust, answers.ca)
    elif answers.trust is not None or answers.ca is not None:
        raise BadRequest(
            "--trust and --ca belong to a gateway's address; a folder has its own files"
        )
    else:
        facts = networks.from_devnet(Path(asked))
    _confirm_trust(facts, answers)
    networks.check(facts)
    return facts


def _confirm_trust(facts: NetworkFacts, answers: Answers) -> None:
    """Show the fingerprint; one that a gateway handed out must be compared by a person."""
    print(f"   trust document, fingerprint {facts.fingerprint}")
    if answers.fingerprint is not None:
        if not networks.same_fingerprint(answers.fingerprint, facts.fingerprint):
            raise ConfigurationError(
                "the trust document has another fingerprint than --fingerprint says; nothing was "
                "written"
            )
        return
    if facts.vouched:
        return
    if answers.yes:
        raise ConfigurationError(
            "this trust document comes from the gateway, which could name its own roots; compare "
            "its fingerprint with the operator's and give it with --fingerprint, or give the "
            "operator's file with --trust"
        )
    print(
        "   It comes from the gateway itself. Compare the fingerprint with one that the operator "
        "publishes elsewhere."
    )
    if not typer.confirm("   is it the same", default=False):
        raise ConfigurationError("not confirmed; nothing was written")


# ---- question 2 ----


def _engine(answers: Answers) -> Engine:
    if answers.engine is not None:
        return _named_engine(answers.engine, answers.model)
    found = engines.found_here()
    if answers.model is not None:
        return _of_name(found, answers.model, "this machine")
    if answers.yes:
        return found[0]
    print("2. What to serve? Found on this machine:")
    for number, one in enumerate(found, 1):
        print(f"   {number}) {one.told}")
    return _again("number", "1", lambda said: _in_list(found, said))


def _in_list(found: list[Engine], said: str) -> Engine:
    if not (said.isascii() and said.isdigit() and len(said) < 4 and 1 <= int(said) <= len(found)):
        raise BadRequest(f"there is no {said} in the list; it ends with {len(found)}")
    return found[int(said) - 1]


def _named_engine(engine: str, model: str | None) -> Engine:
    if engine == "embedded":
        if model not in (None, engines.SHIPPED):
            raise BadRequest(
                "the embedded engine serves skills-1 here; for a folder of your own edit the file "
                "that init writes"
            )
        return Engine(engines.SHIPPED, "embedded")
    found = engines.at(engine)
    if found and found[0].kind == "triton":
        if model is None:
            raise BadRequest("a Triton serves many models; name one with --model")
        return Engine(model, "triton", engine)
    if not found:
        raise ConfigurationError(f"{engine} names no models; does the server run, is it /v1?")
    return found[0] if model is None else _of_name(found, model, engine)


def _of_name(found: list[Engine], model: str, where: str) -> Engine:
    for one in found:
        if one.model == model:
            return one
    raise ConfigurationError(
        f"{where} serves no {model}; it has {', '.join(one.model for one in found)}"
    )


# ---- question 3 ----


def _price(answers: Answers, facts: NetworkFacts, engine: Engine) -> Prices:
    try:
        others = offers(facts.gateway, engine.model, ca_file=facts.ca_file)
    except CocoonError:
        others = []  # a network without a provider of it says so; then there is no market
    middle = median(others) if others else FIRST_PRICES
    if answers.price is None and answers.yes:
        return middle
    asked = answers.price
    if asked is None:
        market = (
            f"{len(others)} offer it, for {format_ton(min(o.output for o in others))} to "
            f"{format_ton(max(o.output for o in others))}" if others
            else "nobody else offers it yet"
        )  # fmt: skip
        print(f"3. Which price? TON per million tokens of the answer; {market}.")
        return _again("price", format_ton(middle.output), lambda said: _prices(said, middle))
    return _prices(asked, middle)


def _prices(asked: str, middle: Prices) -> Prices:
    try:
        output = parse_ton(asked)
    except ValueError as error:
        raise BadRequest(f"the price: {error}") from None
    if output > MOST_NANOTON:
        raise BadRequest(f"the price: at most {format_ton(MOST_NANOTON)} TON per million tokens")
    if output == middle.output:
        return middle
    # the prompt's prices in the proportion that the market has
    scale = max(middle.output, 1)
    return Prices(output * middle.input // scale, output * middle.cached_input // scale, output)


# ---- the files ----


def write(
    place: Path, facts: NetworkFacts, engine: Engine, prices: Prices, region: str | None
) -> AgentConfig:
    """Write everything, the one file last: what is there is never overwritten."""
    from pydantic import ValidationError

    from cocoon.agent.config import AgentConfig, sentences
    from cocoon.evidence.trust import parse_trust

    place = place.absolute()
    model: dict[str, object] = {
        "name": engine.model, "engine": engine.kind,
        "price": {"input": prices.input, "cached_input": prices.cached_input,
                  "output": prices.output},
    }  # fmt: skip
    if engine.kind != "embedded":
        model |= {"url": engine.url, "context_tokens": engine.context_tokens}
    if engine.metrics_url:
        model["metrics_url"] = engine.metrics_url
    try:
        config = AgentConfig.model_validate({
            "network": {
                "gateway": facts.gateway, "bus": facts.bus, "trust_file": place / "trust.json",
                "policy_file": place / "policy.json",
                "ca_file": place / "bus-ca.pem" if facts.ca_pem is not None else None,
            },
            "agent": {
                "seed_file": place / "identity.seed", "data_dir": place / "data",
                "environment": "dev" if parse_trust(facts.trust).is_dev else "prod",
                "region": region,
            },
            "tee": _tee(place, facts),
            "models": [model],
        })  # fmt: skip
    except ValidationError as error:
        raise BadRequest(f"nothing was written: {' '.join(sentences(error))}") from None
    _write_files(place, facts, config)
    return config


def _write_files(place: Path, facts: NetworkFacts, config: AgentConfig) -> None:
    from cocoon.agent.writing import write_config
    from cocoon.bus.keys import seed_file

    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        seed_file(place / "identity.seed", secrets.token_bytes(32))
        _write_new(place / "trust.json", facts.trust)
        _write_new(place / "policy.json", facts.policy)
        if facts.ca_pem is not None:
            _write_new(place / "bus-ca.pem", facts.ca_pem.encode())
        if config.tee.dev_authority_file and config.tee.dev_platform_file:
            _make_platform(config.tee.dev_authority_file, config.tee.dev_platform_file)
        (place / "data").mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigurationError(f"{place} cannot be written ({error.strerror})") from None
    write_config(config, place / FILE_NAME)


def _write_new(path: Path, data: bytes) -> None:
    """Raises ConfigurationError if another content is there."""
    if path.exists():
        if path.read_bytes() != data:
            raise ConfigurationError(
                f"{path} is there with another content; move it away, or name another --folder"
            )
        return
    path.write_bytes(data)


def _tee(place: Path, facts: NetworkFacts) -> dict[str, object]:
    """Simulated on a devnet, TDX where the kernel gives quotes, else the open tier."""
    if facts.devnet is not None:
        from cocoon.devnet.folder import DataFolder

        return {
            "kind": "simulated", "dev_authority_file": DataFolder(facts.devnet).authority,
            "dev_platform_file": place / "platform.json",
        }  # fmt: skip
    return {"kind": "tdx" if TSM_REPORTS.is_dir() else "none"}


def _make_platform(authority: Path, machine: Path) -> None:
    from cocoon.devnet.authority import DevAuthority
    from cocoon.kernel.clock import SystemClock

    if not machine.exists():
        DevAuthority.load(authority).platform(SystemClock().now_ms()).save(machine)


def _tell(place: Path, config: AgentConfig, facts: NetworkFacts) -> None:
    from cocoon.cli.provider_session import provider_id_of

    model = config.models[0]
    option = "" if place == default_folder() else f" --config {shlex.quote(str(place / FILE_NAME))}"
    tiers = {
        "simulated": "simulated (DEV ONLY)",
        "tdx": "attested, by this machine's TDX",
        "none": "open: this machine has no TEE, so only clients that ask for this tier send jobs",
    }
    print(f"""
{place / FILE_NAME}
  provider  {provider_id_of(config)}
  network   {facts.gateway}
  serves    {model.name} ({model.engine})
  price     {format_ton(model.price.output)} TON per million tokens of the answer
  tier      {tiers[config.tee.kind]}
  key       {config.agent.seed_file} (keep it: whoever has it is this provider)

Next: ./cocoon provider doctor{option}
Then: ./cocoon provider run{option}""")
