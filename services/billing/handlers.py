"""Billing's shell: results into payments, operators' requests into events and answers."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from pydantic import ValidationError

from cocoon.bus.ingress import Incoming
from cocoon.contracts import messages, subjects
from cocoon.contracts.commands import CreditDeposit, OpenAccount
from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.events import DepositCredited, EventData
from cocoon.contracts.messages import (
    BalanceRequest,
    CreditRequest,
    DisputeRequest,
    OpenAccountRequest,
    Reply,
    ResultAck,
    SubmitResult,
    UnparkRequest,
)
from cocoon.domain import account as accounts
from cocoon.domain.account import AccountState
from cocoon.eventlog.append import Appended, LogAppender
from cocoon.eventlog.connection import acquired
from cocoon.eventlog.read import checkpoint, stream_events
from cocoon.kernel import canonical
from cocoon.kernel.errors import (
    BadRequest,
    Conflict,
    Rejected,
    Transient,
    Unavailable,
)
from cocoon.kernel.ids import named_command_id
from cocoon.telemetry import metrics
from cocoon.telemetry.tracing import inject, span
from services.billing import decide, store
from services.billing.disputes import Disputes
from services.billing.early import EarlyResults
from services.billing.ledger import LEDGER_CONSUMER, Ledger
from services.billing.replying import replied
from services.billing.results import JOB_NOT_COMMITTED, Results

if TYPE_CHECKING:
    from nats.aio.client import Client

    from cocoon.eventlog.connection import Pool

MAX_CONFLICTS = 8
POSTED_TRIES, POSTED_PAUSE_S = 100, 0.03  # how long a balance waits for the ledger


class Ingress:
    """Results from the work queue; acknowledged to the provider and then to the queue."""

    def __init__(self, results: Results, nc: Client, wait_s: float) -> None:
        self._results, self._nc, self._wait_s = results, nc, wait_s
        self._early = EarlyResults(wait_s)

    async def on_message(self, incoming: Incoming) -> None:
        """Settle one submission. Raises Transient (comes again), Rejected (gone) or Fatal.

        An early one that finds no room to wait is gone too, without a word: its provider keeps it
        and submits it again.
        """
        if incoming.deliveries > 1:
            metrics.REDELIVERIES.inc("submit_result")
        try:
            result = SubmitResult.model_validate_json(incoming.body)
        except ValidationError:
            raise BadRequest("a submission is not of its form") from None
        if incoming.subject != subjects.submit_result(result.provider_id):
            raise BadRequest("a submission came under another provider's name")
        name = (result.provider_id, result.job_id, result.epoch)
        if not self._results.is_live(result) and not self._early.may_wait(*name, time.monotonic()):
            raise _no_room()  # before it costs a signature and a query
        parent = incoming.headers.get(messages.H_TRACEPARENT, "")
        began_s = time.perf_counter()
        with span("billing.submit_result", parent, {"job_id": result.job_id}):
            try:
                ack = await self._results.on_submit_result(result, inject() or parent)
            except Transient as error:
                # Only a job that the log still does not hold is refused; an outage is waited out,
                # because the provider drops its spooled result at a refusal.
                if error.code != JOB_NOT_COMMITTED:
                    raise
                if incoming.age_s < self._wait_s:
                    if not self._early.admit(*name, time.monotonic()):
                        raise _no_room() from None
                    metrics.SETTLEMENTS.inc("early")
                    raise
                ack = _refused(result, "no_such_job")
            except Rejected as error:
                ack = _refused(result, error.code)
        self._early.forget(*name)
        metrics.SETTLE_SECONDS.observe(time.perf_counter() - began_s)
        metrics.SETTLEMENTS.inc("settled" if ack.outcome == "result_sealed" else "rejected")
        await self._nc.publish(subjects.acks(result.provider_id), ack.to_canonical())


def _no_room() -> BadRequest:
    metrics.SETTLEMENTS.inc("dropped")
    return BadRequest(
        "too many results wait for their matches; submit it again later", code="too_many_early"
    )


def _refused(result: SubmitResult, reason: str) -> ResultAck:
    return ResultAck(
        job_id=result.job_id, epoch=result.epoch, outcome="result_rejected", reason=reason
    )


class Operator:
    """Requests of operators (and the gateway's balance) on one shard."""

    def __init__(self, appender: LogAppender, pool: Pool, shard: int, ledger: Ledger) -> None:
        self._appender, self._pool, self._shard, self._ledger = appender, pool, shard, ledger
        self._disputes = Disputes(appender, pool, shard)

    async def answer(self, verb: str, body: bytes) -> Reply:
        """Run one request; every refusal is a Reply."""
        return await replied(self._run(verb, body))

    async def _run(self, verb: str, body: bytes) -> str:
        if verb == "open_account":
            return await self._open(OpenAccountRequest.model_validate_json(body))
        if verb == "credit_deposit":
            return await self._credit(CreditRequest.model_validate_json(body))
        if verb == "balance":
            return await self._balance(BalanceRequest.model_validate_json(body))
        if verb == "dispute":
            opened = await self._disputes.do_open(DisputeRequest.model_validate_json(body))
            return opened.to_canonical().decode()
        if verb == "account":
            asked = OpenAccountRequest.model_validate_json(body)
            return _json({"opened": (await self._account(asked.account_id)).opened})
        if verb == "parked":
            return _json({"streams": await self._ledger.parked()})
        if verb == "unpark":
            stream = UnparkRequest.model_validate_json(body).stream
            return _json({"events": await self._ledger.unpark(stream)})
        raise BadRequest(f"billing has no request {verb}")

    async def _open(self, request: OpenAccountRequest) -> str:
        command = OpenAccount(account_id=request.account_id)
        command_id = named_command_id("open", request.account_id)
        for _ in range(MAX_CONFLICTS):
            state = await self._account(request.account_id)
            events = accounts.decide_open_account(state, command)
            item = decide.account_item(
                command_id, command, request.account_id, events, state.version
            )
            if not events or isinstance(await self._appender.append(item), Appended):
                return _json({"account_id": request.account_id})
        raise Unavailable("the account keeps changing; try again")

    async def _credit(self, request: CreditRequest) -> str:
        command = CreditDeposit(
            account_id=request.account_id,
            amount_nanoton=request.amount_nanoton,
            source="dev",
            reference=request.reference,
        )
        command_id = named_command_id("credit", request.account_id, request.reference)
        for _ in range(MAX_CONFLICTS):
            state = await self._account(request.account_id)
            events = accounts.decide_credit_deposit(state, command)
            item = decide.account_item(
                command_id, command, request.account_id, events, state.version
            )
            done = await self._appender.append(item)
            if isinstance(done, Appended):
                _check_credit(request, done)
                return _json(
                    {
                        "account_id": request.account_id,
                        "repeated": done.repeated,
                        "position": done.positions[-1],
                    }
                )
        raise Unavailable("the account keeps changing; try again")

    async def _balance(self, request: BalanceRequest) -> str:
        await self._wait_until_posted(request.posted)
        async with acquired(self._pool) as conn:
            balance = await store.client_balance(conn, self._shard, request.account_id)
        return _json(
            {
                "account_id": request.account_id,
                "available_nanoton": str(balance.available),
                "held_nanoton": str(balance.held),
            }
        )

    async def _wait_until_posted(self, position: int) -> None:
        """Raises Unavailable if the ledger takes too long; the log holds the event all the same."""
        for _ in range(POSTED_TRIES if position else 0):
            async with acquired(self._pool) as conn:
                if await checkpoint(conn, self._shard, LEDGER_CONSUMER) >= position:
                    return
            await asyncio.sleep(POSTED_PAUSE_S)
        if position:
            raise Unavailable("the ledger is behind the log; ask for the balance again")

    async def _account(self, account_id: str) -> AccountState:
        async with acquired(self._pool) as conn:
            stored = await stream_events(conn, self._shard, f"account/{account_id}")
        state = AccountState()
        for event in stored:
            state = accounts.evolve(state, _decoded(event))
        return state


def _check_credit(request: CreditRequest, done: Appended) -> None:
    """Raises Conflict when the reference was used for another amount."""
    event = done.events[0].decode()
    if isinstance(event, DepositCredited) and event.amount_nanoton != request.amount_nanoton:
        raise Conflict(
            f"the reference {request.reference} was used for another amount; nothing was "
            "credited now, use a new reference",
            code="reference_used",
        )


def _decoded(stored: StoredEvent) -> EventData:
    return stored.decode()


def _json(value: dict[str, object]) -> str:
    return canonical.dumps(value).decode()
