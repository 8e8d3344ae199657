"""What only the enclave may do: open requests and sign receipts. One boot, one signing key.

The X25519 secrets live in child processes (epochs.py). After a restart every key is new, so no
old request can be opened again: that, with the replay memory, is why no job ever runs twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from nacl.signing import SigningKey

from cocoon.kernel.clock import Clock, Randomness
from cocoon.kernel.errors import SealingError
from cocoon.sealing import (
    OpenedRequest,
    ReplayMemory,
    ResponseSealer,
    Status,
    accept_request,
    hpke,
    open_accepted,
    receipt_hash,
)
from cocoon.sealing.receipt import CHAIN_START
from services.provider.epochs import KeyEpochs

EPHEMERAL_BYTES: Final = 32


class Enclave:
    """The keys of this boot and the memory of what was run under them."""

    def __init__(
        self,
        epochs: KeyEpochs,
        policy_hashes: Callable[[int], frozenset[bytes]],
        model_ids: Callable[[], frozenset[bytes]],
        clock: Clock,
        randomness: Randomness,
    ) -> None:
        self.epochs = epochs
        self._policy_hashes = policy_hashes
        self._model_ids = model_ids
        self._clock = clock
        self._randomness = randomness
        self._signer = SigningKey(randomness.token(32))
        self._sequence = 0
        self._previous = CHAIN_START
        self.replay: ReplayMemory[str] = ReplayMemory()

    @property
    def signing_key(self) -> SigningKey:
        """For key bundles; receipts are signed here."""
        return self._signer

    @property
    def signing_public(self) -> bytes:
        return bytes(self._signer.verify_key)

    async def open(self, envelope: bytes, *, req_hash: bytes) -> tuple[OpenedRequest, bytes]:
        """Open the envelope that the dispatch names; also return its key's evidence id.

        Raises SealingError with CAI/1's inside codes.
        """
        now_ms = self._clock.now_ms()
        accepted = accept_request(
            envelope,
            key_ids=self.epochs.key_ids(),
            now_ms=now_ms,
            policy_hashes=self._policy_hashes(now_ms),
            model_ids=self._model_ids(),
            expected_req_hash=req_hash,
        )
        slot = accepted.slot
        epoch = self.epochs.get(slot.key_id)
        if epoch is None or epoch.evidence_id is None:
            raise SealingError("This enclave no longer holds that key.", code="unknown_key")
        if accepted.header.not_after_ms > epoch.not_after_ms:
            raise SealingError("The request outlives the enclave's key.", code="bad_request")
        secret = self._randomness.token(EPHEMERAL_BYTES)
        asked = epoch.process.ask(slot.key_id, slot.enc, accepted.fixed_header, secret)
        resp_eph_pk = hpke.public_key(secret)  # while the key's holder works
        opened = open_accepted(accepted, await asked, resp_eph_pk=resp_eph_pk)
        return opened, epoch.evidence_id

    def sign_receipt(
        self,
        sealer: ResponseSealer,
        *,
        status: Status,
        epoch: int,
        quote_id: bytes,
        evidence_id: bytes,
        counts: tuple[int, int, int, int],
        price_nanoton: int,
        times_ms: tuple[int, int, int],
    ) -> bytes:
        """Sign the next receipt of this boot's chain (420 bytes). Never awaits, so none is skipped.

        counts: input, cached input, output, reasoning. times_ms: opened, first, last.
        """
        receipt = sealer.receipt(
            status=status, epoch=epoch, quote_id=quote_id, input_tokens=counts[0],
            cached_input_tokens=counts[1], output_tokens=counts[2], reasoning_tokens=counts[3],
            price_nanoton=price_nanoton, opened_ms=times_ms[0], first_ms=times_ms[1],
            last_ms=times_ms[2], evidence_id=evidence_id, seq=self._sequence,
            prev_receipt_hash=self._previous,
        )  # fmt: skip
        raw = receipt.sign(self._signer)
        self._sequence += 1
        self._previous = receipt_hash(raw)
        return raw
