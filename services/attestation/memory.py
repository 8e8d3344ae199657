"""What attestation knows: providers and policy folded from shard 0, their evidence, their load.

All but the load can be rebuilt; losing the load leaves providers out of the directory for a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cocoon.contracts.envelope import GENESIS_HASH, StoredEvent
from cocoon.contracts.events import OfferedModel, PolicyPublished
from cocoon.contracts.messages import Heartbeat
from cocoon.domain import honesty as honesties
from cocoon.domain import provider as providers
from cocoon.domain.honesty import HonestyState
from cocoon.domain.open_tier import OPEN
from cocoon.domain.provider import ProviderState
from cocoon.evidence.provider import ProviderEvidence
from cocoon.kernel import canonical
from services.attestation.decide import NETWORK_POLICY
from services.attestation.shelf import Shelf

MAX_PAGE_BYTES = 400 * 1024  # JSON inside JSON, well within the bus's 1 MiB


@dataclass(frozen=True, slots=True)
class Load:
    """A provider's last heartbeat."""

    seen_s: float  # monotonic
    running: int
    concurrency: int
    draining: bool


@dataclass(slots=True)
class Memory:
    """`heartbeat_fresh_s`: how old a heartbeat may be for its provider to be listed."""

    heartbeat_fresh_s: float
    fee_bps: int
    providers: dict[str, ProviderState] = field(default_factory=dict)
    honesty: dict[str, HonestyState] = field(default_factory=dict)  # by provider id
    policy: PolicyPublished | None = None
    policy_versions: int = 0  # of the policy's stream
    position: int = 0
    head_hash: bytes = GENESIS_HASH
    evidence: dict[str, ProviderEvidence] = field(default_factory=dict)  # by evidence id
    ppids: dict[str, str] = field(default_factory=dict)  # by evidence id
    loads: dict[str, Load] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # key id -> who announced it first
    shelf: Shelf = field(default_factory=Shelf)  # the published manifests

    # ---- folding ----

    def apply(self, stored: StoredEvent) -> None:
        """Fold an event of shard 0; one that was folded before (our own, seen again) is ignored."""
        if stored.position > self.position:
            self.position, self.head_hash = stored.position, stored.hash
        aggregate, _, ident = stored.stream.partition("/")
        if aggregate == "provider":
            state = self.providers.get(ident, ProviderState())
            if stored.version == state.version + 1:
                self.providers[ident] = providers.evolve(state, stored.decode())
                self._hold_keys(ident, state, self.providers[ident])
                for evidence_id in held_evidence(state) - held_evidence(self.providers[ident]):
                    self.evidence.pop(evidence_id, None)
                    self.ppids.pop(evidence_id, None)
        elif aggregate == "honesty":
            known = self.honesty.get(ident, HonestyState())
            if stored.version == known.version + 1:
                self.honesty[ident] = honesties.evolve(known, stored.decode())
        elif stored.stream == NETWORK_POLICY and stored.version == self.policy_versions + 1:
            event = stored.decode()
            self.policy_versions = stored.version
            self.policy = event if isinstance(event, PolicyPublished) else self.policy

    def _hold_keys(self, provider_id: str, before: ProviderState, now: ProviderState) -> None:
        held = {bundle.key_id for bundle in now.bundles}
        for bundle in before.bundles:
            if bundle.key_id not in held and self.keys.get(bundle.key_id) == provider_id:
                del self.keys[bundle.key_id]
        for key_id in held:
            self.keys.setdefault(key_id, provider_id)

    def remember_evidence(self, evidence_id: str, evidence: ProviderEvidence, ppid: str) -> None:
        self.evidence[evidence_id] = evidence
        self.ppids[evidence_id] = ppid

    def heartbeat(self, beat: Heartbeat, now_s: float) -> None:
        """Take a heartbeat of an enrolled provider; others are nothing to us."""
        if beat.provider_id in self.providers:
            self.loads[beat.provider_id] = Load(
                now_s, len(beat.running), beat.concurrency, beat.draining
            )

    # ---- asking ----

    def attested(self) -> Iterator[tuple[str, ProviderState]]:
        """Providers with a standing attestation, by id."""
        for provider_id in sorted(self.providers):
            state = self.providers[provider_id]
            if state.attested is not None:
                yield provider_id, state

    def standing_open(self, now_ms: int) -> list[str]:
        """The ids of the providers that stand in the open tier, in order."""
        return [
            provider_id
            for provider_id, state in self.attested()
            if state.attested is not None
            and state.attested.assurance == OPEN
            and state.attested.valid_until_ms > now_ms
        ]

    def evidence_ids(self) -> set[str]:
        """All evidence that is in use: current, or renewed with keys that still live."""
        return {item for state in self.providers.values() for item in held_evidence(state)}

    def evidence_of(self, provider_id: str) -> ProviderEvidence | None:
        state = self.providers.get(provider_id)
        return self.evidence.get(state.attested.evidence_id) if state and state.attested else None

    def offered_ids(self) -> set[str]:
        """The model ids that attested providers offer."""
        return {
            model.model_id
            for _, state in self.attested()
            for model in (state.offer.models if state.offer else ())
        }

    def expired(self, now_ms: int) -> list[tuple[str, str]]:
        """(provider id, evidence id) of attestations whose time is up."""
        return [
            (provider_id, state.attested.evidence_id)
            for provider_id, state in self.attested()
            if state.attested is not None and state.attested.valid_until_ms <= now_ms
        ]

    def banned(self, bans: Mapping[str, str]) -> list[tuple[str, str]]:
        """(provider id, evidence id) of attestations on banned providers or machines."""
        machines = {ppid for ppid in bans.values() if ppid}
        return [
            (provider_id, state.attested.evidence_id)
            for provider_id, state in self.attested()
            if state.attested is not None
            and (provider_id in bans or self.ppids.get(state.attested.evidence_id) in machines)
        ]

    def dishonest(self) -> list[str]:
        """Providers that canaries found to cheat, until an operator lifts it."""
        return [provider_id for provider_id, found in self.honesty.items() if found.dishonest]

    def next_expiry_ms(self) -> int | None:
        ends = [s.attested.valid_until_ms for _, s in self.attested() if s.attested is not None]
        return min(ends, default=None)

    # ---- the directory ----

    def is_listed(self, provider_id: str, now_ms: int, now_s: float) -> bool:
        """Whether clients find this provider with any model now."""
        state = self.providers.get(provider_id)
        offered = state.offer.models if state and state.offer else ()
        return state is not None and any(
            self._entry(provider_id, state, one, now_ms, now_s) is not None for one in offered
        )

    def directory(
        self, model: str | None, after: str, now_ms: int, now_s: float
    ) -> tuple[list[dict[str, object]], str]:
        """One page of (provider, model) entries that a client may seal to now, and where to go on.

        Ordered by provider and model, so pages fit together; the last one's `next` is "".
        """
        entries: list[dict[str, object]] = []
        size, last = 0, ""
        for provider_id, state in self.attested():
            for offered in sorted(state.offer.models if state.offer else (), key=_by_model):
                key = f"{provider_id}/{offered.model_id}"
                if key <= after or model not in (None, offered.name, offered.model_id):
                    continue
                entry = self._entry(provider_id, state, offered, now_ms, now_s)
                if entry is None:
                    continue
                size += len(canonical.dumps(entry))
                if entries and size > MAX_PAGE_BYTES:
                    return entries, last
                entries.append(entry)
                last = key
        return entries, ""

    def _entry(
        self,
        provider_id: str,
        state: ProviderState,
        offered: OfferedModel,
        now_ms: int,
        now_s: float,
    ) -> dict[str, object] | None:
        attested, load = state.attested, self.loads.get(provider_id)
        if attested is None or attested.valid_until_ms <= now_ms:
            return None
        if load is None or load.draining or now_s - load.seen_s > self.heartbeat_fresh_s:
            return None
        live = [item for item in state.bundles if item.not_after_ms > now_ms]
        # until the first key under renewed evidence is out, the former's is shown with the former
        named = live[-1].evidence_id if live else attested.evidence_id
        bundles = [item.bundle for item in live if item.evidence_id == named]
        evidence = self.evidence.get(named)
        if not bundles or evidence is None or offered.model_id not in evidence.models:
            return None
        manifest = self.shelf.get(offered.model_id)
        return {
            "provider_id": provider_id,
            "tier": attested.assurance,
            "region": state.region,
            "quantisation": state.quantisation(offered.model_id),
            "manifest": manifest and {
                "kind": manifest.kind, "quantisation": manifest.quantisation
            },
            "evidence": evidence.model_dump(mode="json"),
            "bundles": bundles,
            "offer": {**offered.model_dump(mode="json"), "fee_bps": self.fee_bps},
            "load": {"running": load.running, "concurrency": load.concurrency},
        }  # fmt: skip


def held_evidence(state: ProviderState) -> set[str]:
    """The ids of a provider's evidence that clients may still be shown."""
    held = {bundle.evidence_id for bundle in state.bundles}
    return held | {state.attested.evidence_id} if state.attested else set()


def _by_model(offered: OfferedModel) -> str:
    return offered.model_id
