"""The doctor's checks of the network: trust, clock, bus, standing, price."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from cocoon.agent.config import AgentConfig, ModelConfig
from cocoon.agent.dropped import sentence
from cocoon.agent.market import Prices, get_json, offers, percentile
from cocoon.bus.connection import close, connect
from cocoon.bus.keys import raw_public, read_seed_file
from cocoon.bus.permissions import inbox_prefix
from cocoon.bus.requests import ask
from cocoon.contracts import subjects
from cocoon.contracts.books import EarningsRequest
from cocoon.evidence.policy import parse_policy, verify
from cocoon.evidence.trust import load_trust
from cocoon.kernel.errors import CocoonError, ConfigurationError
from cocoon.kernel.ids import provider_id
from services.provider.findings import Finding, fail, ok, warn

if TYPE_CHECKING:
    from cocoon.bus.client import BusClient

CLOCK_WARN_MS, CLOCK_FAIL_MS = 1_000, 10_000
DEAR_PERCENTILE: Final = 75
FEW: Final = 3  # offers, below which a percentile says nothing
SOON_MS: Final = 10 * 60_000
CONNECT_S: Final = 8.0
MOST_URLS: Final = 8


def trust(config: AgentConfig) -> Finding:
    """The trust file reads, and the policy beside it is signed by whom it names."""
    try:
        anchors = load_trust(config.network.trust_file)
        place = config.network.policy_file or config.network.trust_file.with_name("policy.json")
        signed = parse_policy(place.read_bytes())
    except (ConfigurationError, OSError, ValueError) as error:
        told = (
            error.message if isinstance(error, ConfigurationError) else "the policy cannot be read"
        )
        return fail("trust", told, "get both files from the network's operator again")
    if not verify(signed, anchors.policy_signers, anchors.policy_threshold):
        return fail(
            "trust", "the policy is not signed by the keys that the trust file names",
            "get both files from the network's operator again",
        )  # fmt: skip
    if anchors.is_dev != (config.agent.environment == "dev"):
        return fail(
            "trust", f"the network is of class {anchors.network_class} and [agent] environment is "
            f"{config.agent.environment}", f'set environment = "{anchors.network_class}"',
        )  # fmt: skip
    return ok("trust", f"network {anchors.network_id}, policy version {signed.policy.version}")


def clock(config: AgentConfig) -> Finding:
    """This machine's clock beside the gateway's."""
    if config.network.gateway is None:
        return warn("clock", "no gateway is named to compare with", "name it in [network] gateway")
    began_ms = time.time_ns() // 1_000_000
    try:
        theirs = int(_told(config)["now_ms"])
    except CocoonError as error:
        return fail("clock", error.message, "mend [network] gateway, or ask its operator")
    except (KeyError, TypeError, ValueError):
        return warn("clock", "the gateway tells no time", "keep the clock by NTP")
    ended_ms = time.time_ns() // 1_000_000
    return clock_finding((began_ms + ended_ms) // 2 - theirs, ended_ms - began_ms)


def _told(config: AgentConfig) -> dict[str, Any]:
    return get_json(f"{config.network.gateway}/v1/network", config.network.ca_file)


def clock_finding(off_ms: int, round_trip_ms: int) -> Finding:
    """`off_ms`: how much this clock is ahead; half of the way there and back is not known."""
    told = f"{abs(off_ms):,} ms {'ahead of' if off_ms > 0 else 'behind'} the gateway's"
    sure_ms = abs(off_ms) - round_trip_ms // 2
    if sure_ms > CLOCK_FAIL_MS:
        return fail("clock", told, "set it by NTP: keys and evidence would be refused as expired")
    if sure_ms > CLOCK_WARN_MS:
        return warn("clock", told, "keep it by NTP (timedatectl set-ntp true)")
    return ok("clock", told)


def own_id(config: AgentConfig) -> str:
    """The provider's id, from its key. Raises ConfigurationError."""
    return provider_id(raw_public(read_seed_file(config.agent.seed_file)))


async def bus(config: AgentConfig) -> list[Finding]:
    """Connect with this key, and ask in its own name."""
    try:
        name = own_id(config)
    except ConfigurationError as error:
        return [fail("bus", error.message, "`./cocoon provider init` makes the key")]
    try:
        nc = await connect(
            config.network.bus, config.agent.seed_file, "provider-doctor", inbox_prefix(name),
            timeout_s=CONNECT_S, ca_file=config.network.ca_file,
        )  # fmt: skip
    except ConfigurationError as error:
        remedy = f"ask the network's operator, and tell him the provider's id, {name}"
        return [fail("bus", error.message, remedy)]
    except CocoonError as error:
        return [fail("bus", error.message, await asyncio.to_thread(_bus_remedy, config))]
    try:
        return [ok("bus", f"it takes this key ({name})"), *await _ask(nc, name)]
    finally:
        await close(nc)


def _bus_remedy(config: AgentConfig) -> str:
    """What to do about a bus that does not answer: the gateway may name other addresses by now."""
    check = "check [network] bus and ca_file, and a firewall (agents dial out only)"
    if config.network.gateway is None:
        return check
    try:
        told = _told(config)["bus"]
        urls = [str(url) for url in told["urls"][:MOST_URLS]]
        urls = [url for url in urls if urlsplit(url).scheme == urlsplit(urls[0]).scheme]
        has_ca = bool(told.get("ca_pem"))
    except (CocoonError, LookupError, TypeError, ValueError):
        return check
    if not urls or set(urls) & set(config.network.bus):
        return check
    ca = " and ca_file to the operator's bus-ca.pem" if has_ca else ""
    return (
        f"the gateway names other addresses now: set [network] bus to {json.dumps(urls)}{ca}, "
        "and start the agent again"
    )


async def _ask(nc: BusClient, name: str) -> list[Finding]:
    """How it stands there, and once it has a place on the bus, whether it may ask for its books."""
    try:
        answer = json.loads(await ask(nc, subjects.attestation(name, "standing")))
    except CocoonError as error:
        return [fail("standing", error.message, "ask the network's operator")]
    found = [standing(answer, time.time_ns() // 1_000_000)]
    if not answer.get("enrolled") or answer.get("banned"):
        return found  # then it may ask for nothing else
    try:
        await ask(nc, subjects.books(name, "earnings"), EarningsRequest(limit=1))
    except CocoonError as error:
        remedy = "wait a minute if it has just enrolled; else ask the network's operator"
        return [*found, warn("bus permissions", error.message, remedy)]
    return [*found, ok("bus permissions", "it may ask for its own books")]


def standing(told: dict[str, Any], now_ms: int) -> Finding:
    """How attestation sees this provider."""
    last = told.get("last_refusal")
    why = f"; last refused: {last['code']}, {last['message']}" if last else ""
    revoked = told.get("revoked") or {}
    if told.get("banned"):
        reason = "canary" if revoked.get("reason") == "canary" else "banned"
        return fail("standing", reason, sentence(reason))
    if not told.get("enrolled"):
        return warn("standing", f"not enrolled yet{why}", "`./cocoon provider run` enrols it")
    if revoked:
        return fail("standing", f"dropped: {revoked['reason']}{why}", sentence(revoked["reason"]))
    if not told.get("attested"):
        state = fail if last else warn
        return state(
            "standing", f"enrolled, no evidence stands{why}",
            "`./cocoon provider run` sends evidence; a refusal says what to mend",
        )  # fmt: skip
    left_ms = int(told["evidence_valid_until_ms"]) - now_ms
    if left_ms < SOON_MS:
        return warn(
            "standing", f"its evidence runs out in {max(0, left_ms) // 1000} s",
            "let the agent run: it renews evidence hourly",
        )  # fmt: skip
    listed = "clients find it" if told.get("listed") else "clients do not find it: no agent runs"
    return ok("standing", f"{told['tier']}, for {left_ms // 60_000:,} minutes; {listed}")


def price(config: AgentConfig, model: ModelConfig) -> Finding:
    """Where the price stands among the offers of the same model."""
    name = f"price of {model.name}"
    if config.network.gateway is None:
        return warn(name, "no gateway is named to compare with", "name it in [network] gateway")
    try:
        others = offers(config.network.gateway, model.name, own_id(config), config.network.ca_file)
    except CocoonError as error:
        return warn(name, error.message, "look again when the gateway answers")
    own = Prices(model.price.input, model.price.cached_input, model.price.output)
    return price_finding(name, own, others)


def price_finding(name: str, own: Prices, others: Sequence[Prices]) -> Finding:
    if not others:
        return ok(name, "nobody else offers this model now")
    cheaper = percentile(own, others)
    told = f"{len(others)} others offer it; {cheaper} % of them are cheaper"
    middle = sorted(one.output for one in others)[(len(others) - 1) // 2]
    if own.output > 4 * middle:
        return warn(
            name, f"{told}, and it is over four times the middle price: clients seal to nobody so "
            "dear", f"ask at most {4 * middle} nanoTON; `./cocoon provider simulate` tells what a "
            "price would bring",
        )  # fmt: skip
    if len(others) >= FEW and cheaper > DEAR_PERCENTILE:
        return warn(name, told, "`./cocoon provider simulate` tells what another price would bring")
    return ok(name, told)
