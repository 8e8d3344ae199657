"""What a shard's matcher knows: providers, balances, live jobs. Folded from the log, pure.

Everything here can be rebuilt from the events; heartbeats and holds on their way to the log are
the two additions, and losing either harms nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from cocoon.contracts.commands import Candidate, RequestJob
from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.events import (
    AccountOpened,
    EventData,
    FundsHeld,
    LeaseExpired,
    MatchingSeedCommitted,
    OfferedModel,
    OpenTierLimitsSet,
    ProviderAttested,
    Quote,
    ResultSealed,
)
from cocoon.contracts.matching import BALANCED, MatchingPolicy, OpenTierLimits, Preferences
from cocoon.contracts.messages import Heartbeat
from cocoon.domain import job as jobs
from cocoon.domain import open_tier, seeding
from cocoon.domain import provider as providers
from cocoon.domain.job import JobState, JobStatus
from cocoon.domain.ledger import postings
from cocoon.domain.provider import ProviderState
from cocoon.domain.reputation import Reputation, moved, observe
from cocoon.domain.seeding import SeedState

MAX_COUNT: Final = 2**32 - 1  # what a candidate's counts can say


@dataclass(slots=True)
class ProviderView:
    """A provider: what the log says, and what its last heartbeat said."""

    state: ProviderState = field(default_factory=ProviderState)
    # by key and offered model, what no heartbeat changes: forgotten whenever `state` changes
    fixed: dict[tuple[str, str], Candidate] = field(default_factory=dict)
    attested_at: dict[str, int] = field(default_factory=dict)  # evidence id -> log position
    boot_id: str = ""
    last_seen_s: float = float("-inf")  # monotonic
    reported_running: int = 0
    reported_before: int = 0  # by the heartbeat before the last
    elsewhere: int = 0  # of the reported jobs, those that are not this shard's
    reported_concurrency: int | None = None
    draining: bool = False
    full: tuple[str, ...] = ()  # of its models, those without room
    away: tuple[str, ...] = ()  # and those without an engine
    live_jobs: set[str] = field(default_factory=set)  # of this shard
    first_token_us: int = 0
    first_token_samples: int = 0
    reputation: Reputation = field(default_factory=Reputation)

    def observe_first_token(self, sample_us: int) -> None:
        """Exponentially weighted average: alpha 1/2 for eight samples, then 1/10."""
        samples = self.first_token_samples
        self.first_token_us = moved(self.first_token_us, min(sample_us, MAX_COUNT), samples)
        self.first_token_samples += 1


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a client asks of its provider beyond the sealed request's header.

    The log's events do not hold it, the stored command does: after a restart `recall` reads it.
    """

    preferences: Preferences | None = None
    affinity: str = ""


NO_WISHES = Wishes()


@dataclass(slots=True)
class AccountView:
    opened: bool = False
    version: int = 0  # of the account's stream
    balance_nanoton: int = 0  # as far as the tail has read


class Memory:
    """One shard's matcher memory. `silence_s`: how long a provider may be silent and count.

    `sharers`: how many account shards' matchers send jobs to the same providers.
    """

    def __init__(
        self, fee_bps: int, silence_s: float, sharers: int = 1, policy: MatchingPolicy = BALANCED
    ) -> None:
        self.fee_bps = fee_bps
        self.policy = policy
        self.silence_s = silence_s
        self.sharers = sharers
        self.providers: dict[str, ProviderView] = {}
        self.keys: dict[str, str] = {}  # key_id -> provider_id
        self.accounts: dict[str, AccountView] = {}
        self.jobs: dict[str, JobState] = {}  # live jobs only
        self._wishes: dict[str, Wishes] = {}  # of live jobs
        self._open_tier: OpenTierLimitsSet | None = None
        self.seeds = SeedState()
        self.seeds_since_ms = 0  # when the newest secret was committed to, by the log's clock
        self.position = 0  # of this shard's log, as far as the tail has read
        self.pending_holds: dict[str, tuple[str, int]] = {}  # job -> (account, nanoTON)
        self._pending_by_account: dict[str, int] = {}

    # ---- shard 0 ----

    def apply_network(self, stored: StoredEvent) -> EventData:
        """Fold an event of the network shard."""
        event = stored.decode()
        aggregate, _, ident = stored.stream.partition("/")
        if aggregate == "provider":
            view = self.providers.setdefault(ident, ProviderView())
            before = {bundle.key_id for bundle in view.state.bundles}
            view.state = providers.evolve(view.state, event)
            view.fixed.clear()
            if isinstance(event, ProviderAttested):
                held = {bundle.evidence_id for bundle in view.state.bundles}
                view.attested_at = {k: at for k, at in view.attested_at.items() if k in held}
                view.attested_at[event.evidence_id] = stored.position
            after = {bundle.key_id for bundle in view.state.bundles}
            for key_id in before - after:
                if self.keys.get(key_id) == ident:
                    del self.keys[key_id]
            for key_id in after - before:
                self.keys.setdefault(key_id, ident)  # whoever else names it does not hold it
        elif aggregate == "policy":
            self._open_tier = open_tier.evolve(self._open_tier, event)
        return event

    @property
    def open_limits(self) -> OpenTierLimits | None:
        """What the network's policy allows a provider without a TEE; None: no job."""
        return self._open_tier.limits if self._open_tier else None

    # ---- this shard ----

    def apply_shard(self, stored: StoredEvent) -> EventData:
        """Fold an event of this shard: balances always, jobs unless applied before."""
        event = stored.decode()
        self.position = stored.position
        aggregate, _, ident = stored.stream.partition("/")
        for entry in postings(event):
            kind, _, owner = entry.account.partition(":")
            if kind == "client":
                self._account(owner).balance_nanoton += entry.amount_nanoton
        if aggregate == "account":
            account = self._account(ident)
            account.version = stored.version
            account.opened = account.opened or isinstance(event, AccountOpened)
        elif aggregate == "matching":
            self._apply_seeds(stored, event)
        elif aggregate == "job":
            if isinstance(event, FundsHeld):
                self.release_pending(ident)
            self.apply_job(ident, stored.version, event)
            if isinstance(event, ResultSealed | LeaseExpired):
                view = self._provider(event.provider_id)
                view.reputation = observe(view.reputation, event)
        return event

    def apply_job(self, job_id: str, version: int, event: EventData) -> None:
        """Fold one event of a job's stream; a version that is already folded changes nothing.

        Ended jobs are forgotten; an event that is not the next one (an ended job's late
        rejection) is ignored.
        """
        state = self.jobs.get(job_id, JobState())
        if version != state.version + 1:
            return
        before = state.match
        state = jobs.evolve(state, event)
        if before is not None and (state.match != before or state.status is not JobStatus.MATCHED):
            self._provider(before.provider_id).live_jobs.discard(job_id)
        if state.status is JobStatus.MATCHED and state.match is not None:
            self._provider(state.match.provider_id).live_jobs.add(job_id)
        if state.status.is_terminal:
            self.jobs.pop(job_id, None)
            self.forget_wish(job_id)
        else:
            self.jobs[job_id] = state

    def _apply_seeds(self, stored: StoredEvent, event: EventData) -> None:
        """Fold one event of the shard's seeds; a version that is already folded changes nothing."""
        if stored.version != self.seeds.version + 1:
            return
        self.seeds = seeding.evolve(self.seeds, event)
        if isinstance(event, MatchingSeedCommitted):
            self.seeds_since_ms = stored.recorded_at_us // 1000

    def apply_appended(self, events: Iterable[StoredEvent]) -> None:
        """Fold this process's own events before the tail brings them back.

        An answer may come so late that the tail was first: a job that it has seen end must not
        begin again here, or its provider would lose a place for ever.
        """
        for stored in events:
            aggregate, _, ident = stored.stream.partition("/")
            if aggregate == "job" and stored.position > self.position:
                self.apply_job(ident, stored.version, stored.decode())
            elif aggregate == "matching":
                self._apply_seeds(stored, stored.decode())

    # ---- what clients wish ----

    def wish(self, job_id: str, wishes: Wishes) -> None:
        if wishes != NO_WISHES:
            self._wishes[job_id] = wishes

    def recall(self, command: RequestJob) -> None:
        """After a restart: what the stored command of a live job says of its client's wishes."""
        if command.job_id in self.jobs:
            self.wish(command.job_id, Wishes(command.preferences, command.affinity))

    def wishes_of(self, job_id: str) -> Wishes:
        return self._wishes.get(job_id, NO_WISHES)

    def forget_wish(self, job_id: str) -> None:
        self._wishes.pop(job_id, None)

    def _account(self, account_id: str) -> AccountView:
        return self.accounts.setdefault(account_id, AccountView())

    def _provider(self, provider_id: str) -> ProviderView:
        return self.providers.setdefault(provider_id, ProviderView())

    # ---- money on its way to the log ----

    def available_nanoton(self, account_id: str) -> int:
        """Spendable now: the folded balance less the holds that the tail has not brought yet."""
        balance = self._account(account_id).balance_nanoton
        return max(0, balance - self._pending_by_account.get(account_id, 0))

    def reserve(self, job_id: str, account_id: str, amount_nanoton: int) -> None:
        self.release_pending(job_id)
        self.pending_holds[job_id] = (account_id, amount_nanoton)
        self._pending_by_account[account_id] = (
            self._pending_by_account.get(account_id, 0) + amount_nanoton
        )

    def release_pending(self, job_id: str) -> None:
        pending = self.pending_holds.pop(job_id, None)
        if pending is None:
            return
        account_id, amount_nanoton = pending
        left = self._pending_by_account[account_id] - amount_nanoton
        if left:
            self._pending_by_account[account_id] = left
        else:
            del self._pending_by_account[account_id]

    # ---- heartbeats and candidates ----

    def heartbeat(self, beat: Heartbeat, now_s: float) -> bool:
        """Take a heartbeat in. Returns True if the agent has restarted since the last one."""
        view = self._provider(beat.provider_id)
        restarted = bool(view.boot_id) and view.boot_id != beat.boot_id
        view.boot_id = beat.boot_id
        view.last_seen_s = now_s
        view.reported_before, view.reported_running = view.reported_running, len(beat.running)
        view.elsewhere = sum(job_id not in view.live_jobs for job_id, _ in beat.running)
        view.reported_concurrency = beat.concurrency
        view.draining = beat.draining
        view.full, view.away = beat.full, beat.away
        return restarted

    def told_busy(self, provider_id: str) -> None:
        """A provider refused a dispatch for want of room: full, until its next heartbeat."""
        view = self._provider(provider_id)
        if view.state.offer is not None:
            most = _at_once(view.state.offer.concurrency, view.reported_concurrency)
            view.elsewhere = max(view.elsewhere, most - len(view.live_jobs))

    def running_at(self, view: ProviderView, concurrency: int) -> int:
        """How many jobs a provider is taken to run.

        Its own part of the places a shard fills again at once. What lies beyond, it takes only
        when two heartbeats in a row showed it free: a shard below its part comes first.
        """
        mine = len(view.live_jobs)
        running = mine + view.elsewhere
        if mine < concurrency // self.sharers:
            return running
        return max(running, view.reported_running, view.reported_before)

    def presume_alive(self, now_s: float) -> None:
        """After a restart: whoever stands attested counts as heard now, until silence says more."""
        for view in self.providers.values():
            if view.state.attested is not None:
                view.last_seen_s = max(view.last_seen_s, now_s)

    def is_alive(self, provider_id: str, now_s: float) -> bool:
        view = self.providers.get(provider_id)
        return view is not None and now_s - view.last_seen_s <= self.silence_s

    def candidates(
        self, key_ids: Iterable[str], model_id: str, now_s: float
    ) -> tuple[Candidate, ...]:
        """The client's recipients as candidates; keys that nobody current holds are left out."""
        found = []
        for key_id in key_ids:
            provider_id = self.keys.get(key_id)
            view = self.providers.get(provider_id) if provider_id else None
            if view is None or provider_id is None:
                continue
            fixed = view.fixed.get((key_id, model_id)) or self._fixed(
                provider_id, view, key_id, model_id
            )
            if fixed:
                found.append(self._candidate(view, fixed, model_id, now_s))
        return tuple(found)

    def _candidate(
        self, view: ProviderView, fixed: Candidate, model_id: str, now_s: float
    ) -> Candidate:
        """With what changes from job to job: integers within their bounds, so unchecked."""
        offer, reputation = view.state.offer, view.reputation
        concurrency = _at_once(offer.concurrency if offer else 0, view.reported_concurrency)
        if fixed.tier == open_tier.OPEN and self.open_limits is not None:
            concurrency = min(concurrency, self.open_limits.max_running_jobs)
        full = model_id in view.full
        away = view.draining or model_id in view.away
        return fixed.model_copy(
            update={
                "running": concurrency if full else self.running_at(view, concurrency),
                "concurrency": concurrency,
                "first_token_us": view.first_token_us,
                "alive": now_s - view.last_seen_s <= self.silence_s and not away,
                "tokens_per_s": reputation.tokens_per_s,
                "ended_jobs": reputation.ended_jobs,
                "success_ppm": reputation.success_ppm,
            }
        )

    def _fixed(
        self, provider_id: str, view: ProviderView, key_id: str, model_id: str
    ) -> Candidate | None:
        """What the log says of a key and a model; None while there is no evidence or no offer."""
        state = view.state
        attested, models = state.attested, state.offer.models if state.offer else ()
        bundle = next((b for b in state.bundles if b.key_id == key_id), None)
        if attested is None or bundle is None or not models:
            return None
        # Another model's offer still makes a candidate: the model filter then gives its reason.
        model = next((m for m in models if m.model_id == model_id), models[0])
        fixed = Candidate(
            provider_id=provider_id,
            key_id=bundle.key_id,
            quote=self.quote(model),
            evidence_id=bundle.evidence_id,  # the key's own: renewed evidence leaves it in use
            signing_key=attested.signing_key,
            attested_position=view.attested_at[bundle.evidence_id],
            valid_until_ms=min(attested.valid_until_ms, bundle.not_after_ms),
            context_tokens=model.context_tokens,
            running=0, concurrency=0, first_token_us=0, alive=False,
            tier=attested.assurance,
            quantisation=state.quantisation(model.model_id),
            region=state.region,
        )  # fmt: skip
        if model.model_id == model_id:  # else anybody's made-up model would be kept
            view.fixed[key_id, model_id] = fixed
        return fixed

    def quote(self, model: OfferedModel) -> Quote:
        """The offer's price terms with the network's fee."""
        return Quote(
            model_id=model.model_id,
            input_nanoton_per_mtok=model.input_nanoton_per_mtok,
            cached_input_nanoton_per_mtok=model.cached_input_nanoton_per_mtok,
            output_nanoton_per_mtok=model.output_nanoton_per_mtok,
            fee_bps=self.fee_bps,
        )


def _at_once(offered: int, reported: int | None) -> int:
    """An engine that works for others too has less room than was offered, never more."""
    return offered if reported is None else min(offered, reported)
