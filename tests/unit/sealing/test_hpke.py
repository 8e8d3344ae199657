"""HPKE against RFC 9180's own vector, an independent implementation, and bad points."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyhpke import AEADId, CipherSuite, KDFId, KEMId

from cocoon.kernel.errors import SealingError
from cocoon.sealing import hpke
from tests.support.sentences import says_why

ORACLE = CipherSuite.new(KEMId.DHKEM_X25519_HKDF_SHA256, KDFId.HKDF_SHA256, AEADId.EXPORT_ONLY)
KEYS = st.binary(min_size=32, max_size=32)

# RFC 9180, appendix A.7.1
A71 = {
    "info": "4f6465206f6e2061204772656369616e2055726e",
    "sk_e": "095182b502f1f91f63ba584c7c3ec473d617b8b4c2cec3fad5af7fa6748165ed",
    "sk_r": "33d196c830a12f9ac65d6e565a590d80f04ee9b19c83c87f2c170d972a812848",
    "pk_r": "194141ca6c3c3beb4792cd97ba0ea1faff09d98435012345766ee33aae2d7664",
    "enc": "e5e8f9bfff6c2f29791fc351d2c25ce1299aa5eaca78a757c0b4fb4bcd830918",
}
A71_EXPORTS = {
    "": "7a36221bd56d50fb51ee65edfd98d06a23c4dc87085aa5866cb7087244bd2a36",
    "00": "d5535b87099c6c3ce80dc112a2671c6ec8e811a2f284f948cec6dd1708ee33f0",
    "54657374436f6e74657874": "ffaabc85a776136ca0c378e5d084c9140ab552b78f039d2e8775f26efff4c70e",
}

LOW_ORDER = [
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
]


def test_rfc_9180_export_only_vector() -> None:
    vector = {name: bytes.fromhex(text) for name, text in A71.items()}
    enc, sender = hpke.setup_sender(vector["pk_r"], vector["info"], eph_sk=vector["sk_e"])
    receiver = hpke.setup_receiver(enc, vector["sk_r"], vector["info"])
    assert enc == vector["enc"]
    for context, value in A71_EXPORTS.items():
        label = bytes.fromhex(context)
        assert sender.export(label, 32).hex() == value
        assert receiver.export(label, 32).hex() == value


@settings(max_examples=25, deadline=None)
@given(KEYS, KEYS, st.binary(max_size=200), st.binary(max_size=60), st.integers(1, 300))
def test_another_implementation_derives_the_same(
    sk_r: bytes, sk_e: bytes, info: bytes, label: bytes, size: int
) -> None:
    enc, ours = hpke.setup_sender(hpke.public_key(sk_r), info, eph_sk=sk_e)
    theirs = ORACLE.create_recipient_context(
        enc, ORACLE.kem.deserialize_private_key(sk_r), info=info
    )
    assert ours.export(label, size) == theirs.export(label, size)

    their_enc, their_sender = ORACLE.create_sender_context(
        ORACLE.kem.deserialize_public_key(hpke.public_key(sk_r)), info=info
    )
    our_receiver = hpke.setup_receiver(their_enc, sk_r, info)
    assert our_receiver.export(label, size) == their_sender.export(label, size)


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[:8])
def test_a_low_order_point_is_refused_on_both_sides(point: bytes) -> None:
    with pytest.raises(SealingError, check=says_why) as sender:
        hpke.setup_sender(point, b"info", eph_sk=b"\x07" * 32)
    with pytest.raises(SealingError, check=says_why) as receiver:
        hpke.setup_receiver(point, b"\x07" * 32, b"info")
    assert sender.value.code == receiver.value.code == "bad_key"


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_key_of_another_length_never_reaches_the_library(size: int) -> None:
    for secret, public in ((bytes(size), b"\x09" + bytes(31)), (b"\x07" * 32, bytes(size))):
        with pytest.raises(SealingError, check=says_why) as refused:
            hpke.x25519(secret, public)
        assert refused.value.code == "bad_key"
    with pytest.raises(SealingError, check=says_why) as short:
        hpke.public_key(bytes(size))
    assert short.value.code == "bad_key"


def test_an_export_context_shows_and_gives_away_nothing() -> None:
    import pickle

    _, context = hpke.setup_sender(hpke.public_key(b"\x05" * 32), b"", eph_sk=b"\x06" * 32)
    assert repr(context) == "ExportContext(<secret>)"
    with pytest.raises(TypeError, match=r"^an HPKE context is not serialised$"):
        pickle.dumps(context)


def test_rfc_5869_vector() -> None:
    """Appendix A.1: 42 bytes, so that a second block is begun."""
    info = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9")
    prk = hpke.hkdf_extract(bytes(range(13)), b"\x0b" * 22)
    known = "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5"  # pragma: allowlist secret  # noqa: E501
    assert prk.hex() == known
    known = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"  # pragma: allowlist secret  # noqa: E501
    assert hpke.hkdf_expand(prk, info, 42).hex() == known


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 65, 255 * 32])
def test_an_export_of_any_length_begins_as_the_longest_does(size: int) -> None:
    longest = hpke.hkdf_expand(bytes(32), b"info", 255 * 32)
    assert hpke.hkdf_expand(bytes(32), b"info", size) == longest[:size]


@pytest.mark.parametrize("size", [0, 255 * 32 + 1])
def test_an_export_outside_hkdf_s_range_is_a_caller_s_error(size: int) -> None:
    with pytest.raises(ValueError, match="8,160", check=says_why):
        hpke.hkdf_expand(bytes(32), b"", size)
