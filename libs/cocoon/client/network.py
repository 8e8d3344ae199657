"""Composition: from a gateway's address and an owner's trust to a door that answers.

Opens the lines to the gateway; everything below it is handed its resources.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cocoon.client.counting import Counters
from cocoon.client.directory import Directory
from cocoon.client.door import Door
from cocoon.client.gateway import Gateway, check_url
from cocoon.client.kept import KeptRequests
from cocoon.client.lines import Lines
from cocoon.client.manifests import fetch_manifest
from cocoon.client.session import Preferences, SealedSession
from cocoon.client.trust import TrustKeeper
from cocoon.contracts.matching import Preferences as Wishes
from cocoon.evidence.trust import TrustAnchors, load_trust
from cocoon.evidence.verdict import Assurance
from cocoon.kernel.clock import Clock, Randomness, SystemClock, SystemRandomness
from cocoon.kernel.errors import ConfigurationError
from cocoon.models import ModelManifest
from cocoon.sealing import Profile

_BODY_PROFILES = (Profile.P0, Profile.P3)
_STREAM_PROFILES = (Profile.P1, Profile.P2, Profile.P3)


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """Which network, whom to believe, and what to accept.

    trust: the anchors, or the file that holds them; never from the gateway. api_key: the
    gateway's (`ck_...`); None takes each caller's own. state_dir keeps across restarts what must
    not go back, and what was sealed under Idempotency-Keys; one client at a time uses it.
    assurances: None means every attested tier, and simulated only under a dev trust file; a single
    request may then ask for the open tier (no TEE: who owns the machine can read it) by
    `provider.tiers`. Those that are named here are all that any request can get.
    max_price_nanoton bounds one request. model_pins: names to the model ids they must have.
    affinity: whether conversations go where their beginning is warm; the network can then tell that
    two requests of an account have the same beginning, and not which. wishes: what is asked of the
    provider of a request that has no `provider` of its own. tokenizers: model names to the folders
    with their tokenizer.json; answers' tokens are counted with them, else by bytes.
    """

    gateway_url: str
    trust: TrustAnchors | Path | str
    api_key: str | None = field(default=None, repr=False)
    state_dir: Path | str | None = None
    assurances: Collection[Assurance] | None = None
    body_profile: Profile = Profile.P0
    stream_profile: Profile = Profile.P2
    max_price_nanoton: int | None = None
    model_pins: Mapping[str, str] | None = None
    affinity: bool = True
    wishes: Wishes | None = None
    tokenizers: Mapping[str, Path | str] | None = None
    local_key: str | None = field(default=None, repr=False)
    clock: Clock = field(default_factory=SystemClock)
    randomness: Randomness = field(default_factory=SystemRandomness)


class Network:
    """An open connection to a network: `session` for sealed jobs, `door` for OpenAI's HTTP.

    Belongs to one event loop. Raises ConfigurationError for options that cannot work.
    """

    def __init__(self, options: NetworkOptions) -> None:
        trust = (
            options.trust if isinstance(options.trust, TrustAnchors) else load_trust(options.trust)
        )
        check_options(options)
        counters = Counters(options.tokenizers)
        self._kept = KeptRequests(
            None if options.state_dir is None else Path(options.state_dir),
            clock=options.clock, randomness=options.randomness,
        )  # fmt: skip
        try:
            keeper = TrustKeeper(trust, clock=options.clock, state_dir=options.state_dir)
            self._kept.sweep()
            self._lines = Lines(options.gateway_url)
        except BaseException:
            self._kept.close()
            raise
        self.gateway = Gateway(self._lines)
        self._directory = Directory(
            self.gateway, keeper, clock=options.clock, model_pins=options.model_pins
        )
        preferences = Preferences(
            assurances=_assurances(options, trust),
            open_on_request=options.assurances is None,
            body_profile=options.body_profile,
            stream_profile=options.stream_profile,
            max_price_nanoton=options.max_price_nanoton,
            affinity=options.affinity,
            wishes=options.wishes,
            counters=counters,
        )
        self.session = SealedSession(
            self.gateway, self._directory, preferences, self._kept, clock=options.clock,
            randomness=options.randomness,
        )  # fmt: skip
        self.door = Door(
            self.session, clock=options.clock, api_key=options.api_key, local_key=options.local_key
        )

    async def manifest_of(self, model_id: str) -> ModelManifest:
        """What exactly answered: the manifest of an answer's model id, checked by its hash.

        Raises NotFound if nobody published it, EvidenceRejected for other bytes.
        """
        return await fetch_manifest(self.gateway, model_id)

    async def aclose(self) -> None:
        """Cancel running jobs, end refreshes, close the lines, let go of the state directory."""
        try:
            await self.door.aclose()
            await self._directory.aclose()
            await self.gateway.aclose()
            await self._lines.aclose()
        finally:
            self._kept.close()


def check_options(options: NetworkOptions) -> None:
    """Raises ConfigurationError for an address or a padding that cannot work."""
    check_url(options.gateway_url)
    if options.body_profile not in _BODY_PROFILES or options.stream_profile not in _STREAM_PROFILES:
        raise ConfigurationError(
            "A whole body is padded by P0 (or P3, none), a stream by P2 or P1 (or P3, none)."
        )


def _assurances(options: NetworkOptions, trust: TrustAnchors) -> frozenset[Assurance]:
    if options.assurances is not None:
        return frozenset(options.assurances)
    attested = {Assurance.FACILITY, Assurance.ATTESTED}
    return frozenset(attested | {Assurance.SIMULATED} if trust.is_dev else attested)
