"""Merkle proofs against every small tree, and signed checkpoints against a known one."""

from __future__ import annotations

import base64
import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from cocoon.evidence.checkpoint import (
    Checkpoint,
    is_consistent,
    is_included,
    key_hash,
    leaf_hash,
    open_checkpoint,
    tree_root,
)
from tests.support.sentences import says_why

NOTE = (Path(__file__).resolve().parents[2] / "vectors" / "tlog-checkpoint.txt").read_bytes()
ORIGIN = "example.com/cai-log"
KEYS = {
    "log.example": bytes(SigningKey(b"\1" * 32).verify_key),
    "witness.example": bytes(SigningKey(b"\2" * 32).verify_key),
}
# The entries and the root that RFC 6962 implementations share.
ENTRIES = [
    b"", b"\0", b"\x10", b"\x20\x21", b"\x30\x31", b"\x40\x41\x42\x43",
    bytes(range(0x50, 0x58)), bytes(range(0x60, 0x70)),
]  # fmt: skip
KNOWN_ROOT = bytes.fromhex("5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328")


def split(size: int) -> int:
    return 1 << (size - 1).bit_length() - 1


def inclusion(index: int, leaves: list[bytes]) -> list[bytes]:
    """The RFC's recursive definition: the oracle of the iterative verifier."""
    if len(leaves) == 1:
        return []
    k = split(len(leaves))
    if index < k:
        return [*inclusion(index, leaves[:k]), tree_root(leaves[k:])]
    return [*inclusion(index - k, leaves[k:]), tree_root(leaves[:k])]


def consistency(size: int, leaves: list[bytes], whole: bool = True) -> list[bytes]:
    if size == len(leaves):
        return [] if whole else [tree_root(leaves)]
    k = split(len(leaves))
    if size <= k:
        return [*consistency(size, leaves[:k], whole), tree_root(leaves[k:])]
    return [*consistency(size - k, leaves[k:], False), tree_root(leaves[:k])]


def test_the_root_is_the_shared_one() -> None:
    assert tree_root([leaf_hash(entry) for entry in ENTRIES]) == KNOWN_ROOT


def test_every_small_log_proves_its_leaves_and_its_growth() -> None:
    for size in range(1, 24):
        leaves = [leaf_hash(bytes([i])) for i in range(size)]
        new = Checkpoint(ORIGIN, size, tree_root(leaves))
        for i in range(size):
            proof = inclusion(i, leaves)
            assert is_included(leaves[i], i, size, proof, new.root)
            assert not is_included(leaf_hash(b"other"), i, size, proof, new.root)
            assert not is_included(leaves[i], i, size, [*proof, bytes(32)], new.root)
        for before in range(1, size + 1):
            old = Checkpoint(ORIGIN, before, tree_root(leaves[:before]))
            forked = Checkpoint(ORIGIN, before, bytes(32))
            proof = consistency(before, leaves)
            assert is_consistent(old, new, proof)
            assert not is_consistent(forked, new, proof)


def test_a_log_that_shrinks_or_changes_its_name_is_refused() -> None:
    one = Checkpoint(ORIGIN, 1, leaf_hash(b"a"))
    two = Checkpoint(ORIGIN, 2, tree_root([leaf_hash(b"a"), leaf_hash(b"b")]))
    assert is_consistent(one, two, [leaf_hash(b"b")])
    assert not is_consistent(two, one, [leaf_hash(b"b")])
    assert not is_consistent(one, Checkpoint("other", 2, two.root), [leaf_hash(b"b")])
    assert is_consistent(Checkpoint(ORIGIN, 0, tree_root([])), two, [])


def test_a_signed_checkpoint_opens() -> None:
    assert open_checkpoint(NOTE, ORIGIN, KEYS, 2) == Checkpoint(ORIGIN, 8, KNOWN_ROOT)


@pytest.mark.parametrize(
    ("note", "keys", "threshold"),
    [
        (NOTE.replace(b"\n8\n", b"\n9\n"), KEYS, 1),
        (NOTE.replace(b"log.example", b"new.example"), KEYS, 2),
        (NOTE, {"log.example": KEYS["log.example"]}, 2),
        (NOTE, {"log.example": KEYS["witness.example"]}, 1),
        (NOTE, KEYS, 0),
        (NOTE[:-1], KEYS, 1),
        (NOTE + NOTE.splitlines(keepends=True)[-1] * 40, KEYS, 1),
        (b"", KEYS, 1),
    ],
    ids=["edited", "renamed", "too few", "another key", "no threshold", "cut", "many", "empty"],
)
def test_a_bad_checkpoint_is_refused(note: bytes, keys: dict[str, bytes], threshold: int) -> None:
    with pytest.raises(ValueError, match="checkpoint", check=says_why):
        open_checkpoint(note, ORIGIN, keys, threshold)


def test_a_root_has_one_spelling() -> None:
    """Base64 of 32 bytes has two spare bits: a log that signs two texts of one root is refused."""
    key = SigningKey(bytes(32))
    public_key = bytes(key.verify_key)
    root = base64.b64encode(bytes(32)).decode()
    for spelt, is_good in ((root, True), (root.replace("A=", "B="), False)):
        body = f"{ORIGIN}\n8\n{spelt}\n"
        blob = key_hash("log", public_key) + key.sign(body.encode()).signature
        note = f"{body}\n\u2014 log {base64.b64encode(blob).decode()}\n".encode()
        with (
            contextlib.nullcontext()
            if is_good
            else pytest.raises(ValueError, match="base64", check=says_why)
        ):
            assert open_checkpoint(note, ORIGIN, {"log": public_key}, 1).root == bytes(32)


def test_a_checkpoint_of_another_log_is_refused() -> None:
    with pytest.raises(ValueError, match="not one of this log", check=says_why):
        open_checkpoint(NOTE, "example.com/other", KEYS, 2)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(NOTE) - 1), st.integers(1, 255))
def test_a_changed_byte_never_opens_as_another_checkpoint(at: int, mask: int) -> None:
    changed = NOTE[:at] + bytes([NOTE[at] ^ mask]) + NOTE[at + 1 :]
    try:
        opened = open_checkpoint(changed, ORIGIN, KEYS, 2)
    except ValueError:
        return
    assert opened == Checkpoint(ORIGIN, 8, KNOWN_ROOT)
