"""Small rules of the agent: bills, dispatch headers, frames, policies, addresses."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from cocoon.chat import TokenUsage
from cocoon.contracts import messages as m
from cocoon.contracts.events import Quote
from cocoon.devnet.authority import DevAuthority, dev_policy, dev_trust
from cocoon.domain.pricing import TokenCounts, greatest_price, price
from cocoon.evidence.policy import policy_hash, sign
from cocoon.kernel.errors import BadRequest, ConfigurationError, Unavailable
from cocoon.sealing import Profile, RequestHeader, Status, pack_flags
from cocoon.sealing.padding import is_public_count
from services.provider import frames
from services.provider.answering import bill, check_price
from services.provider.backends.openai_server import check_url
from services.provider.jobs import Dispatch
from services.provider.policies import GRACE_MS, PolicyWatch
from services.provider.tee import KernelTdx

QUOTE = Quote(
    model_id="ab" * 32, input_nanoton_per_mtok=3_000_001, cached_input_nanoton_per_mtok=7,
    output_nanoton_per_mtok=9_000_001, fee_bps=500,
)  # fmt: skip


def header(profile: Profile, max_input: int, max_output: int) -> RequestHeader:
    return RequestHeader(
        job_id=bytes(16), model_id=bytes(32),
        max_price_nanoton=greatest_price(QUOTE, max_input, max_output),
        max_input_tokens=max_input, max_output_tokens=max_output, not_after_ms=1,
        policy_hash=bytes(32), flags=pack_flags(profile, stream=profile is not Profile.P0),
    )  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(Profile), st.sampled_from(Status), st.data())
def test_a_bill_is_public_priced_as_shown_and_never_above_the_hold(
    profile: Profile, status: Status, data: st.DataObject
) -> None:
    max_input, max_output = data.draw(st.integers(1, 500)), data.draw(st.integers(1, 500))
    prompt, completion = (
        data.draw(st.integers(0, max_input)), data.draw(st.integers(0, max_output)),
    )  # fmt: skip
    usage = TokenUsage(
        prompt, completion, cached=data.draw(st.integers(0, prompt)),
        reasoning=data.draw(st.integers(0, completion)),
    )  # fmt: skip
    head = header(profile, max_input, max_output)
    account = bill(status, usage, head, QUOTE)
    counts = account.counts
    assert is_public_count(profile, counts[0], max_input)
    assert is_public_count(profile, counts[1], counts[0])
    assert is_public_count(profile, counts[2], max_output)
    assert is_public_count(profile, counts[3], counts[2])
    if status in (Status.REFUSED, Status.FAILED):
        assert account.price_nanoton == 0
    else:
        assert account.price_nanoton == price(QUOTE, TokenCounts(*counts))
    assert account.price_nanoton <= head.max_price_nanoton


def test_a_job_that_could_cost_more_than_its_cap_is_refused() -> None:
    head = header(Profile.P0, 100, 100)
    check_price(head, QUOTE)
    dearer = QUOTE.model_copy(update={"output_nanoton_per_mtok": 9_900_001})
    with pytest.raises(BadRequest):
        check_price(head, dearer)


def test_a_frame_message_tells_its_kind_its_offset_and_at_the_end_the_blob() -> None:
    assert frames.encode(frames.MORE, 7, b"x") == b"\0" + (7).to_bytes(8, "big") + b"x"
    last = frames.encode(frames.LAST, 9, b"", bytes(32))
    assert last == b"\1" + (9).to_bytes(8, "big") + bytes(32)


def test_dispatch_headers_are_read_strictly() -> None:
    good = {
        m.H_JOB: "ab" * 16, m.H_EPOCH: "3", m.H_REQ_HASH: "cd" * 32, m.H_GATEWAY: "gw1",
        m.H_QUOTE: QUOTE.to_canonical().decode(),
    }  # fmt: skip
    assert Dispatch.read(good).route == frames.Route("gw1", 3)
    bad: list[dict[str, Any]] = [
        {m.H_JOB: "AB" * 16}, {m.H_EPOCH: "0"}, {m.H_EPOCH: "x"}, {m.H_REQ_HASH: "cd"},
        {m.H_GATEWAY: "a.b"}, {m.H_GATEWAY: ""}, {m.H_GATEWAY: ">"}, {m.H_QUOTE: "{}"},
        {m.H_SEALED: "../x"}, {m.H_QUOTE: "nope"},
    ]  # fmt: skip
    for change in bad:
        with pytest.raises(ValueError, match=r"header|hex|invalid literal"):
            Dispatch.read({**good, **change})


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://localhost:1/v1", "https://x.y"])
def test_prompts_go_to_loopback_or_https_only(url: str) -> None:
    assert not check_url(url + "/").endswith(("/", "/v1"))


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1:8000", "http://engine", "ftp://127.0.0.1", "https://", "http://a@localhost"]
)  # fmt: skip
def test_a_prompt_never_crosses_a_network_in_the_clear(url: str) -> None:
    with pytest.raises(ConfigurationError):
        check_url(url)


def test_policies_are_taken_only_signed_newer_and_of_this_network(tmp_path: Path) -> None:
    now_ms = time.time_ns() // 1_000_000
    authority, signer = DevAuthority.create(now_ms), SigningKey(secrets.token_bytes(32))
    trust = dev_trust(authority, "net", bytes(signer.verify_key), bytes(32))
    path = tmp_path / "policy.json"

    def write(by: SigningKey = signer, network: str = "net", version: int = 1) -> bytes:
        policy = dev_policy(authority, network, version=version)
        path.write_bytes(sign(policy, [bytes(by)]).to_canonical() + b" " * secrets.randbelow(64))
        return policy_hash(policy)

    watch = PolicyWatch(path, trust)
    assert watch.hashes(now_ms) == frozenset()
    first = write(version=2)
    watch.refresh(now_ms)
    assert watch.hashes(now_ms) == {first}
    bad: list[dict[str, Any]] = [
        {"by": SigningKey(bytes(32))}, {"network": "other"}, {"version": 1},
    ]  # fmt: skip
    for change in bad:
        write(**change)
        with pytest.raises(ConfigurationError):
            watch.refresh(now_ms)
        assert watch.hashes(now_ms) == {first}
    second = write(version=3)
    watch.refresh(now_ms)
    assert watch.hashes(now_ms) == {first, second}
    assert watch.hashes(now_ms + GRACE_MS) == {second}


async def test_the_kernels_report_is_read_as_configfs_gives_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="TDX guest"):
        KernelTdx(tmp_path / "missing")
    source = KernelTdx(tmp_path)
    with pytest.raises(Unavailable):
        await source.quote(bytes(64))
