"""Tokens to text: bytes that may end inside a character, stop texts that may cross tokens.

Pure; holds one answer's unreleased end and nothing else.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from cocoon.kernel.errors import ConfigurationError


class TokenTable:
    """A byte-level tokenizer: text to ids, id to bytes."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception:  # noqa: BLE001 - the library raises bare Exception
            raise ConfigurationError(f"{path} is not a tokenizer file") from None
        # A message that holds "<|end|>" is text, never a turn's end.
        self._tokenizer.encode_special_tokens = True
        letters = _byte_letters()
        self._bytes: list[bytes] = []
        for token_id in range(self._tokenizer.get_vocab_size()):
            token = self._tokenizer.id_to_token(token_id) or ""
            if all(letter in letters for letter in token):
                self._bytes.append(bytes(letters[letter] for letter in token))
            else:
                self._bytes.append(token.encode())

    def __len__(self) -> int:
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Special tokens never come out of it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def bytes_of(self, token_id: int) -> bytes:
        return self._bytes[token_id]

    def special(self, token: str) -> int:
        """The id of a special token. Raises ConfigurationError if there is none."""
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ConfigurationError(f"the tokenizer has no token {token}")
        return int(token_id)


def _byte_letters() -> dict[str, int]:
    """The byte-level alphabet: printable bytes as themselves, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


class AnswerText:
    """Joins an answer's bytes to text and ends it before the first stop text.

    Nothing is released that could still turn out to be part of a stop text or of a character.
    """

    def __init__(self, stop_texts: Sequence[str]) -> None:
        self._stops = tuple(stop_texts)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """Take a token's bytes; return the text that is now certain."""
        return self._release(self._decoder.decode(data), final=False)

    def finish(self) -> str:
        """The answer is over: return what was held."""
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, fresh: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += fresh
        places = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            certain, self._held = self._held[: min(places)], ""
            return certain
        keep = 0 if final else self._open_end()
        cut = len(self._held) - keep
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def _open_end(self) -> int:
        """How many characters at the end could begin a stop text."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-size:]
            if any(len(stop) > size and stop.startswith(end) for stop in self._stops):
                return size
        return 0
