"""What a client keeps across restarts: its secret, and what it sealed under Idempotency-Keys.

With it the same request goes out as the same bytes and its answer can still be opened. A file holds
the sealed envelope and the ephemeral secrets that open it, encrypted under the client's secret: who
reads both files reads the prompt and, with the response, the answer. No plaintext is ever in it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
)
from nacl.exceptions import CryptoError

from cocoon.client import files
from cocoon.client.choice import Addressee, Candidate
from cocoon.evidence.verdict import Assurance
from cocoon.kernel.clock import Clock, Randomness
from cocoon.kernel.errors import ConfigurationError, SealingError
from cocoon.sealing import RequestSecrets, SealedRequest, parse_header, request_hash
from cocoon.sealing.client import RecipientSecret

MAX_KEPT: Final = 512
MAX_KEPT_BYTES: Final = 64 * 1024 * 1024
KEPT_MS: Final = 60 * 60 * 1000  # as long as the network keeps a response
SWEEP_S: Final = 60.0  # an entry is at most this much older while a client runs
SECRET_BYTES: Final = 32
SECRET_FILE: Final = "client-secret"  # noqa: S105 - a name
FOLDER: Final = "sealed-requests"
_NONCE_BYTES: Final = 24
_log = logging.getLogger("cocoon.client")


def load_secret(state_dir: Path, randomness: Randomness) -> bytes:
    """The client's 32 secret bytes, made once in its state directory, which the caller holds.

    Raises ConfigurationError when the file cannot be made or read, or others may read it.
    """
    path = state_dir / SECRET_FILE
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            files.replace(path, randomness.token(SECRET_BYTES))
        secret = files.read_secret(path)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be made or read ({error.strerror}); name another state directory"
        ) from None
    if len(secret) != SECRET_BYTES:
        raise ConfigurationError(f"{path} is damaged; remove it, and repeats begin anew")
    return secret


class KeptRequest(msgspec.Struct, frozen=True, array_like=True):
    """One sealed request, as it is written. `asked` is the hash of the caller and the body."""

    asked: bytes
    deadline_ms: int
    again: tuple[str, ...]  # why it was sealed again
    envelope: bytes
    prompt_commit: bytes
    commit_key: bytes
    # key_id, ephemeral secret, response export, provider, its attested key, assurance
    recipients: tuple[tuple[bytes, bytes, bytes, str, bytes, str], ...]

    def __repr__(self) -> str:
        return f"KeptRequest({len(self.envelope)} sealed bytes)"

    @classmethod
    def of(
        cls, asked: bytes, deadline_ms: int, again: tuple[str, ...], request: SealedRequest,
        chosen: Sequence[Candidate],
    ) -> KeptRequest:  # fmt: skip
        secrets = request.secrets
        recipients = []
        for item in chosen:
            key_id = item.bundle.key_id
            mine = secrets.by_key_id[key_id]
            recipients.append((
                key_id, mine.eph_sk, mine.response_export, item.provider_id, item.signing_key,
                item.assurance.value,
            ))  # fmt: skip
        return cls(
            asked, deadline_ms, again, request.envelope, secrets.prompt_commit,
            secrets.commit_key, tuple(recipients),
        )  # fmt: skip

    def sealed(self) -> SealedRequest:
        header, _ = parse_header(self.envelope)
        secrets = RequestSecrets(
            header=header,
            req_hash=request_hash(self.envelope),
            prompt_commit=self.prompt_commit,
            commit_key=self.commit_key,
            by_key_id={item[0]: RecipientSecret(item[1], item[2]) for item in self.recipients},
        )
        return SealedRequest(self.envelope, secrets)

    def addressees(self) -> dict[bytes, Addressee]:
        return {
            key_id: Addressee(provider_id, signing_key, Assurance(assurance))
            for key_id, _, _, provider_id, signing_key, assurance in self.recipients
        }


class KeptRequests:
    """The names that a gateway sees instead of Idempotency-Keys, and what was sealed under them.

    Holds its state directory for itself until `close`. What is too old goes at the start, with
    each use and, after `sweep`, every minute; while no client runs, files stay as they are.
    Without a state directory it keeps nothing, and its names are made with the caller's API key:
    a restart, or another such client, then has the same name and is refused instead of paid twice.
    """

    def __init__(self, state_dir: Path | None, *, clock: Clock, randomness: Randomness) -> None:
        """Raises ConfigurationError for a directory that cannot be used or that another uses."""
        self._name_key: bytes | None = None
        self._file_key = b""
        self._folder = None if state_dir is None else state_dir / FOLDER
        self._clock = clock
        self._randomness = randomness
        self._sizes: OrderedDict[str, tuple[int, int]] = OrderedDict()  # made at ms, bytes
        self._bytes = 0
        self._sweeping: asyncio.TimerHandle | None = None
        self._held = None if state_dir is None else files.HeldFolder(state_dir)
        if state_dir is not None:
            try:
                self._open(state_dir)
            except BaseException:
                self.close()
                raise

    def _open(self, state_dir: Path) -> None:
        secret = load_secret(state_dir, self._randomness)
        self._name_key = _derived(secret, "name")
        self._file_key = _derived(secret, "file")
        self._find(state_dir / FOLDER)

    def sweep(self) -> None:
        """Drop what is too old, now and every minute on the running loop, until `close`."""
        if self._folder is not None:
            self._drop_old()
            self._sweeping = asyncio.get_running_loop().call_later(SWEEP_S, self.sweep)

    def close(self) -> None:
        """End the sweeps and let another client have the directory. May be called twice."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        if self._held is not None:
            self._held.release()

    def name(self, caller: str, key: str) -> str:
        """What stands for a caller's key at the gateway: with a state directory's secret nobody
        who does not hold that can test guesses of it, without it nobody but who sees API keys.
        """
        message = hashlib.sha256(caller.encode()).digest() + key.encode()
        name_key = self._name_key or _derived(caller.encode(), "name")
        return hmac.digest(name_key, message, "sha256").hex()

    async def put(self, name: str, kept: KeptRequest) -> None:
        """Write, before the request is sent. A disk that refuses costs the memory, not the job."""
        if self._folder is None:
            return
        nonce = self._randomness.token(_NONCE_BYTES)
        data = nonce + crypto_aead_xchacha20poly1305_ietf_encrypt(
            msgspec.msgpack.encode(kept), name.encode(), nonce, self._file_key
        )
        self._count(name, self._clock.now_ms(), len(data))  # first: it may be left while it writes
        self._drop_old()
        try:
            await asyncio.to_thread(files.replace, self._folder / name, data)  # disks are slow
        except OSError as error:
            _log.warning("request_not_kept", extra={"error_class": type(error).__name__})
            self._drop(name)
        else:
            if name not in self._sizes:  # others took its place meanwhile
                self._drop(name)

    def get(self, name: str) -> KeptRequest | None:
        """What was sealed under this name, if it is still kept and ours."""
        self._drop_old()
        if self._folder is None or name not in self._sizes:
            return None
        try:
            data = (self._folder / name).read_bytes()
            plain = crypto_aead_xchacha20poly1305_ietf_decrypt(
                data[_NONCE_BYTES:], name.encode(), data[:_NONCE_BYTES], self._file_key
            )
            kept = msgspec.msgpack.decode(plain, type=KeptRequest)
            kept.sealed(), kept.addressees()
        except (OSError, CryptoError, ValueError, msgspec.MsgspecError, SealingError):
            self._drop(name)
            return None
        return kept

    def _find(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = []
            for file in folder.iterdir():
                if file.suffix == ".new":
                    file.unlink(missing_ok=True)
                    continue
                known = file.stat()
                found.append((known.st_mtime_ns // 1_000_000, file.name, known.st_size))
        except OSError as error:
            raise ConfigurationError(
                f"{folder} cannot be read ({error.strerror}); name another state directory"
            ) from None
        now_ms = self._clock.now_ms()
        for made_ms, name, size in sorted(found):
            self._count(name, min(made_ms, now_ms), size)  # a clock may have been put back
        self._drop_old()

    def _count(self, name: str, made_ms: int, size: int) -> None:
        _, known = self._sizes.pop(name, (0, 0))
        self._sizes[name] = (made_ms, size)
        self._bytes += size - known

    def _drop_old(self) -> None:
        oldest_ms = self._clock.now_ms() - KEPT_MS
        while self._sizes:
            name, (made_ms, _) = next(iter(self._sizes.items()))
            if (
                made_ms >= oldest_ms
                and len(self._sizes) <= MAX_KEPT
                and self._bytes <= MAX_KEPT_BYTES
            ):
                return
            self._drop(name)

    def _drop(self, name: str) -> None:
        _, size = self._sizes.pop(name, (0, 0))
        self._bytes -= size
        assert self._folder is not None  # noqa: S101 - nothing is counted without one
        try:
            (self._folder / name).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("kept_request_stays", extra={"error_class": type(error).__name__})


def _derived(secret: bytes, purpose: str) -> bytes:
    """A key of its own for each purpose."""
    return hmac.digest(secret, b"cocoon client\0" + purpose.encode(), "sha256")
