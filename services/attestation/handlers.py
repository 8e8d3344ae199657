"""What attestation does when it is asked: load -> decide -> append. Refusals append nothing.

The only writer of providers' streams and of the policy's stream; one decision a provider at a time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from cocoon.contracts import commands as c
from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.messages import (
    BanRequest,
    BundleRequest,
    Challenge,
    DirectoryRequest,
    EnrolRequest,
    Heartbeat,
    OfferRequest,
)
from cocoon.domain import decide as domain
from cocoon.domain.provider import ProviderState
from cocoon.eventlog.append import Appended, LogAppender
from cocoon.evidence.collateral import CollateralFloors
from cocoon.evidence.policy import SignedPolicy, policy_hash
from cocoon.evidence.provider import ProviderEvidence, parse_evidence, verify_provider
from cocoon.evidence.trust import TrustAnchors
from cocoon.evidence.verdict import Verdict
from cocoon.kernel.clock import Clock, Randomness
from cocoon.kernel.errors import CocoonError, Forbidden, RateLimited, Unavailable
from cocoon.telemetry import metrics
from cocoon.telemetry.logs import get_logger
from services.attestation import decide, store
from services.attestation.challenges import Challenges
from services.attestation.memory import Memory
from services.attestation.settings import AttestationSettings

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Pool

log = get_logger("services.attestation")
MAX_CONFLICTS = 5
CONFLICT_PAUSE_S = 0.05
WRITES_WINDOW_S = 600.0
DAY_MS = 86_400_000
HOUSEKEEPING_S = 3600.0


class Attestation:
    """The network shard's attestation. All methods run on one event loop."""

    def __init__(
        self,
        settings: AttestationSettings,
        trust: TrustAnchors,
        signed: SignedPolicy,
        memory: Memory,
        appender: LogAppender,
        pool: Pool,
        clock: Clock,
        randomness: Randomness,
        stop: Callable[[CocoonError], None],
    ) -> None:
        self.memory = memory
        self.stop = stop
        self._settings, self._trust, self._signed = settings, trust, signed
        self._appender, self._pool = appender, pool
        self._clock, self._randomness = clock, randomness
        self._challenges = Challenges(settings.max_providers, settings.challenge_ttl_s * 1000)
        self._floors = CollateralFloors()
        self._bans: dict[str, str] = {}  # provider id -> its machine's PPID
        self._writes: dict[str, deque[float]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._threads = ThreadPoolExecutor(settings.verifications, "verify")
        self._verifying = 0
        self._reevaluate = False
        self._housekept_s = float("-inf")

    # ---- start and end ----

    async def load(self) -> None:
        """Read this service's tables, once the memory has caught up with the log."""
        self._floors = await store.load_floors(self._pool)
        self._bans = await store.load_bans(self._pool)
        found = await store.load_evidence(self._pool, self.memory.evidence_ids())
        for evidence_id, (evidence, ppid) in found.items():
            self.memory.remember_evidence(evidence_id, evidence, ppid)

    async def publish_policy(self) -> None:
        """Append the policy if it is new, and judge the standing evidence by it.

        Raises ConfigurationError for an older policy or one that does not follow the current one.
        """
        command = decide.policy_command(self.memory.policy, self._signed.policy)
        if command is not None:
            await self._append(command)
            log.info("policy_published", version=command.version, policy_hash=command.policy_hash)
        current = policy_hash(self._signed.policy).hex()
        if any(s.attested and s.attested.policy_hash != current for _, s in self.memory.attested()):
            await self.reevaluate()

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    # ---- what is heard ----

    def on_network_event(self, stored: StoredEvent) -> None:
        self.memory.apply(stored)

    def on_heartbeat(self, beat: Heartbeat) -> None:
        self.memory.heartbeat(beat, self._clock.monotonic_s())

    # ---- providers ----

    async def do_enrol(self, provider_id: str, body: bytes, traceparent: str) -> dict[str, object]:
        command = decide.enrol_command(
            provider_id, EnrolRequest.model_validate_json(body), self._signed.policy
        )
        decide.check_ban(self._bans, provider_id)
        known = provider_id in self.memory.providers
        if not known and len(self.memory.providers) >= self._settings.max_providers:
            raise RateLimited(
                "this network takes no more providers now; ask its operator",
                code="too_many_providers",
                retry_after_s=3600,
            )
        await self._append(command, traceparent)
        if not known:
            log.info("provider_enrolled", provider_id=provider_id, tier=command.tier)
        return {"provider_id": provider_id, "tier": command.tier}

    async def do_challenge(self, provider_id: str, _body: bytes, _tp: str) -> Challenge:
        decide.require_enrolled(self.memory.providers.get(provider_id))
        decide.check_ban(self._bans, provider_id)
        return self._challenges.issue(
            provider_id, self.memory.head_hash, self._randomness.token(32), self._clock.now_ms()
        )

    async def do_submit_evidence(
        self, provider_id: str, body: bytes, traceparent: str
    ) -> dict[str, object]:
        evidence = parse_evidence(body)
        if evidence.provider_id != provider_id:
            raise Forbidden(
                "the evidence was made for another provider id; make it with your own",
                code="identity_mismatch",
            )
        decide.require_enrolled(self.memory.providers.get(provider_id))
        decide.check_ban(self._bans, provider_id)
        decide.check_size(evidence)
        self._check_room()
        self._challenges.spend(evidence, self._clock.now_ms())
        verdict = await self._verify(evidence)
        metrics.VERDICTS.inc(verdict.outcome.value, "ok" if verdict.ok else verdict.code)
        if not verdict.ok:
            log.warning("evidence_refused", provider_id=provider_id, verdict=str(verdict))
        command = decide.attest_command(evidence, verdict, self._signed.policy)
        ppid = verdict.facts.ppid if verdict.facts else ""
        decide.check_ban(self._bans, provider_id, ppid)
        evidence_id = bytes.fromhex(command.evidence_id)
        await store.save_evidence(self._pool, evidence_id, evidence, ppid, self._clock.now_ms())

        def still_welcome() -> bool:
            decide.check_ban(self._bans, provider_id, ppid)
            return True

        position = await self._append(command, traceparent, still_welcome)
        self.memory.remember_evidence(command.evidence_id, evidence, ppid)
        log.info(
            "provider_attested", provider_id=provider_id, evidence_id=command.evidence_id,
            verdict=command.verdict, assurance=command.assurance, position=position,
            valid_until_ms=command.valid_until_ms,
        )  # fmt: skip
        return {
            "verdict": command.verdict,
            "assurance": command.assurance,
            "evidence_id": command.evidence_id,
            "valid_until_ms": command.valid_until_ms,
            "position": position,
        }

    async def do_publish_offer(
        self, provider_id: str, body: bytes, traceparent: str
    ) -> dict[str, object]:
        decide.require_enrolled(self.memory.providers.get(provider_id))
        decide.check_ban(self._bans, provider_id)
        command = decide.offer_command(
            provider_id,
            OfferRequest.model_validate_json(body),
            self._signed.policy,
            self.memory.evidence_of(provider_id),
        )
        return {"position": await self._append(command, traceparent)}

    async def do_publish_bundle(
        self, provider_id: str, body: bytes, traceparent: str
    ) -> dict[str, object]:
        raw = bytes.fromhex(BundleRequest.model_validate_json(body).bundle)
        state = self.memory.providers.get(provider_id, ProviderState())
        command = decide.bundle_command(state, raw, self._clock.now_ms())
        return {"key_id": command.key_id, "position": await self._append(command, traceparent)}

    # ---- the platform ----

    async def do_directory(self, _who: str, body: bytes, _tp: str) -> dict[str, object]:
        request = DirectoryRequest.model_validate_json(body)
        entries, following = self.memory.directory(
            request.model, request.after, self._clock.now_ms(), self._clock.monotonic_s()
        )
        return {
            "model": request.model,
            "policy": self._signed.model_dump(mode="json"),
            "log": {
                "shard0_position": self.memory.position,
                "hash": self.memory.head_hash.hex(),
            },
            "providers": entries,
            "next": following,
        }

    async def do_policy(self, _who: str, _body: bytes, _tp: str) -> dict[str, object]:
        return {
            "network_id": self._trust.network_id,
            "policy": self._signed.model_dump(mode="json"),
            "policy_hash": policy_hash(self._signed.policy).hex(),
        }

    async def do_ban(self, _who: str, body: bytes, traceparent: str) -> dict[str, object]:
        """Ban a provider and its machine, and revoke what stands on either; or lift the ban."""
        request = BanRequest.model_validate_json(body)
        if request.lift:
            await store.lift_ban(self._pool, request.provider_id)
            self._bans.pop(request.provider_id, None)
            return {"banned": False, "revoked": 0}
        state = self.memory.providers.get(request.provider_id)
        attested = state.attested if state else None
        ppid = self.memory.ppids.get(attested.evidence_id, "") if attested else ""
        ppid = ppid or self._bans.get(request.provider_id, "")
        await store.save_ban(self._pool, request.provider_id, ppid, self._clock.now_ms())
        self._bans[request.provider_id] = ppid
        return {"banned": True, "revoked": await self._revoke_banned(traceparent)}

    async def _revoke_banned(self, traceparent: str = "") -> int:
        """Revoke whatever stands on a banned provider or machine; how many."""
        banned = self.memory.banned(self._bans)
        for provider_id, evidence_id in banned:
            await self._revoke(provider_id, evidence_id, "banned", traceparent)
        return len(banned)

    # ---- time ----

    async def sweep(self) -> None:
        """Revoke what has run out, judge again after floors rose, keep the tables small."""
        now_ms = self._clock.now_ms()
        for provider_id, evidence_id in self.memory.expired(now_ms):
            await self._revoke(provider_id, evidence_id, "expired")
        await self._revoke_banned()  # what was being attested while its ban came in
        if self._reevaluate:
            self._reevaluate = False
            await self.reevaluate()
        ends_ms = self.memory.next_expiry_ms()
        metrics.NEXT_EXPIRY.set(-1 if ends_ms is None else max(0, ends_ms - now_ms) / 1000)
        metrics.PROVIDERS.set(len(self.memory.providers), "enrolled")
        metrics.PROVIDERS.set(sum(1 for _ in self.memory.attested()), "attested")
        if self._clock.monotonic_s() - self._housekept_s >= HOUSEKEEPING_S:
            self._housekept_s = self._clock.monotonic_s()
            before_ms = now_ms - self._settings.evidence_kept_days * DAY_MS
            await store.forget_evidence(self._pool, before_ms, self.memory.evidence_ids())

    async def reevaluate(self) -> None:
        """Judge every standing attestation again under the current policy, floors and time."""
        for provider_id, state in list(self.memory.attested()):
            if state.attested is None:
                continue
            evidence_id = state.attested.evidence_id
            evidence = self.memory.evidence_of(provider_id)
            if evidence is None:
                await self._revoke(provider_id, evidence_id, "evidence_missing")
                continue
            verdict = await self._verify(evidence)
            if verdict.ok:
                command = decide.attest_command(evidence, verdict, self._signed.policy)
                await self._append(command, "", self._stands(provider_id, evidence_id))
            else:
                await self._revoke(provider_id, evidence_id, verdict.code)

    def _stands(self, provider_id: str, evidence_id: str) -> Callable[[], bool]:
        """Whether the provider still stands on this evidence: nobody revoked it meanwhile."""

        def check() -> bool:
            attested = self.memory.providers[provider_id].attested
            return attested is not None and attested.evidence_id == evidence_id

        return check

    # ---- inside ----

    def _check_room(self) -> None:
        limit = self._settings.verifications + self._settings.verifications_waiting
        if self._verifying >= limit:
            raise RateLimited(
                "many providers attest at this moment; send the same evidence again shortly",
                code="busy",
                retry_after_s=2,
            )

    async def _verify(self, evidence: ProviderEvidence) -> Verdict:
        """Verify in a thread; floors that authentic collateral raised are kept before it counts."""
        self._verifying += 1
        began_s = self._clock.monotonic_s()
        try:
            verdict = await asyncio.get_running_loop().run_in_executor(
                self._threads, verify_provider, evidence, self._trust, self._signed, self._floors,
                self._clock.now_ms(),
            )  # fmt: skip
        finally:
            self._verifying -= 1
            metrics.VERIFY_SECONDS.observe(self._clock.monotonic_s() - began_s)
        if verdict.floors is not None:
            await self._raise_floors(verdict.floors)
        return verdict

    async def _raise_floors(self, seen: CollateralFloors) -> None:
        risen = self._floors
        for fmspc, floor in seen.by_fmspc.items():
            risen = risen.raised(fmspc, floor)
        if risen is not self._floors:
            await store.raise_floors(self._pool, risen)
            for fmspc, floor in self._floors.by_fmspc.items():  # another verdict may have raised it
                risen = risen.raised(fmspc, floor)
            self._floors = risen
            self._reevaluate = True

    async def _revoke(
        self, provider_id: str, evidence_id: str, reason: str, traceparent: str = ""
    ) -> None:
        await self._append(decide.revoke_command(provider_id, evidence_id, reason), traceparent)
        metrics.REVOCATIONS.inc(reason)
        log.warning("attestation_revoked", provider_id=provider_id, evidence_id=evidence_id,
                    reason=reason)  # fmt: skip

    async def _append(
        self,
        command: c.Command,
        traceparent: str = "",
        still_wanted: Callable[[], bool] | None = None,
    ) -> int:
        """Decide and append; the position of the last event (the log's, if nothing changed).

        `still_wanted` is asked once the stream is ours: what was decided before a wait may be over.
        """
        stream = domain.stream_of(command)
        async with self._locks.setdefault(stream, asyncio.Lock()):
            for _ in range(MAX_CONFLICTS):
                if still_wanted is not None and not still_wanted():
                    return self.memory.position
                state, version = self._state(stream)
                item = decide.item(state, version, command, traceparent)
                if item is None:
                    return self.memory.position
                if not isinstance(command, c.RevokeAttestation | c.PublishPolicy):
                    self._spend_write(stream)
                outcome = await self._appender.append(item)
                if isinstance(outcome, Appended):
                    for stored in outcome.events:
                        self.memory.apply(stored)
                    return outcome.positions[-1]
                await asyncio.sleep(CONFLICT_PAUSE_S)  # the tail brings the stream's new version
        raise Unavailable("the provider is changing; try again shortly", retry_after_s=1)

    def _state(self, stream: str) -> tuple[domain.State, int]:
        if stream == decide.NETWORK_POLICY:
            return None, self.memory.policy_versions
        state = self.memory.providers.get(stream.partition("/")[2], ProviderState())
        return state, state.version

    def _spend_write(self, stream: str) -> None:
        """A provider may grow the log only so fast."""
        now_s = self._clock.monotonic_s()
        spent = self._writes.setdefault(stream, deque())
        while spent and now_s - spent[0] > WRITES_WINDOW_S:
            spent.popleft()
        if len(spent) >= self._settings.writes_per_provider:
            raise RateLimited(
                "this provider has written too much to the log; try again in some minutes",
                retry_after_s=min(600, int(WRITES_WINDOW_S - (now_s - spent[0])) + 1),
            )
        spent.append(now_s)
