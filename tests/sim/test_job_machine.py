"""Jobs, providers and accounts doing everything in any order; the invariants after every step."""

from __future__ import annotations

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
from tests.support.job_world import NOT_AFTER_MS, PROVIDERS, bytes32

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

    @initialize(deposit=st.integers(0, 40_000))
    def begin(self, deposit: int) -> None:
        for provider in PROVIDERS:
            self.network.enrol(provider)
        self.network.open("acct_1", deposit)
        self.network.open("acct_2", 25_000)

    def running(self, job: str) -> bool:
        return self.network.state(job).status is JobStatus.MATCHED

    # ---- clients ----

    @rule(job=jobs, account=st.sampled_from(ACCOUNTS), busy=st.sets(anybody))
    def request(self, job: str, account: str, busy: set) -> None:  # type: ignore[type-arg]
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

    @rule(job=jobs)
    def cancel(self, job: str) -> None:
        ended = self.network.expire(job, reason="expired", may_rematch=False, cancelled=True)
        assert not self.running(job)
        if ended:
            assert self.network.state(job).status is JobStatus.CANCELLED

    # ---- providers and leases ----

    @rule(
        job=jobs,
        reason=st.sampled_from(["expired", "silent", "busy", "refused", "revoked", "gone"]),
        busy=st.sets(anybody),
        may_rematch=st.booleans(),
    )
    def lose(self, job: str, reason: str, busy: set, may_rematch: bool) -> None:  # type: ignore[type-arg]
        was, before = self.running(job), self.network.state(job)
        ended = self.network.expire(
            job, reason=reason, may_rematch=may_rematch,
            candidates=self.network.candidates(sorted(busy, key=lambda p: p.name)),
        )  # fmt: skip
        assert ended == was
        state = self.network.state(job)
        if self.running(job):
            assert may_rematch
            assert state.epoch == before.epoch + 1
            self.kept[job].append(self.network.receipt(state))

    @rule(job=jobs, epochs_ago=st.integers(1, 3))
    def repeat_an_old_expiry(self, job: str, epochs_ago: int) -> None:
        epoch = self.network.state(job).epoch - epochs_ago
        if epoch >= 1:
            assert not self.network.expire(job, epoch)

    @rule(seconds=st.integers(1, 40))
    def time_passes(self, seconds: int) -> None:
        self.network.now_ms = min(self.network.now_ms + seconds * 1000, NOT_AFTER_MS + 1000)

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

    @rule(job=jobs, status=st.sampled_from(Status))
    def finish(self, job: str, status: Status) -> None:
        if self.running(job):
            free = {"price_nanoton": 0} if status in (Status.FAILED, Status.REFUSED) else {}
            state = self.network.state(job)
            self.submitted(self.network.receipt(state, status=status, **free), job)

    @precondition(lambda self: any(self.kept.values()))
    @rule(data=st.data())
    def submit_an_old_receipt(self, data: st.DataObject) -> None:
        """Of any epoch: live, stale, after the end, or a repeat of what was paid."""
        job = data.draw(st.sampled_from([job for job in JOBS if self.kept[job]]))
        self.submitted(data.draw(st.sampled_from(self.kept[job])), job)

    @rule(job=jobs, forgery=forgeries)
    def forge(self, job: str, forgery: dict) -> None:  # type: ignore[type-arg]
        if self.running(job):
            outcome = self.network.submit(self.network.receipt(self.network.state(job), **forgery))
            assert not isinstance(outcome, CocoonError)
            assert not any(isinstance(event, ResultSealed) for event in outcome)

    @rule(job=jobs, provider=anybody)
    def steal(self, job: str, provider) -> None:  # type: ignore[no-untyped-def]
        state = self.network.state(job)
        if self.running(job) and (state.epoch, provider.id) not in state.matches:
            stolen = self.network.receipt(state).model_copy(update={"provider_id": provider.id})
            assert isinstance(self.network.submit(stolen), CocoonError)

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


Jobs.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestJobs = Jobs.TestCase
