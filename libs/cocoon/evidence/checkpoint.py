"""The transparency log as a client sees it: RFC 6962 proofs and C2SP signed checkpoints.

Verification only. Nothing here keeps a log; whoever does uses `tree_root` for its root.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

MAX_NOTE_BYTES = 16 * 1024
_MAX_SIGNATURES = 32
_ED25519 = b"\x01"
_SIGNATURE_LINE = re.compile(r"\u2014 (\S{1,256}) ([A-Za-z0-9+/=]{1,1024})")
_SIZE = re.compile(r"0|[1-9][0-9]{0,15}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A log's size and root at one moment."""

    origin: str
    size: int
    root: bytes


def leaf_hash(entry: bytes) -> bytes:
    return hashlib.sha256(b"\0" + entry).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def tree_root(leaves: Sequence[bytes]) -> bytes:
    """The Merkle root over leaf hashes; SHA-256 of nothing for an empty log."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    # one root per complete subtree, biggest first, folded as leaves come
    peaks: list[tuple[int, bytes]] = []
    for leaf in leaves:
        height, node = 0, leaf
        while peaks and peaks[-1][0] == height:
            node = _node(peaks.pop()[1], node)
            height += 1
        peaks.append((height, node))
    root = peaks.pop()[1]
    while peaks:
        root = _node(peaks.pop()[1], root)
    return root


def is_included(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether `proof` shows the leaf hash at `index` of a log of `size` with `root`."""
    if not 0 <= index < size:
        return False
    place, last, node = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            return False
        if place & 1 or place == last:
            node = _node(sibling, node)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            node = _node(node, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and node == root


def is_consistent(old: Checkpoint, new: Checkpoint, proof: Sequence[bytes]) -> bool:
    """Whether `new` only appends to `old`. An empty old log is consistent with any."""
    if old.origin != new.origin or old.size > new.size:
        return False
    if old.size == new.size:
        return not proof and old.root == new.root
    if old.size == 0:
        return not proof
    nodes = list(proof)
    if old.size & (old.size - 1) == 0:
        nodes.insert(0, old.root)
    if not nodes:
        return False
    place, last = old.size - 1, new.size - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    old_node = new_node = nodes[0]
    for sibling in nodes[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            old_node, new_node = _node(sibling, old_node), _node(sibling, new_node)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            new_node = _node(new_node, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and old_node == old.root and new_node == new.root


def key_hash(name: str, public_key: bytes) -> bytes:
    """The four bytes by which a signed note names an Ed25519 key."""
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + public_key).digest()[:4]


def open_checkpoint(
    note: bytes, origin: str, keys: Mapping[str, bytes], threshold: int
) -> Checkpoint:
    """Verify a signed checkpoint of `origin` by at least `threshold` of `keys` (name to key).

    Raises ValueError with a plain sentence; signatures of unknown keys are passed over.
    """
    if len(note) > MAX_NOTE_BYTES:
        raise ValueError("a checkpoint has at most 16 KiB")
    text = note.decode("utf-8")
    body, blank, signatures = text.partition("\n\n")
    lines = signatures.splitlines()
    if not blank or not signatures.endswith("\n") or len(lines) > _MAX_SIGNATURES:
        raise ValueError("a checkpoint is a text, an empty line and its signatures")
    signed_by = {name for line in lines if (name := _signer(line, body + "\n", keys))}
    if threshold < 1 or len(signed_by) < threshold:
        raise ValueError("the checkpoint is not signed by enough of the trusted keys")
    return _read(body, origin)


def _signer(line: str, body: str, keys: Mapping[str, bytes]) -> str | None:
    """The trusted name whose signature this line is; ValueError for a bad one of its own."""
    found = _SIGNATURE_LINE.fullmatch(line)
    if found is None:
        raise ValueError("a checkpoint's signature line is not in the form of a signed note")
    name, encoded = found[1], found[2]
    try:
        blob = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise ValueError("a checkpoint's signature is not base64") from None
    public_key = keys.get(name)
    if public_key is None or blob[:4] != key_hash(name, public_key):
        return None
    try:
        VerifyKey(public_key).verify(body.encode(), blob[4:])
    except (BadSignatureError, ValueError):
        raise ValueError("a checkpoint's signature by a trusted key is wrong") from None
    return name


def _read(body: str, origin: str) -> Checkpoint:
    lines = body.split("\n")
    if len(lines) < 3 or lines[0] != origin or _SIZE.fullmatch(lines[1]) is None:
        raise ValueError("the checkpoint is not one of this log")
    try:
        root = base64.b64decode(lines[2], validate=True)
    except binascii.Error:
        raise ValueError("the checkpoint's root is not base64") from None
    if len(root) != 32 or base64.b64encode(root).decode() != lines[2]:  # spare bits are zero
        raise ValueError("the checkpoint's root is not 32 bytes in base64")
    return Checkpoint(origin, int(lines[1]), root)
