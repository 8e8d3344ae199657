"""What attestation does when it is asked: load -> decide -> append. Refusals append nothing.

The only writer of providers' streams and of the policy's stream; one decision a provider at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from cocoon.contracts.commands import LiftHonesty
from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.messages import (
    BanRequest,
    BundleRequest,
    CanaryRequest,
    Challenge,
    DirectoryRequest,
    EnrolRequest,
    Heartbeat,
    OfferRequest,
    ProfileRequest,
)
from cocoon.domain.honesty import HonestyState
from cocoon.domain.open_tier import OPEN
from cocoon.domain.provider import ProviderState
from cocoon.eventlog.append import LogAppender
from cocoon.evidence.policy import SignedPolicy, policy_hash
from cocoon.evidence.provider import parse_evidence
from cocoon.evidence.trust import TrustAnchors
from cocoon.kernel.clock import Clock, Randomness
from cocoon.kernel.errors import CocoonError, Forbidden, RateLimited
from cocoon.kernel.pace import Bucket, Buckets
from cocoon.telemetry import metrics
from cocoon.telemetry.logs import get_logger
from services.attestation import decide, store
from services.attestation.challenges import Challenges
from services.attestation.entry import Entry
from services.attestation.manifests import Manifests
from services.attestation.memory import Memory
from services.attestation.settings import AttestationSettings
from services.attestation.standing import Standings
from services.attestation.verifying import Verifier
from services.attestation.writing import Writer

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Pool

log = get_logger("services.attestation")
DAY_MS = 86_400_000
HOUSEKEEPING_S = 3600.0
TOO_OFTEN = "too_many_requests"
ASKED_PER_S, ASKED_AT_ONCE, STRANGERS = 1.0, 20, 16_384  # by one key from the lobby; keys counted


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
        entry: Entry,
        bans: dict[str, str],  # provider id -> its machine's PPID; filled by `load`
    ) -> None:
        self.memory, self._entry = memory, entry
        self.standings = Standings()
        self.stop = stop
        self._settings, self._trust, self._signed = settings, trust, signed
        self._pool = pool
        self._clock, self._randomness = clock, randomness
        self._challenges = Challenges(settings.max_providers, settings.challenge_ttl_s * 1000)
        self._verifier = Verifier(
            trust, signed, pool, clock,
            at_once=settings.verifications, waiting=settings.verifications_waiting,
        )  # fmt: skip
        self.manifests = Manifests(settings, pool, memory, clock)
        self._writer = Writer(
            memory, appender, clock, settings.writes_per_provider, self.on_network_event
        )
        self._open_places = asyncio.Lock()
        self._bans = bans
        self._asking = Buckets(ASKED_PER_S, ASKED_AT_ONCE, STRANGERS)
        self._enrolments = Bucket(
            settings.enrolments_per_minute / 60, settings.enrolments_per_minute
        )
        self._housekept_s = float("-inf")

    # ---- start and end ----

    async def load(self) -> None:
        """Read this service's tables, once the memory has caught up with the log."""
        await self._verifier.load()
        await self.manifests.load()
        self._bans.update(await store.load_bans(self._pool))
        found = await store.load_evidence(self._pool, self.memory.evidence_ids())
        for evidence_id, (evidence, ppid) in found.items():
            self.memory.remember_evidence(evidence_id, evidence, ppid)

    async def publish_policy(self) -> None:
        """Append the policy if it is new, and judge the standing evidence by it.

        Raises ConfigurationError for an older policy or one that does not follow the current one.
        """
        command = decide.policy_command(self.memory.policy, self._signed.policy)
        if command is not None:
            await self._writer.append(command)
            log.info("policy_published", version=command.version, policy_hash=command.policy_hash)
        current = policy_hash(self._signed.policy).hex()
        if any(s.attested and s.attested.policy_hash != current for _, s in self.memory.attested()):
            await self.reevaluate()

    def close(self) -> None:
        self._verifier.close()

    # ---- what is heard ----

    def on_network_event(self, stored: StoredEvent) -> None:
        self.memory.apply(stored)
        self.standings.apply(stored)

    def on_refusal(self, provider_id: str, verb: str, error: CocoonError) -> None:
        self.standings.refused(provider_id, verb, error, self._clock.now_ms())

    def on_heartbeat(self, beat: Heartbeat) -> None:
        self.memory.heartbeat(beat, self._clock.monotonic_s())

    # ---- providers ----

    async def do_enrol(self, provider_id: str, body: bytes, traceparent: str) -> dict[str, object]:
        command = decide.enrol_command(
            provider_id, EnrolRequest.model_validate_json(body), self._signed.policy
        )
        decide.check_honest(self.memory.honesty.get(provider_id))
        decide.check_ban(self._bans, provider_id)
        if command.tier == OPEN:
            self._check_open_places(provider_id)
        known = provider_id in self.memory.providers
        if not known and len(self.memory.providers) >= self._settings.max_providers:
            raise RateLimited(
                "this network takes no more providers now; ask its operator",
                code="too_many_providers",
                retry_after_s=3600,
            )
        if not known and not self._enrolments.take(self._clock.monotonic_s()):
            raise RateLimited(
                "many providers enrol at this moment; try again in a minute",
                code="too_many_enrolments",
                retry_after_s=60,
            )
        await self._entry.take(provider_id)
        await self._writer.append(command, traceparent)
        if not known:
            log.info("provider_enrolled", provider_id=provider_id, tier=command.tier)
        return {"provider_id": provider_id, "tier": command.tier}

    async def do_challenge(self, provider_id: str, _body: bytes, _tp: str) -> Challenge:
        decide.require_enrolled(self.memory.providers.get(provider_id))
        decide.check_honest(self.memory.honesty.get(provider_id))
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
        state = decide.require_enrolled(self.memory.providers.get(provider_id))
        decide.check_ban(self._bans, provider_id)
        decide.check_kind(state, evidence)
        decide.check_size(evidence)
        self._verifier.check_room()
        self._challenges.spend(evidence, self._clock.now_ms())
        verdict = await self._verifier.verify(evidence)
        metrics.VERDICTS.inc(verdict.outcome.value, "ok" if verdict.ok else verdict.code)
        if not verdict.ok:
            log.warning("evidence_refused", provider_id=provider_id, verdict=str(verdict))
        command = decide.attest_command(evidence, verdict, self._signed.policy)
        ppid = verdict.facts.ppid if verdict.facts else ""
        evidence_id = bytes.fromhex(command.evidence_id)

        def still_welcome() -> bool:
            decide.check_honest(self.memory.honesty.get(provider_id))
            decide.check_ban(self._bans, provider_id, ppid)
            if command.assurance == OPEN:
                self._check_open_places(provider_id)
            return True

        # what will not count is not kept: a row stays for months
        self._writer.check_pace(command)
        still_welcome()
        await store.save_evidence(self._pool, evidence_id, evidence, ppid, self._clock.now_ms())
        # one at a time to the open tier's places: two must not take the last one
        async with self._open_places if command.assurance == OPEN else contextlib.nullcontext():
            position = await self._writer.append(command, traceparent, still_welcome)
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
        position = await self._writer.append(command, traceparent)
        return {"position": position, "manifests_wanted": self.manifests.lacking(provider_id)}

    async def do_publish_manifest(
        self, provider_id: str, body: bytes, _traceparent: str
    ) -> dict[str, object]:
        decide.require_enrolled(self.memory.providers.get(provider_id))
        decide.check_ban(self._bans, provider_id)
        return await self.manifests.publish(provider_id, body)

    async def do_publish_profile(
        self, provider_id: str, body: bytes, traceparent: str
    ) -> dict[str, object]:
        decide.require_enrolled(self.memory.providers.get(provider_id))
        decide.check_ban(self._bans, provider_id)
        request = ProfileRequest.model_validate_json(body)
        command = decide.profile_command(provider_id, request)
        return {"position": await self._writer.append(command, traceparent)}

    async def do_publish_bundle(
        self, provider_id: str, body: bytes, traceparent: str
    ) -> dict[str, object]:
        raw = bytes.fromhex(BundleRequest.model_validate_json(body).bundle)
        state = self.memory.providers.get(provider_id, ProviderState())
        command = decide.bundle_command(state, raw, self._clock.now_ms())
        decide.check_key(self.memory.keys.get(command.key_id), provider_id)
        return {
            "key_id": command.key_id,
            "position": await self._writer.append(command, traceparent),
        }

    async def do_standing(self, provider_id: str, _body: bytes, _tp: str) -> dict[str, object]:
        now_ms = self._clock.now_ms()
        return self.standings.tell(
            provider_id, self.memory.providers.get(provider_id), banned=provider_id in self._bans,
            listed=self.memory.is_listed(provider_id, now_ms, self._clock.monotonic_s()),
            now_ms=now_ms,
        )  # fmt: skip

    async def do_standing_from_lobby(
        self, provider_id: str, body: bytes, traceparent: str
    ) -> dict[str, object]:
        self._check_pace(provider_id)
        return await self.do_standing(provider_id, body, traceparent)

    async def do_enrol_from_lobby(
        self, provider_id: str, body: bytes, traceparent: str
    ) -> dict[str, object]:
        """As `do_enrol`; the connection stays in the lobby, so the provider opens another."""
        self._check_pace(provider_id)
        return {**await self.do_enrol(provider_id, body, traceparent), "reconnect": True}

    async def do_refuse_from_lobby(self, provider_id: str, _body: bytes, _tp: str) -> Challenge:
        self._check_pace(provider_id)
        decide.check_ban(self._bans, provider_id)
        raise Forbidden(
            "this connection came in as a stranger's; enrol, then connect again", code="in_lobby"
        )

    def _check_pace(self, provider_id: str) -> None:
        if not self._asking.take(provider_id, self._clock.monotonic_s()):
            raise RateLimited(
                "this key asks too often; wait some seconds", code=TOO_OFTEN, retry_after_s=5,
            )  # fmt: skip

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
            # first, or a sweep in between would ban it again for the verdict that still stands
            await self._writer.append(LiftHonesty(provider_id=request.provider_id), traceparent)
            await store.lift_ban(self._pool, request.provider_id)
            self._bans.pop(request.provider_id, None)
            return {"banned": False, "revoked": 0}
        await self._ban(request.provider_id)
        revoked = await self._revoke_banned(traceparent)
        ended = await self._entry.turn_out(request.provider_id)
        return {"banned": True, "revoked": revoked, "connections": ended}

    async def do_canary(self, _who: str, body: bytes, traceparent: str) -> dict[str, object]:
        """Record an audit job's judgement; who is found to cheat is revoked and refused."""
        request = CanaryRequest.model_validate_json(body)
        provider_id = request.provider_id
        command = decide.judge_command(request, self.memory.providers.get(provider_id))
        position = await self._writer.append(command, traceparent)
        metrics.CANARIES.inc(request.outcome)
        revoked = await self._revoke_dishonest(traceparent)
        known = self.memory.honesty.get(provider_id, HonestyState())
        return decide.told_of_honesty(known, request.model_id, position, revoked)

    async def _revoke_dishonest(self, traceparent: str = "") -> int:
        """Ban whom canaries found to cheat, with the machine, and revoke what stands on it."""
        fresh = [one for one in self.memory.dishonest() if one not in self._bans]
        for provider_id in fresh:
            await self._ban(provider_id)
        return await self._revoke_banned(traceparent) if fresh else 0

    async def _ban(self, provider_id: str) -> None:
        state = self.memory.providers.get(provider_id)
        attested = state.attested if state else None
        ppid = self.memory.ppids.get(attested.evidence_id, "") if attested else ""
        ppid = ppid or self._bans.get(provider_id, "")
        await store.save_ban(self._pool, provider_id, ppid, self._clock.now_ms())
        self._bans[provider_id] = ppid

    async def _revoke_banned(self, traceparent: str = "") -> int:
        """Revoke whatever stands on a banned provider or machine; how many."""
        banned = self.memory.banned(self._bans)
        dishonest = set(self.memory.dishonest())
        for provider_id, evidence_id in banned:
            reason = "canary" if provider_id in dishonest else "banned"
            await self._revoke(provider_id, evidence_id, reason, traceparent)
        return len(banned)

    # ---- time ----

    async def sweep(self) -> None:
        """Revoke what has run out, judge again after floors rose, keep the tables small."""
        now_ms = self._clock.now_ms()
        for provider_id, evidence_id in self.memory.expired(now_ms):
            await self._revoke(provider_id, evidence_id, "expired")
        await self._revoke_dishonest()  # found just before a crash
        await self._revoke_banned()  # what was being attested while its ban came in
        if self._verifier.floors_rose:
            self._verifier.floors_rose = False
            await self.reevaluate()
        ends_ms = self.memory.next_expiry_ms()
        metrics.NEXT_EXPIRY.set(-1 if ends_ms is None else max(0, ends_ms - now_ms) / 1000)
        metrics.PROVIDERS.set(len(self.memory.providers), "enrolled")
        metrics.PROVIDERS.set(sum(1 for _ in self.memory.attested()), "attested")
        metrics.PROVIDERS.set(len(self.memory.standing_open(now_ms)), "open")
        if self._clock.monotonic_s() - self._housekept_s >= HOUSEKEEPING_S:
            self._housekept_s = self._clock.monotonic_s()
            before_ms = now_ms - self._settings.evidence_kept_days * DAY_MS
            await store.forget_evidence(self._pool, before_ms, self.memory.evidence_ids())
            await self.manifests.keep_house(now_ms)

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
            verdict = await self._verifier.verify(evidence)
            if verdict.ok and provider_id in self._too_many_open():
                await self._revoke(provider_id, evidence_id, "open_tier_full")
            elif verdict.ok:
                command = decide.attest_command(evidence, verdict, self._signed.policy)
                await self._writer.append(command, "", self._stands(provider_id, evidence_id))
            else:
                await self._revoke(provider_id, evidence_id, verdict.code)

    def _stands(self, provider_id: str, evidence_id: str) -> Callable[[], bool]:
        """Whether the provider still stands on this evidence: nobody revoked it meanwhile."""

        def check() -> bool:
            attested = self.memory.providers[provider_id].attested
            return attested is not None and attested.evidence_id == evidence_id

        return check

    # ---- inside ----

    def _check_open_places(self, provider_id: str) -> None:
        decide.check_open_places(
            self._signed.policy, provider_id, self.memory.standing_open(self._clock.now_ms())
        )

    def _too_many_open(self) -> set[str]:
        """Who stands in the open tier beyond the places of a policy that became narrower."""
        rules = self._signed.policy.open_rules
        standing = self.memory.standing_open(self._clock.now_ms())
        return set(standing[rules.max_providers :]) if rules is not None else set()

    async def _revoke(
        self, provider_id: str, evidence_id: str, reason: str, traceparent: str = ""
    ) -> None:
        await self._writer.append(
            decide.revoke_command(provider_id, evidence_id, reason), traceparent
        )
        metrics.REVOCATIONS.inc(reason)
        log.warning("attestation_revoked", provider_id=provider_id, evidence_id=evidence_id,
                    reason=reason)  # fmt: skip
