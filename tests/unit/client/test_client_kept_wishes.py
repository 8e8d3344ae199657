"""A request that comes back has the same wishes, or is another one."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cocoon.client.checks import Match, check_token_prices
from cocoon.client.choice import Candidate
from cocoon.client.job import Job
from cocoon.client.kept import KeptRequests
from cocoon.client.session import Preferences, SealedSession
from cocoon.evidence.verdict import Assurance
from cocoon.kernel.clock import SystemRandomness
from cocoon.kernel.errors import BadRequest, Conflict, EvidenceRejected
from cocoon.sealing import KeyBundle, KeyRing
from tests.support.job_world import QUOTE
from tests.unit.client.test_client_bounds_and_choice import candidate

RANDOM = SystemRandomness()
CALLER, NAME = "ck", "k"


class Hand:
    """A clock that stands still."""

    def now_ms(self) -> int:
        return 1_000_000

    def monotonic_s(self) -> float:
        return 1000.0


def real(name: str) -> Candidate:
    key = KeyRing().generate(RANDOM)
    return candidate(name, bundle=KeyBundle(key, 1, 0, 2**50, bytes(32)))


class Directory:
    def __init__(self, *pool: Candidate) -> None:
        self.pool = pool

    async def listing(self, *_: object, **__: object) -> Any:
        return SimpleNamespace(
            usable=lambda _: list(self.pool), policy_hash=bytes(32), open_job_nanoton=None
        )


def session(directory: Directory, kept: KeptRequests) -> SealedSession:
    return SealedSession(
        cast("Any", None), cast("Any", directory), Preferences({Assurance.ATTESTED}), kept,
        clock=Hand(), randomness=RANDOM,
    )  # fmt: skip


def body(**more: Any) -> bytes:
    return json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}
    ).encode()


def sealed_to(job: Job) -> set[str]:
    return {addressee.provider_id for addressee in job._sealing.by_key_id.values()}


def asked_twice(folder: Path, first: dict[str, Any], second: dict[str, Any]) -> Job:
    """Under one Idempotency-Key, with a restart of the client in between."""
    directory = Directory(real("a"), real("b"))

    async def ask(more: dict[str, Any]) -> Job:
        with closing(KeptRequests(folder, clock=Hand(), randomness=RANDOM)) as kept:
            return await session(directory, kept).prepare(
                body(**more), api_key=CALLER, idempotency_key=NAME
            )

    asyncio.run(ask(first))
    return asyncio.run(ask(second))


def test_the_same_key_with_other_wishes_is_another_request(tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="another request"):
        asked_twice(tmp_path, {}, {"provider": {"ignore": ["a"]}})


def test_a_repeat_tells_its_wishes_again_and_holds_its_prices(tmp_path: Path) -> None:
    wishes = {"provider": {"only": ["b"], "max_output_nanoton_per_mtok": "2000000"}}
    job = asked_twice(tmp_path, wishes, wishes)
    assert sealed_to(job) == {"b"}
    told = json.loads(job._sealing.headers["x-cocoon-preferences"])
    assert (told["only"], told["max_output_nanoton_per_mtok"]) == (["b"], "2000000")
    assert job._sealing.most_nanoton_per_mtok == (None, 2_000_000)


async def test_who_is_wished_for_alone_is_waited_for_when_its_key_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = Directory(real("a"), real("b"))
    kept = KeptRequests(None, clock=Hand(), randomness=RANDOM)
    job = await session(directory, kept).prepare(body(provider={"only": ["a"]}), api_key=CALLER)
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        directory.pool = (real("a"), directory.pool[1])  # its successor

    monkeypatch.setattr(asyncio, "sleep", sleep)
    await job._seal_again(job._sealing, "failed")
    assert waited == [0.5]


async def test_only_of_a_name_s_rarer_model_is_no_wish_that_nobody_meets() -> None:
    rare = candidate("c", model_id="cd" * 32, bundle=real("c").bundle)
    directory = Directory(real("a"), real("b"), rare)
    kept = KeptRequests(None, clock=Hand(), randomness=RANDOM)
    job = await session(directory, kept).prepare(body(provider={"only": ["c"]}), api_key=CALLER)
    assert sealed_to(job) == {"c"}


@pytest.mark.parametrize("more", [{}, {"provider": {"sort": "price"}}])
async def test_half_a_character_is_refused_by_name(more: dict[str, Any]) -> None:
    kept = KeptRequests(None, clock=Hand(), randomness=RANDOM)
    text = body(**more).replace(b'"hi"', b'"\\ud83d"')
    with pytest.raises(BadRequest) as refused:
        await session(Directory(real("a")), kept).prepare(text, api_key=CALLER)
    assert refused.value.code == "invalid_value"


@pytest.mark.parametrize(
    ("most", "refused"),
    [((None, None), False), ((10**6, 4 * 10**6), False), ((10**6 - 1, None), True),
     ((None, 4 * 10**6 - 1), True)],
)  # fmt: skip
def test_an_answer_over_the_caller_s_price_is_not_believed(
    most: tuple[int | None, int | None], refused: bool
) -> None:
    match = Match("j", "p", 1, QUOTE, b"", "")
    if not refused:
        check_token_prices(match, most)
        return
    with pytest.raises(EvidenceRejected) as caught:
        check_token_prices(match, most)
    assert caught.value.code == "over_price"
