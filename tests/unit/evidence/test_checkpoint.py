"""Merkle proofs against every small tree, and signed checkpoints against a known one."""

from __future__ import annotations

import base64
import contextlib
import hashlib
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


def test_a_root_is_built_from_its_complete_subtrees() -> None:
    a, b, c, d, e = (leaf_hash(bytes([number])) for number in range(5))

    def node(left: bytes, right: bytes) -> bytes:
        return hashlib.sha256(b"\1" + left + right).digest()

    assert tree_root([a]) == a
    assert tree_root([a, b, c]) == node(node(a, b), c)
    assert tree_root([a, b, c, d, e]) == node(node(node(a, b), node(c, d)), e)


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


def test_no_place_outside_a_log_is_in_it() -> None:
    leaf = leaf_hash(b"a")
    assert is_included(leaf, 0, 1, [], leaf)
    for index, size in ((1, 1), (-1, 1), (0, 0)):
        assert not is_included(leaf, index, size, [], leaf)


def test_a_growth_without_its_proof_or_with_more_than_it_is_refused() -> None:
    leaves = [leaf_hash(bytes([i])) for i in range(6)]
    new = Checkpoint(ORIGIN, 6, tree_root(leaves))
    for before in range(1, 6):
        old = Checkpoint(ORIGIN, before, tree_root(leaves[:before]))
        proof = consistency(before, leaves)
        for wrong in ([], proof[:-1], [*proof, bytes(32)], [*proof, *proof]):
            assert not is_consistent(old, new, wrong), before
    assert not is_consistent(new, new, [bytes(32)])
    assert not is_consistent(Checkpoint(ORIGIN, 0, tree_root([])), new, [bytes(32)])


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


def signed(body: str, signature: str = "") -> tuple[bytes, dict[str, bytes]]:
    """A note over any text, by a log that signs what it should not; and its key."""
    key = SigningKey(bytes(32))
    public_key = bytes(key.verify_key)
    blob = key_hash("log", public_key) + key.sign(body.encode()).signature
    line = signature or base64.b64encode(blob).decode()
    return f"{body}\n\u2014 log {line}\n".encode(), {"log": public_key}


ROOT_TEXT = base64.b64encode(bytes(32)).decode()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (f"{ORIGIN} 8 {ROOT_TEXT}\n", "not one of this log"),
        (f"{ORIGIN}\n8\n", "not one of this log"),
        (f"{ORIGIN}\n08\n{ROOT_TEXT}\n", "not one of this log"),
        (f"{ORIGIN}\n-8\n{ROOT_TEXT}\n", "not one of this log"),
        (f"{ORIGIN}\n8\n!{ROOT_TEXT}\n", "root is not base64"),
        (f"{ORIGIN}\n8\n{ROOT_TEXT[4:]}\n", "not 32 bytes in base64"),
    ],
    ids=["one line", "no root", "a zero before", "below zero", "not base64", "short"],
)
def test_a_signed_text_of_another_form_is_no_checkpoint(body: str, says: str) -> None:
    note, keys = signed(body)
    with pytest.raises(ValueError, match=says, check=says_why):
        open_checkpoint(note, ORIGIN, keys, 1)


@pytest.mark.parametrize(
    ("note", "says"),
    [
        (signed(f"{ORIGIN}\n8\n{ROOT_TEXT}\n", "!")[0], "not in the form of a signed note"),
        (signed(f"{ORIGIN}\n8\n{ROOT_TEXT}\n", "A")[0], "signature is not base64"),
        (signed(f"{ORIGIN}\n8\n{ROOT_TEXT}\n", "AA==AAAA")[0], "signature is not base64"),
        (signed(f"{ORIGIN}\n8\n{ROOT_TEXT}\n\nmore\n")[0], "not in the form of a signed note"),
        (b"x" * (16 * 1024 + 1), "at most 16 KiB"),
        (b"text\n\nline", "its signatures"),
    ],
    ids=["no note", "no base64", "after its padding", "an empty line within", "long", "cut"],
)
def test_a_note_of_another_form_is_refused_with_what_is_wrong(note: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says, check=says_why):
        open_checkpoint(note, ORIGIN, signed("")[1], 1)


def test_a_note_may_fill_its_bounds() -> None:
    note, keys = signed(f"{ORIGIN}\n8\n{ROOT_TEXT}\nmore\n")
    line = note.splitlines(keepends=True)[-1]
    full = note + line * 31
    assert open_checkpoint(full, ORIGIN, keys, 1).size == 8
    with pytest.raises(ValueError, match="its signatures", check=says_why):
        open_checkpoint(full + line, ORIGIN, keys, 1)
    extra = "x" * (16 * 1024 - len(note))
    long, _ = signed(f"{ORIGIN}\n8\n{ROOT_TEXT}\nmore{extra}\n")
    assert len(long) == 16 * 1024
    assert open_checkpoint(long, ORIGIN, keys, 1).size == 8


def test_a_known_log_has_its_known_key_hash() -> None:
    """C2SP signed-note: SHA-256 of the name, a newline, the algorithm's byte and the key."""
    key = bytes(range(32))
    assert key_hash("log", key) == hashlib.sha256(b"log\n\x01" + key).digest()[:4]
    assert tree_root([]) == hashlib.sha256(b"").digest()
    assert leaf_hash(b"a") == hashlib.sha256(b"\0a").digest()


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
