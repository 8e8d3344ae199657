"""What waits for one shard's matcher takes no place of another's."""

from __future__ import annotations

from pathlib import Path

import pytest

from cocoon.kernel.errors import RateLimited
from services.gateway.admission import Admission, peer_of
from services.gateway.settings import GatewaySettings


def test_a_matcher_that_does_not_answer_fills_its_own_shards_room_only() -> None:
    settings = GatewaySettings(
        nats_url="nats://127.0.0.1", postgres_dsn_file=Path("dsn"), account_shards=(1, 2),
        max_unmatched_jobs=2,
    )  # fmt: skip
    admission = Admission(settings)
    with (
        admission.enter("key_1") as a, admission.enter("key_1") as b,
        admission.enter("key_2") as c, admission.enter("key_2") as d,
    ):  # fmt: skip
        a.asking(2)
        b.asking(2)
        with pytest.raises(RateLimited):
            c.asking(2)
        c.asking(1)
        assert admission.unmatched == 3
        a.answered()
        a.answered()
        d.asking(2)
    assert admission.unmatched == 0


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:0:1::5", "20010db800000001"),
        ("2001:db8:0:1:ffff::9", "20010db800000001"),
        ("", ""),
    ],
)
def test_a_peer_is_an_ipv4_address_or_a_64_of_ipv6(address: str, peer: str) -> None:
    assert peer_of(address) == peer


def test_public_reads_are_bounded_for_an_address_and_for_all() -> None:
    settings = GatewaySettings(
        nats_url="nats://127.0.0.1", postgres_dsn_file=Path("dsn"), max_public_reads=3,
        max_public_reads_per_address=2,
    )  # fmt: skip
    admission = Admission(settings)
    one, two, three = "192.0.2.1", "192.0.2.2", "192.0.2.3"
    with admission.enter_public_read(one), admission.enter_public_read(one):
        with pytest.raises(RateLimited, match="this address"):
            admission.enter_public_read(one).__enter__()
        with admission.enter_public_read(two), pytest.raises(RateLimited) as full:
            admission.enter_public_read(three).__enter__()
        assert full.value.code == "gateway_full"
    with admission.enter_public_read(one), admission.enter_public_read(one):
        pass
