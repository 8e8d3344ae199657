"""Jobs, providers and accounts doing everything in any order; the invariants after every step."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)  # fmt: skip
from nacl.signing import SigningKey

from cocoon.contracts.commands import SettleResult
from cocoon.contracts.envelope import AppendItem
from cocoon.contracts.events import PaymentSettled, ResultRejected, ResultSealed
from cocoon.domain.job import JobStatus
from cocoon.eventlog.batch import Appended
from cocoon.kernel.errors import CocoonError
from cocoon.sealing.receipt import Status
from tests.invariants import check_all
from tests.support.job_network import JobNetwork
from tests.support.job_world import NOT_AFTER_MS, PROVIDERS, Provider, bytes32

JOBS = [f"job{index}" for index in range(4)]
ACCOUNTS = ["acct_1", "acct_2"]
STRANGER = SigningKey(bytes32("stranger"))

jobs = st.sampled_from(JOBS)
anybody = st.sampled_from(PROVIDERS)
forgeries = st.sampled_from(
    [
        {"signer": STRANGER},
        {"price_nanoton": 286},
        {"price_nanoton": 0},
        {"output_tokens": 1001},
        {"cached_input_tokens": 101},
        {"quote_id": bytes32("another quote")},
        {"req_hash": bytes32("another request")},
        {"evidence_id": bytes32("another evidence")},
        {"key_id": bytes32("another key")[:16]},
        {"receipt_epoch": 9},
    ]
)


class Jobs(RuleBasedStateMachine):
    """What is expected is kept beside the log: who has a receipt worth what."""

    def __init__(self) -> None:
        super().__init__()
        self.network = JobNetwork()
        self.kept: dict[str, list[SettleResult]] = {job: [] for job in JOBS}  # valid when made
        self.asked: dict[str, str] = {}  # job -> account
        self.now_ms = 0

    @initialize(poor=st.booleans())
    def begin(self, poor: bool) -> None:
        for provider in PROVIDERS:
            self.network.enrol(provider)
        self.network.open("acct_1", 100_000)
        self.network.open("acct_2", 15_000 if poor else 100_000)
        for job, account in zip(JOBS[:2], ACCOUNTS, strict=True):
            self.request(job, account, set())

    def some_running(self) -> bool:
        return any(self.running(job) for job in JOBS)

    def running_job(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from([job for job in JOBS if self.running(job)]))

    def running(self, job: str) -> bool:
        return self.network.state(job).status is JobStatus.MATCHED

    # ---- clients ----

    @rule(job=jobs, account=st.sampled_from(ACCOUNTS), busy=st.sets(anybody))
    def request(self, job: str, account: str, busy: set[Provider]) -> None:
        before = len(self.network.log.events)
        outcome = self.network.request(job, account, busy=sorted(busy, key=lambda p: p.name))
        if isinstance(outcome, CocoonError) or job in self.asked:
            assert len(self.network.log.events) == before, "what is refused is not written"
        else:
            assert isinstance(outcome, Appended)
            self.asked[job] = account
        if self.running(job):
            state = self.network.state(job)
            self.kept[job].append(self.network.receipt(state))

    @rule(account=st.sampled_from(ACCOUNTS), amount=st.integers(1, 30_000))
    def deposit(self, account: str, amount: int) -> None:
        self.network.open(account, amount)

    # ---- providers and leases ----

    @precondition(some_running)
    @rule(
        data=st.data(),
        reason=st.sampled_from(["expired", "silent", "busy", "refused", "revoked", "gone"]),
        busy=st.sets(anybody),
        may_rematch=st.booleans(),
        cancelled=st.sampled_from([False, False, False, True]),
    )
    def lose(
        self,
        data: st.DataObject,
        reason: str,
        busy: set[Provider],
        may_rematch: bool,
        cancelled: bool,
    ) -> None:
        job = self.running_job(data)
        before = self.network.state(job)
        ended = self.network.expire(
            job, reason=reason, may_rematch=may_rematch, cancelled=cancelled,
            candidates=self.network.candidates(sorted(busy, key=lambda p: p.name)),
        )  # fmt: skip
        assert ended
        state = self.network.state(job)
        if self.running(job):
            assert may_rematch
            assert not cancelled
            assert state.epoch == before.epoch + 1
            self.kept[job].append(self.network.receipt(state))

    @rule(job=jobs, seconds=st.integers(0, 40))
    def time_passes_and_an_old_expiry_comes_again(self, job: str, seconds: int) -> None:
        self.network.now_ms = min(self.network.now_ms + seconds * 1000, NOT_AFTER_MS + 1000)
        epoch = self.network.state(job).epoch - 1
        if epoch >= 1:
            assert not self.network.expire(job, epoch)

    # ---- results ----

    def submitted(self, command: SettleResult, job: str) -> None:
        """Submit, and check the outcome against the job as it was before."""
        before = self.network.state(job)
        live = before.status is JobStatus.MATCHED and before.epoch == command.epoch
        fresh = before.result is None and command.epoch not in before.rejected_epochs
        outcome = self.network.submit(command)
        assert not isinstance(outcome, CocoonError)
        paid = any(isinstance(event, PaymentSettled) for event in outcome)
        assert paid == (live and fresh)
        if not fresh and before.epoch == command.epoch:
            assert outcome == (), "a repeat of what was decided writes nothing"
        elif not live and outcome:
            assert [type(event) for event in outcome] == [ResultRejected]

    @precondition(some_running)
    @rule(data=st.data(), status=st.sampled_from(Status))
    def finish(self, data: st.DataObject, status: Status) -> None:
        job = self.running_job(data)
        free = {"price_nanoton": 0} if status in (Status.FAILED, Status.REFUSED) else {}
        state = self.network.state(job)
        self.submitted(self.network.receipt(state, status=status, **free), job)

    @precondition(lambda self: any(self.kept.values()))
    @rule(data=st.data())
    def submit_an_old_receipt(self, data: st.DataObject) -> None:
        """Of any epoch: live, stale, after the end, or a repeat of what was paid."""
        job = data.draw(st.sampled_from([job for job in JOBS if self.kept[job]]))
        self.submitted(data.draw(st.sampled_from(self.kept[job])), job)

    @precondition(some_running)
    @rule(data=st.data(), forgery=forgeries, thief=anybody)
    def misbehave(self, data: st.DataObject, forgery: dict[str, Any], thief: Provider) -> None:
        """A stranger submits another one's work, then the provider itself forges."""
        state = self.network.state(self.running_job(data))
        if (state.epoch, thief.id) not in state.matches:
            stolen = self.network.receipt(state).model_copy(update={"provider_id": thief.id})
            assert isinstance(self.network.submit(stolen), CocoonError)
        outcome = self.network.submit(self.network.receipt(state, **forgery))
        assert not isinstance(outcome, CocoonError)
        assert not any(isinstance(event, ResultSealed) for event in outcome)

    @rule(data=st.data())
    def repeat_a_command(self, data: st.DataObject) -> None:
        """An append whose outcome was unknown comes again: the same rows, nothing new."""
        log = self.network.log
        command = data.draw(st.sampled_from(list(log.commands.values())))
        rows = log.events[command.first_position - 1 : command.last_position]
        size = len(log.events)
        again = log.append(AppendItem(command.command_id, b"{}", "x", "x", (("job/x", 99),), ()))
        assert isinstance(again, Appended)
        assert (again.repeated, again.events, len(log.events)) == (True, rows, size)

    # ---- always ----

    @invariant()
    def the_sixteen_hold(self) -> None:
        assert check_all(self.network.evidence()) == []

    @invariant()
    def money_is_where_it_should_be(self) -> None:
        balances = self.network.balances()
        assert sum(balances.values()) == 0
        held = sum(n for account, n in balances.items() if account.startswith("hold:"))
        assert held == sum(self.network.state(job).held_nanoton for job in JOBS)

    def teardown(self) -> None:
        """Faults stop: every lease runs out, and then nothing is left unfinished."""
        for job in JOBS:
            for _ in range(20):
                if not self.network.expire(job, reason="expired"):
                    break
        if self.network.log.events:
            assert check_all(self.network.evidence(quiet=True)) == []
            held = [a for a, n in self.network.balances().items() if n and a.startswith("hold:")]
            assert held == []


Jobs.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestJobs = Jobs.TestCase
