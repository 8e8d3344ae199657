"""Where a network is and what its word is checked against: from a devnet's folder or a gateway.

A trust document that came from a gateway counts only once a person has compared its fingerprint
with one that came another way; otherwise the gateway could name its own roots.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocoon.agent.market import get_json
from cocoon.kernel.errors import ConfigurationError

if TYPE_CHECKING:
    from cocoon.evidence.trust import TrustAnchors


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """What `init` learned. `vouched`: the trust document came from the operator, not a gateway."""

    gateway: str
    bus: tuple[str, ...]
    trust: bytes = field(repr=False)
    policy: bytes = field(repr=False)
    ca_pem: str | None = field(default=None, repr=False)
    devnet: Path | None = None
    vouched: bool = True

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.trust)


def fingerprint(trust: bytes) -> str:
    """SHA-256 of the document, in groups that a person can read out."""
    digest = hashlib.sha256(trust).hexdigest()
    return " ".join(digest[at : at + 8] for at in range(0, 64, 8))


def same_fingerprint(one: str, other: str) -> bool:
    return "".join(one.split()).lower() == "".join(other.split()).lower()


def from_devnet(folder: Path) -> NetworkFacts:
    """The network that runs from a folder of `./cocoon up`. Raises ConfigurationError."""
    from cocoon.devnet.folder import DataFolder

    place = DataFolder(folder)
    running = place.read_running()
    told = _network(running.gateway_url)
    bus = told.get("bus") if isinstance(told.get("bus"), dict) else None
    urls = tuple(map(str, bus.get("urls", ()))) if bus else ()
    return NetworkFacts(
        gateway=running.gateway_url,
        bus=urls or (running.nats_url,),
        trust=place.trust.read_bytes(),
        policy=place.policy.read_bytes(),
        ca_pem=bus.get("ca_pem") if bus else None,
        devnet=place.root,
    )


def from_gateway(gateway: str, trust_file: Path | None) -> NetworkFacts:
    """Ask a gateway; `trust_file` is what the network's operator gave.

    Raises ConfigurationError (no bus or no trust document told), Unavailable.
    """
    base = gateway.rstrip("/").removesuffix("/v1")
    told = _network(base)
    bus = told.get("bus")
    if not isinstance(bus, dict) or not bus.get("urls"):
        raise ConfigurationError(
            f"{base} does not say where its bus is, so nobody can join through it; ask its operator"
        )
    trust = _read(trust_file) if trust_file else _offered_trust(told, base)
    return NetworkFacts(
        gateway=base,
        bus=tuple(str(url) for url in bus["urls"]),
        trust=trust,
        policy=_canonical(told.get("policy")),
        ca_pem=str(bus["ca_pem"]) if bus.get("ca_pem") else None,
        vouched=trust_file is not None,
    )


def check(facts: NetworkFacts) -> TrustAnchors:
    """The policy is signed by whom the trust document names. Raises ConfigurationError."""
    from cocoon.evidence.policy import parse_policy, verify
    from cocoon.evidence.trust import parse_trust

    trust = parse_trust(facts.trust)
    try:
        signed = parse_policy(facts.policy)
    except ValueError as error:
        raise ConfigurationError(f"the network's policy: {error}") from None
    if not verify(signed, trust.policy_signers, trust.policy_threshold):
        raise ConfigurationError(
            "the network's policy is not signed by the keys that the trust document names; one of "
            "the two is another network's"
        )
    if signed.policy.network_id != trust.network_id:
        raise ConfigurationError("the policy is of another network than the trust document")
    return trust


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror})") from None


def _offered_trust(told: dict[str, Any], base: str) -> bytes:
    if not isinstance(told.get("trust"), dict):
        raise ConfigurationError(
            f"{base} hands out no trust document; get the network's from its operator and name it "
            "with --trust FILE"
        )
    return _canonical(told["trust"])


def _canonical(value: object) -> bytes:
    from cocoon.kernel import canonical

    if not isinstance(value, dict):
        raise ConfigurationError("the gateway tells no policy; is it a Cocoon gateway?")
    return canonical.dumps(value)


def _network(base: str) -> dict[str, Any]:
    return get_json(f"{base}/v1/network")
