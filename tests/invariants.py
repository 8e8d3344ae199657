"""The sixteen invariants of the network, each once, over plain evidence.

Simulation, fault tests over real processes, soak and replay collect an Evidence and ask
`check_all`. A checker answers with sentences; none means that it holds. What was not collected
(None) is not checked. The same functions judge a whole history and what one step added to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from cocoon.contracts import events as e
from cocoon.contracts import subjects
from cocoon.contracts.commands import decode_command
from cocoon.contracts.envelope import GENESIS_HASH, StoredEvent
from cocoon.domain import ledger, pricing
from cocoon.kernel import canonical, ids
from services.billing import draws
from services.billing.decide import project
from services.billing.redecide import Decisions, Report
from services.matcher.memory import Memory
from tests.support.collected import Evidence
from tests.support.grounds import attestation_fault, match_of, receipt_fault

NETWORK_SHARD = subjects.NETWORK_SHARD


# ---- 1 to 3: the log and its copy ----


def every_job_ends_once(evidence: Evidence) -> list[str]:
    """1. Every accepted job ends in exactly one terminal event; none is stuck once faults stop."""
    said = []
    for job_id, rows in evidence.jobs.items():
        types = [stored.type for stored, _ in rows]
        ends = [index for index, name in enumerate(types) if name in e.JOB_ENDS]
        if len(ends) > 1:
            said.append(f"job {job_id} ended {len(ends)} times: {[types[i] for i in ends]}")
        if evidence.quiet and not ends:
            said.append(f"job {job_id} is stuck after {types[-1]}")
        after = types[ends[0] + 1 :] if ends else []
        if any(name != "ResultRejected" for name in after):
            said.append(f"job {job_id} went on after its end: {after}")
    return said


def log_is_dense_and_chained(evidence: Evidence) -> list[str]:
    """2. Positions are dense, versions contiguous, the hash chain is valid, time goes on."""
    said = []
    for shard, rows in evidence.logs.items():
        prev_hash, recorded_at_us, first = GENESIS_HASH, 0, 1
        versions: Counter[str] = Counter()
        if before := evidence.before.get(shard):
            prev_hash, recorded_at_us = before.hash, before.recorded_at_us
            first, versions = before.position + 1, Counter(before.versions)
        for position, stored in enumerate(rows, start=first):
            where = f"shard {shard} position {position}"
            versions[stored.stream] += 1
            if (stored.shard, stored.position) != (shard, position):
                said.append(f"{where} holds position {stored.position} of shard {stored.shard}")
            if stored.version != versions[stored.stream]:
                said.append(f"{where}: {stored.stream} jumps to version {stored.version}")
            if stored.prev_hash != prev_hash or stored.compute_hash() != stored.hash:
                said.append(f"{where} breaks the hash chain")
            if stored.recorded_at_us < recorded_at_us:
                said.append(f"{where} was recorded before its predecessor")
            prev_hash, recorded_at_us = stored.hash, stored.recorded_at_us
    return said


def stream_equals_log(evidence: Evidence) -> list[str]:
    """3. What the stream holds is the log, position for position, and never more than it."""
    said = []
    for shard, messages in (evidence.streams or {}).items():
        rows = evidence.whole_log(shard)
        expected = messages[0].sequence if messages else 1
        for message in messages:
            where = f"EVENTS_{shard} sequence {message.sequence}"
            if message.sequence != expected:
                said.append(f"{where} follows {expected - 1}")
            expected = message.sequence + 1
            if message.sequence > len(rows):
                said.append(f"{where} is ahead of the log, which ends at {len(rows)}")
                continue
            row = rows[message.sequence - 1]
            if message.body != row.data:
                said.append(f"{where} is not what the log holds there")
            expected_headers = row.to_headers()
            headers = {k: v for k, v in message.headers.items() if k in expected_headers}
            if headers != expected_headers:
                said.append(f"{where} has other headers than the log's row")
            if message.subject != subjects.event(shard, row.stream, row.type):
                said.append(f"{where} is on subject {message.subject}")
        if evidence.quiet and messages and expected - 1 < len(rows):
            said.append(f"EVENTS_{shard} ends at {expected - 1}, the log at {len(rows)}")
    return said


# ---- 4 to 8: money ----


def entries_sum_to_zero(evidence: Evidence) -> list[str]:
    """4. Each transaction's entries, and the ledger, sum to 0."""
    said = []
    for shard, rows in evidence.decoded.items():
        for stored, event in rows:
            try:
                ledger.postings(event)
            except ValueError as error:
                said.append(f"shard {shard} position {stored.position}: {error}")
    for shard, tables in (evidence.ledgers or {}).items():
        sums: Counter[int] = Counter()
        for _, position, _, _, amount in tables.entries:
            sums[position] += amount
        said += [
            f"the entries of shard {shard} position {position} sum to {total}"
            for position, total in sums.items()
            if total
        ]
        if total := sum(tables.balances.values()):
            said.append(f"the balances of shard {shard} sum to {total}")
    return said


def holds_never_negative(evidence: Evidence) -> list[str]:
    """5. hold:<job> is never below 0, and 0 after the job's end."""
    said = []
    for shard, rows in evidence.decoded.items():
        balances = _balances_before(evidence, shard)
        for stored, event in rows:
            for entry in _postings(event):
                balances[entry.account] += entry.amount_nanoton
                if entry.account.startswith("hold:") and balances[entry.account] < 0:
                    said.append(
                        f"{entry.account} fell to {balances[entry.account]} at {stored.position}"
                    )
            if stored.type in e.JOB_ENDS:
                left = balances[ledger.hold(stored.stream.partition("/")[2])]
                if left:
                    said.append(f"{stored.stream} ended at {stored.position} and holds {left}")
    return said


def client_is_charged_once_for_receipted_output(evidence: Evidence) -> list[str]:
    """6. A client is charged at most once a job, at most the hold, only for receipted output."""
    said = []
    for job_id, rows in evidence.jobs.items():
        held = sum(d.amount_nanoton for _, d in rows if isinstance(d, e.FundsHeld))
        charges = [d for _, d in rows if isinstance(d, e.PaymentSettled)]
        if len(charges) > 1:
            said.append(f"job {job_id} was charged {len(charges)} times")
        for charge in charges:
            if charge.price_nanoton > held:
                said.append(f"job {job_id} cost {charge.price_nanoton}, its hold was {held}")
            sealed = [
                d for _, d in rows if isinstance(d, e.ResultSealed) and d.epoch == charge.epoch
            ]
            match = match_of(rows, charge.epoch)
            reason = receipt_fault(sealed[0], match, charge) if sealed and match else "no receipt"
            if reason:
                said.append(f"job {job_id} was charged on a receipt with {reason}")
    return said


def provider_is_paid_for_the_live_epoch(evidence: Evidence) -> list[str]:
    """7. A provider is paid if and only if its receipt is valid, attested, of the live epoch."""
    said = []
    for job_id, rows in evidence.jobs.items():
        live: e.ProviderMatched | None = None
        for index, (stored, event) in enumerate(rows):
            if isinstance(event, e.ProviderMatched):
                live = event
                reason = attestation_fault(evidence, stored, event)
                if reason:
                    said.append(f"job {job_id} epoch {event.epoch}: {reason}")
            elif isinstance(event, e.LeaseExpired):
                live = None
            elif isinstance(event, e.PaymentSettled):
                paid = (event.epoch, event.provider_id)
                if live is None or paid != (live.epoch, live.provider_id):
                    said.append(f"job {job_id} paid {event.provider_id} for epoch {event.epoch}")
                if live is None or event.provider_nanoton != (
                    pricing.split(event.price_nanoton, live.quote.fee_bps).provider
                ):
                    said.append(f"job {job_id} paid {event.provider_nanoton} to the provider")
            elif isinstance(event, e.ResultSealed):
                after = rows[index + 1][1] if index + 1 < len(rows) else None
                if not isinstance(after, e.PaymentSettled):
                    said.append(f"job {job_id} has a sealed result that was not paid")
    return said


def no_client_below_zero(evidence: Evidence) -> list[str]:
    """8. No client's balance is ever below zero."""
    said = []
    for shard, rows in evidence.decoded.items():
        balances = _balances_before(evidence, shard)
        for stored, event in rows:
            for entry in _postings(event):
                balances[entry.account] += entry.amount_nanoton
            for account in {entry.account for entry in _postings(event)}:
                if account.startswith("client:") and balances[account] < 0:
                    said.append(f"{account} fell to {balances[account]} at {stored.position}")
    for tables in (evidence.ledgers or {}).values():
        said += [
            f"the table has {account} at {amount}"
            for account, amount in tables.balances.items()
            if amount < 0 and account.startswith("client:")
        ]
    return said


def _balances_before(evidence: Evidence, shard: int) -> Counter[str]:
    before = evidence.before.get(shard)
    return Counter(before.balances) if before else Counter()


def _postings(event: e.EventData) -> list[ledger.Entry]:
    try:
        return ledger.postings(event)
    except ValueError:
        return []  # invariant 4 says so


# ---- 9 to 13: jobs, clients, replay ----


def one_live_lease_and_rising_epochs(evidence: Evidence) -> list[str]:
    """9. A job has one live lease; epochs rise one by one; only a live lease ends."""
    said = []
    for job_id, rows in evidence.jobs.items():
        live: int | None = None
        last = 0
        for _, event in rows:
            if isinstance(event, e.ProviderMatched):
                if live is not None:
                    said.append(f"job {job_id}: epoch {event.epoch} began while {live} was live")
                if event.epoch != last + 1:
                    said.append(f"job {job_id}: epoch {event.epoch} follows {last}")
                live = last = event.epoch
            elif isinstance(event, e.LeaseExpired):
                if event.epoch != live:
                    said.append(f"job {job_id}: epoch {event.epoch} expired, live was {live}")
                live = None
            elif isinstance(event, e.JobFailed | e.JobCancelled) and live is not None:
                said.append(f"job {job_id} ended while epoch {live} was live")
    return said


def same_key_same_job_same_bytes(evidence: Evidence) -> list[str]:
    """10. The same idempotency key gives the same job and the same response bytes."""
    said = []
    jobs: dict[tuple[str, str], str] = {}
    answers: dict[str, str] = {}
    for call in evidence.calls or ():
        if call.status >= 400 or not call.idempotency_key:
            continue
        key = (call.account_id, call.idempotency_key)
        if jobs.setdefault(key, call.job_id) != call.job_id:
            said.append(f"key {key} gave the jobs {jobs[key]} and {call.job_id}")
        whole = call.response_sha256
        if whole is not None and answers.setdefault(call.job_id, whole) != whole:
            said.append(f"job {call.job_id} was answered with different bytes")
    for shard, rows in evidence.decoded.items():
        made: dict[str, str] = {}
        for stored, event in rows:
            if isinstance(event, e.JobRequested):
                first = made.setdefault(stored.causation_id, event.job_id)
                if first != event.job_id:
                    said.append(f"shard {shard}: one command made jobs {first}, {event.job_id}")
    return said


def replay_equals_live(evidence: Evidence) -> list[str]:
    """11. Folding the log again gives the live tables' bytes; every decision is made again."""
    said = []
    for shard, tables in (evidence.ledgers or {}).items():
        if shard in evidence.before:
            continue  # the tables are compared whole
        rows = [stored for stored, _ in evidence.decoded.get(shard, ())]
        try:
            log = project(stored for stored in rows if stored.position <= tables.applied)
        except ValueError:
            continue  # invariant 4 says so
        paid = {
            s.event.job_id: (
                s.position, s.event.price_nanoton, s.event.provider_nanoton, s.event.fee_nanoton
            )
            for s in log.settlements
        }  # fmt: skip
        pairs = (
            ("entries", log.entries, list(tables.entries)),
            ("balances", {a: n for a, n in log.changes.items() if n}, dict(tables.balances)),
            ("settlements", paid, dict(tables.settlements)),
        )
        said += [
            f"shard {shard}: the log and the tables have different {name}"
            for name, want, have in pairs
            if want != have
        ]
    for shard, commands in (evidence.commands or {}).items():
        rows = evidence.whole_log(shard)
        report = Report(shard=shard, first=1, last=len(rows))
        readable = {stored.position for stored, _ in evidence.decoded[shard]}
        before = evidence.before.get(shard)
        seeds = draws.stream(shard)
        known = before.stream(seeds) if before else [row for row in rows if row.stream == seeds]
        decisions = Decisions(report, draws.Draws(known))
        for command in commands:
            group = rows[command.first_position - 1 : command.last_position]
            if not group or command.data == b"{}":
                continue
            if before is not None and decisions.lacks(group[0]):
                earlier = before.stream(group[0].stream)[: group[0].version - 1]
                decisions.learn(group[0].stream, earlier)
            if readable.issuperset(stored.position for stored in group):
                decisions.check(command.data, group)
        said += [f"shard {shard}: {text}" for text in report.differences]
    return said


def an_answer_implies_a_durable_job(evidence: Evidence) -> list[str]:
    """12. A 202 or a first byte implies a durable JobRequested and a committed match."""
    said = []
    for call in evidence.calls or ():
        if call.status not in (200, 202):
            continue
        rows = evidence.job(call.job_id)
        if not rows or not isinstance(rows[0][1], e.JobRequested):
            said.append(f"job {call.job_id} was answered with {call.status} and is not in the log")
        elif call.received_bytes and match_of(rows, call.epoch or 1) is None:
            said.append(f"job {call.job_id} gave bytes of epoch {call.epoch} without its match")
    return said


def twice_equals_once(evidence: Evidence) -> list[str]:
    """13. An event applied twice equals once: ids derive from their cause, folds ignore repeats."""
    said = []
    for shard, rows in evidence.logs.items():
        before = evidence.before.get(shard)
        earlier = before.event_ids if before else ()
        seen: set[str] = set()
        index: Counter[str] = Counter()
        for stored in rows:
            expected = ids.event_id(stored.causation_id, index[stored.causation_id])
            index[stored.causation_id] += 1
            if stored.event_id in seen or stored.event_id in earlier:
                said.append(f"shard {shard}: event {stored.event_id} is there twice")
            elif stored.event_id != expected:
                said.append(f"shard {shard} position {stored.position}: an id not of its cause")
            seen.add(stored.event_id)
    for job_id, rows in evidence.jobs.items():
        said += _fold_twice(job_id, [stored for stored, _ in rows])
    for shard, tables in (evidence.ledgers or {}).items():
        lines = Counter((position, line) for _, position, line, _, _ in tables.entries)
        said += [
            f"shard {shard}: position {p} line {n} was posted {times} times"
            for (p, n), times in lines.items()
            if times > 1
        ]
    return said


def _fold_twice(job_id: str, rows: Sequence[StoredEvent]) -> list[str]:
    """The matcher's view of a job after every row was delivered once, and twice."""
    once, twice = Memory(0, 1.0), Memory(0, 1.0)
    for stored in rows:
        once.apply_appended([stored])
        twice.apply_appended([stored, stored])
    return [] if once.jobs == twice.jobs else [f"folding the rows of job {job_id} twice changes it"]


# ---- 14 to 16: content, chain, bytes ----


def no_plaintext(evidence: Evidence) -> list[str]:
    """14. No canary of any prompt or result is in any file, log, trace, stream or dump."""
    return [f"a canary was found in {place}" for place in evidence.canaries_found or ()]


def payouts_on_chain_are_confirmed(evidence: Evidence) -> list[str]:
    """15. Payouts seen on chain equal PayoutConfirmed, amount for amount."""
    if evidence.chain_payouts is None:
        return []
    confirmed: dict[str, int] = {}
    said = []
    for rows in evidence.logs.values():
        for stored in rows:
            if stored.type == "PayoutConfirmed":
                data = canonical.loads_object(stored.data)
                payout = str(data["payout_id"])
                if payout in confirmed:
                    said.append(f"payout {payout} was confirmed twice")
                confirmed[payout] = int(data["amount_nanoton"])
    for payout in sorted(confirmed.keys() | evidence.chain_payouts.keys()):
        here, there = confirmed.get(payout), evidence.chain_payouts.get(payout)
        if here != there:
            said.append(f"payout {payout}: the log says {here} nanoTON, the chain {there}")
    return said


def every_byte_decodes(evidence: Evidence) -> list[str]:
    """16. Every byte ever published decodes: rows, messages, commands; and is canonical."""
    said = []
    for shard, rows in evidence.logs.items():
        for stored in rows:
            said += _decode_fault(f"shard {shard} position {stored.position}", stored)
    for shard, messages in (evidence.streams or {}).items():
        for message in messages:
            where = f"EVENTS_{shard} sequence {message.sequence}"
            try:
                stored = StoredEvent.from_message(message.headers, message.body)
            except (KeyError, ValueError) as error:
                said.append(f"{where} is no event ({type(error).__name__})")
                continue
            said += _decode_fault(where, stored)
    for shard, commands in (evidence.commands or {}).items():
        for command in commands:
            try:
                if command.data != b"{}":
                    decode_command(command.data)
            except (KeyError, ValueError) as error:
                said.append(
                    f"shard {shard}: command {command.command_id} does not decode"
                    f" ({type(error).__name__})"
                )
    return said


def _decode_fault(where: str, stored: StoredEvent) -> list[str]:
    try:
        e.decode_event(stored.type, stored.schema_version, stored.data)  # the bytes, afresh
        canonical.loads_object(stored.data)
    except (KeyError, ValueError) as error:
        return [f"{where} ({stored.type}) does not decode ({type(error).__name__})"]
    return []


INVARIANTS: tuple[Callable[[Evidence], list[str]], ...] = (
    every_job_ends_once,
    log_is_dense_and_chained,
    stream_equals_log,
    entries_sum_to_zero,
    holds_never_negative,
    client_is_charged_once_for_receipted_output,
    provider_is_paid_for_the_live_epoch,
    no_client_below_zero,
    one_live_lease_and_rising_epochs,
    same_key_same_job_same_bytes,
    replay_equals_live,
    an_answer_implies_a_durable_job,
    twice_equals_once,
    no_plaintext,
    payouts_on_chain_are_confirmed,
    every_byte_decodes,
)


def check_all(evidence: Evidence) -> list[str]:
    """Every violation as "<number> <checker>: <sentence>"; empty if all sixteen hold."""
    return [
        f"{number} {checker.__name__}: {sentence}"
        for number, checker in enumerate(INVARIANTS, start=1)
        for sentence in checker(evidence)
    ]
