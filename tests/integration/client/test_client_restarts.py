"""Restarts, jobs that failed and jobs that a broken line cancelled: never a second paid job."""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from cocoon.client import NetworkOptions, async_openai_client, job, kept, openai_client, session
from cocoon.client.gateway import Gateway
from cocoon.client.lines import Unreached
from cocoon.client.trust import Attested, TrustKeeper
from cocoon.kernel.clock import SystemClock
from cocoon.kernel.errors import ConfigurationError, Unavailable
from cocoon.sealing import parse_header
from tests.support.client_world import KEY, TEXT, Faults, TestNetwork, now_ms, served, trust

ASK: dict[str, Any] = {"model": "skills-1", "messages": [{"role": "user", "content": "hi"}]}
ONE = {"extra_headers": {"Idempotency-Key": "order-1"}}
LOST = {"error": {"message": "Lost.", "type": "t", "param": None, "code": "provider_lost"}}
CANCELLED = {"error": {"message": "Gone.", "type": "t", "param": None, "code": "job_cancelled"}}
STALE = {"error": {"message": "Seal again.", "type": "t", "param": None, "code": "reseal"}}
LATE = {"error": {"message": "Too late.", "type": "t", "param": None, "code": "expired"}}
FAILED_LOG = {"status": "failed", "price_nanoton": None}
CANCELLED_LOG = {"status": "cancelled", "price_nanoton": None}


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "REPLACED_AFTER_S", (0.01, 0.01, 0.6))


@pytest.fixture
def network() -> Iterator[TestNetwork]:
    world = TestNetwork()
    with served(world) as url:
        world.url = url
        yield world
        world.gate.set()


def client(network: TestNetwork, state_dir: Path | None = None, **more: Any) -> openai.OpenAI:
    clock = more.pop("clock", SystemClock())
    options = NetworkOptions(
        gateway_url=network.url, trust=trust(), api_key=KEY, state_dir=state_dir, clock=clock
    )
    return openai_client(options, **{"max_retries": 0, **more})


@pytest.mark.parametrize("stream", [False, True])
def test_a_key_repeated_after_a_restart_gets_the_same_jobs_answer(
    network: TestNetwork, tmp_path: Path, stream: bool
) -> None:
    answers = []
    for _ in range(2):
        with client(network, tmp_path) as made:
            raw = made.chat.completions.with_raw_response.create(**ASK, **ONE, stream=stream)
            answers.append(raw.http_response.read())
    assert answers[0] == answers[1]
    assert b"quick" in answers[0]
    assert network.paid == 1
    assert len(network.seen) == 2
    assert len(set(network.seen)) == 1


def test_another_body_under_the_key_after_a_restart_is_a_conflict(
    network: TestNetwork, tmp_path: Path
) -> None:
    with client(network, tmp_path) as made:
        made.chat.completions.create(**ASK, **ONE)
    with client(network, tmp_path) as made:
        with pytest.raises(openai.ConflictError) as caught:
            made.chat.completions.create(**ASK, **ONE, seed=1)
        assert caught.value.code == "idempotency_mismatch"
    assert len(network.seen) == 1


def test_the_gateway_can_not_test_guesses_of_a_key(network: TestNetwork, tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b", None):
        with client(network, folder) as made:
            made.chat.completions.create(**ASK, **ONE)
    assert len(network.keys) == 3  # each state directory has names of its own
    with client(network) as made, pytest.raises(openai.ConflictError):
        made.chat.completions.create(**ASK, **ONE)  # without one they are refused, not paid twice
    for file in (tmp_path / "a").rglob("*"):
        if file.is_file():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            assert b"hi" not in file.read_bytes() or file.name == "trust-state.json"
            assert b"order-1" not in file.read_bytes()
            assert b"CAI1" not in file.read_bytes()


@pytest.mark.parametrize("key", [{}, ONE])
def test_a_job_that_failed_unpaid_is_sealed_again(network: TestNetwork, key: Any) -> None:
    network.faults = Faults(refuse=[(503, LOST, {})], log=FAILED_LOG)
    with client(network) as made:
        answer = made.chat.completions.create(**ASK, **key)
    assert answer.choices[0].message.content == TEXT
    first, second = (parse_header(envelope)[0] for envelope in network.seen)
    assert first.job_id != second.job_id
    assert network.paid == 1


def test_a_job_that_fails_again_is_not_sealed_a_third_time(network: TestNetwork) -> None:
    network.faults = Faults(refuse=[(503, LOST, {})] * 4, log=FAILED_LOG)
    with client(network) as made:
        with pytest.raises(openai.InternalServerError) as caught:
            made.chat.completions.create(**ASK, **ONE)
        assert caught.value.code == "provider_lost"
        assert len(network.seen) == 2
        network.faults.refuse.pop()
        made.chat.completions.create(**ASK, **ONE)  # the same key, asked for anew
    assert len(network.seen) == 4
    assert network.paid == 1


@pytest.mark.parametrize(("status", "price"), [("matched", None), ("failed", "5")])
def test_a_job_that_may_be_paid_is_not_sealed_again(
    network: TestNetwork, status: str, price: str | None
) -> None:
    log = {"status": status, "price_nanoton": price}
    network.faults = Faults(refuse=[(503, LOST, {})], log=log)
    with client(network) as made, pytest.raises(openai.InternalServerError):
        made.chat.completions.create(**ASK, **ONE)
    assert len(network.seen) == 1


MAY_BE_PAID = [
    {"status": "settled", "price_nanoton": "5"},
    {"status": "matched", "price_nanoton": None},
    {"status": "failed", "price_nanoton": "5"},
    {"status": "cancelled", "price_nanoton": "5"},
]


@pytest.mark.parametrize("log", MAY_BE_PAID)
@pytest.mark.parametrize("refusal", [(409, STALE, {}), (504, LATE, {})])
@pytest.mark.parametrize("key", [{}, ONE])
def test_a_job_that_the_gateway_wants_sealed_again_and_that_may_be_paid_is_attached_to(
    network: TestNetwork, refusal: Any, log: Any, key: Any
) -> None:
    network.faults = Faults(refuse=[refusal], log=log)
    with client(network) as made:
        answer = made.chat.completions.create(**ASK, **key)
    assert answer.choices[0].message.content == TEXT
    assert len(network.seen) == 2
    assert len(set(network.seen)) == 1
    assert network.paid == 1


@pytest.mark.parametrize("refusal", [(409, STALE, {}), (504, LATE, {})])
def test_a_gateway_that_disowns_a_job_for_ever_gets_no_other_one(
    network: TestNetwork, monkeypatch: pytest.MonkeyPatch, refusal: Any
) -> None:
    monkeypatch.setattr(job, "STANDS_DELAYS_S", (0.01, 0.01))
    network.faults = Faults(refuse=[refusal] * 9, log=MAY_BE_PAID[0])
    with client(network) as made, pytest.raises(openai.InternalServerError) as caught:
        made.chat.completions.create(**ASK, **ONE)
    assert (caught.value.status_code, caught.value.code) == (503, "reseal")
    assert len(network.seen) == 3
    assert len(set(network.seen)) == 1


@pytest.mark.parametrize("refusal", [(409, STALE, {}), (504, LATE, {})])
def test_nothing_is_sealed_again_while_the_log_can_not_be_read(
    network: TestNetwork, monkeypatch: pytest.MonkeyPatch, refusal: Any
) -> None:
    async def away(self: Gateway, *_: Any) -> Any:
        raise Unavailable("Away.")

    network.faults = Faults(refuse=[refusal])
    with client(network) as made:
        with monkeypatch.context() as patched:
            patched.setattr(Gateway, "job", away)
            with pytest.raises(openai.InternalServerError) as caught:
                made.chat.completions.create(**ASK, **ONE)
        assert (caught.value.status_code, caught.value.code) == (503, "reseal")
        made.chat.completions.create(**ASK, **ONE)
    assert len(set(network.seen)) == 1


@pytest.mark.parametrize("log", [None, FAILED_LOG, CANCELLED_LOG])
def test_a_reseal_costs_one_question_to_the_log(
    network: TestNetwork, monkeypatch: pytest.MonkeyPatch, log: Any
) -> None:
    asking, asked = Gateway.job, []

    async def counted(self: Gateway, job_id: str, *args: Any) -> Any:
        asked.append(job_id)
        return await asking(self, job_id, *args)

    monkeypatch.setattr(Gateway, "job", counted)
    network.faults = Faults(refuse=[(409, STALE, {})], log=log)
    with client(network) as made:
        answer = made.chat.completions.create(**ASK, **ONE)
    assert answer.choices[0].message.content == TEXT
    first, second = (parse_header(envelope)[0].job_id.hex() for envelope in network.seen)
    assert first != second
    assert asked == [first]


class Late:
    """A clock that can be put forward."""

    def __init__(self) -> None:
        self.ahead_ms = 0

    def now_ms(self) -> int:
        return now_ms() + self.ahead_ms

    def monotonic_s(self) -> float:
        return time.monotonic() + self.ahead_ms / 1000


@pytest.mark.parametrize("log", [None, FAILED_LOG, CANCELLED_LOG])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_key_whose_request_expired_before_it_ran_is_sealed_again_with_a_new_deadline(
    network: TestNetwork, tmp_path: Path, restarted: bool, log: Any
) -> None:
    clock = Late()
    network.faults = Faults(refuse=[(503, LOST, {})])  # nor does the log know the job
    with client(network, tmp_path, clock=clock) as made:
        with pytest.raises(openai.InternalServerError):
            made.chat.completions.create(**ASK, **ONE)
        if not restarted:
            _ask_late(network, made, clock, log)
    if restarted:
        with client(network, tmp_path, clock=clock) as made:
            _ask_late(network, made, clock, log)
    assert network.seen[0] == network.seen[1]
    first, _, last = (parse_header(envelope)[0] for envelope in network.seen)
    assert first.job_id != last.job_id
    assert last.not_after_ms > first.not_after_ms
    with client(network, tmp_path, clock=clock) as made:  # what is kept now is what ran
        made.chat.completions.create(**ASK, **ONE)
    assert network.seen[3] == network.seen[2]
    assert network.paid == 1


def _ask_late(network: TestNetwork, made: openai.OpenAI, clock: Late, log: Any) -> None:
    clock.ahead_ms = session.REQUEST_TTL_MS + 1000
    network.enclaves[0].rotate(clock.ahead_ms)
    network.faults = Faults(refuse=[(504, LATE, {})], log=log)
    assert made.chat.completions.create(**ASK, **ONE).choices[0].message.content == TEXT


def test_a_request_that_failed_unpaid_may_come_back_after_its_deadline(
    network: TestNetwork, tmp_path: Path
) -> None:
    clock = Late()
    network.faults = Faults(refuse=[(503, LOST, {})])
    with (
        client(network, tmp_path, clock=clock) as made,
        pytest.raises(openai.InternalServerError),
    ):
        made.chat.completions.create(**ASK, **ONE)
    clock.ahead_ms = session.REQUEST_TTL_MS + 1000
    network.enclaves[0].rotate(clock.ahead_ms)
    network.faults = Faults(refuse=[(503, LOST, {})], log=FAILED_LOG)
    with client(network, tmp_path, clock=clock) as made:
        assert made.chat.completions.create(**ASK, **ONE).choices[0].message.content == TEXT
    assert network.paid == 1


def test_what_was_sealed_again_is_what_a_restart_repeats(
    network: TestNetwork, tmp_path: Path
) -> None:
    network.faults = Faults(refuse=[(503, LOST, {})], log=FAILED_LOG)
    for _ in range(2):
        with client(network, tmp_path) as made:
            assert made.chat.completions.create(**ASK, **ONE).choices[0].message.content == TEXT
    assert network.seen[1] == network.seen[2]
    assert network.paid == 1


def test_a_replacement_for_the_lost_provider_is_waited_for(
    network: TestNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    network.faults = Faults(refuse=[(503, LOST, {})], log=FAILED_LOG)
    enclaves, reads = network.enclaves, network.directory_reads
    with client(network) as made:
        made.models.list()
        original = TestNetwork._directory

        async def nobody_at_first(self: TestNetwork, scope: Any, send: Any) -> None:
            gone = bool(self.seen) and self.directory_reads < reads + 3
            self.enclaves = [] if gone else enclaves
            await original(self, scope, send)

        monkeypatch.setattr(TestNetwork, "_directory", nobody_at_first)
        answer = made.chat.completions.create(**ASK, **ONE)
    assert answer.choices[0].message.content == TEXT
    assert network.directory_reads >= reads + 3


def test_the_key_that_did_not_answer_is_not_sealed_to_while_another_may_come(
    network: TestNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider that died stays listed for a moment; its successor has other keys."""
    network.faults = Faults(refuse=[(409, STALE, {})])
    original, reads = TestNetwork._directory, network.directory_reads

    async def late(self: TestNetwork, scope: Any, send: Any) -> None:
        if self.directory_reads == reads + 2:
            self.enclaves[0].rotate()
        await original(self, scope, send)

    monkeypatch.setattr(TestNetwork, "_directory", late)
    with client(network) as made:
        made.chat.completions.create(**ASK)
    first, second = (parse_header(envelope)[0].key_ids for envelope in network.seen)
    assert first != second
    assert network.directory_reads == reads + 3


def test_a_job_that_a_broken_line_cancelled_is_sealed_again(network: TestNetwork) -> None:
    network.faults = Faults(cut_after=0, refuse_repeats=(409, CANCELLED), log=CANCELLED_LOG)
    with client(network) as made:
        answer = made.chat.completions.create(**ASK, **ONE)
    assert answer.choices[0].message.content == TEXT
    assert len(network.jobs) == 2


def test_a_job_that_the_gateway_gave_up_and_cancelled_is_sealed_again(network: TestNetwork) -> None:
    """It could not reach its matcher, said 503 and cancelled: the repeat is no cancelled job."""
    away = {"error": {"message": "Away.", "type": "t", "param": None, "code": "unavailable"}}
    network.faults = Faults(
        refuse=[(503, away, {}), (409, CANCELLED, {})], log={"status": "matching"}
    )
    with client(network) as made:
        with pytest.raises(openai.InternalServerError):
            made.chat.completions.create(**ASK, **ONE)
        network.faults.log = CANCELLED_LOG
        answer = made.chat.completions.create(**ASK, **ONE)
    assert answer.choices[0].message.content == TEXT
    assert len({parse_header(envelope)[0].job_id for envelope in network.seen}) == 2


def test_a_job_that_its_owner_cancelled_stays_cancelled(network: TestNetwork) -> None:
    network.faults = Faults(refuse=[(409, CANCELLED, {})], log=CANCELLED_LOG)
    with client(network) as made:
        with pytest.raises(openai.ConflictError) as caught:
            made.chat.completions.create(**ASK, **ONE)
        assert caught.value.code == "job_cancelled"
    assert len(network.seen) == 1


def test_a_restart_that_cancelled_its_job_seals_again(network: TestNetwork, tmp_path: Path) -> None:
    network.faults.slow_first = True
    with (
        client(network, tmp_path, timeout=0.5) as made,
        pytest.raises(openai.APITimeoutError),
    ):
        made.chat.completions.create(**ASK, **ONE)
    assert network.cancelled.wait(5)
    network.faults = Faults(refuse_repeats=(409, CANCELLED), log=CANCELLED_LOG)
    with client(network, tmp_path) as made:
        assert made.chat.completions.create(**ASK, **ONE).choices[0].message.content == TEXT
    assert len(network.jobs) == 2


def test_no_request_outlives_the_evidence_that_it_was_sealed_by(
    network: TestNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, until_ms = TrustKeeper.judge, now_ms() + 60_000

    async def short(self: TrustKeeper, *args: Any) -> Any:
        found = await judge(self, *args)
        return replace(found, valid_until_ms=until_ms) if isinstance(found, Attested) else found

    monkeypatch.setattr(TrustKeeper, "judge", short)
    with client(network) as made:
        made.chat.completions.create(**ASK)
    assert parse_header(network.seen[0])[0].not_after_ms == until_ms


def test_a_second_client_on_a_state_directory_is_refused_until_the_first_is_closed(
    network: TestNetwork, tmp_path: Path
) -> None:
    with client(network, tmp_path) as holder:
        holder.models.list()
        with client(network, tmp_path) as made:
            for _ in range(2):
                with pytest.raises(ConfigurationError, match=f"another client.*{tmp_path};"):
                    made.models.list()
    with client(network, tmp_path) as made:
        made.models.list()


def test_a_client_that_can_not_be_opened_lets_go_of_its_state_directory(
    network: TestNetwork, tmp_path: Path
) -> None:
    (tmp_path / "trust-state.json").write_text("{")
    with client(network, tmp_path) as made:
        for _ in range(2):
            with pytest.raises(ConfigurationError, match=r"trust-state"):
                made.models.list()
        (tmp_path / "trust-state.json").unlink()
        made.models.list()


def test_a_state_directory_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / kept.SECRET_FILE).write_bytes(b"short")
    (tmp_path / kept.SECRET_FILE).chmod(0o600)
    for folder in (tmp_path / "file", tmp_path):
        options = NetworkOptions(gateway_url="http://127.0.0.1:9", trust=trust(), state_dir=folder)
        with (
            openai_client(options, api_key="k", max_retries=0) as made,
            pytest.raises(ConfigurationError, match=str(folder)),
        ):
            made.models.list()


async def test_a_gateway_that_restarts_is_tried_again_before_it_is_called_unreachable(
    network: TestNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, away = Gateway._open, [2]

    async def away_for_a_while(self: Gateway, method: str, *args: Any) -> Any:
        if method == "POST" and away[0]:
            away[0] -= 1
            raise Unreached("ClientConnectorError")
        return await opening(self, method, *args)

    monkeypatch.setattr(Gateway, "_open", away_for_a_while)
    options = NetworkOptions(gateway_url=network.url, trust=trust(), api_key=KEY)
    async with async_openai_client(options, max_retries=0) as made:
        answer = await made.chat.completions.create(**ASK)
        assert answer.choices[0].message.content == TEXT
        away[0] = 100
        with pytest.raises(openai.InternalServerError, match=r"cannot be reached") as caught:
            await made.chat.completions.create(**ASK)
    assert caught.value.code == "gateway_unreachable"
    assert network.paid == 1
