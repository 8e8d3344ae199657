"""What canaries ask: lines of the owner's corpus, or requests like the model's usual ones.

A corpus of real requests is better: what is generated here can be learned.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from cocoon.kernel.clock import Randomness
from cocoon.kernel.errors import ConfigurationError

Messages = list[dict[str, Any]]
MAX_CORPUS_BYTES: Final = 64 * 1024 * 1024
_SPOKEN: Final = (
    "amber apple arrow autumn basket beacon bird bottle branch bread bridge candle canyon "
    "carpet castle cedar circle cloud clover coffee copper coral cotton crystal dragon "
    "eagle ember engine falcon feather field flame flower forest fossil garden glacier "
    "globe guitar harbor hazel helmet honey island ivory jacket jungle kettle ladder "
    "lantern lemon maple marble meadow mirror mountain needle ocean olive orange orchid "
    "paper pearl pencil pepper planet pocket quartz rabbit raven ribbon river rocket "
    "saddle salmon shadow silver spider stone summer sunset table thunder tiger tulip "
    "tunnel valley velvet violet walnut water willow window winter "
)
_WORDS: Final = tuple(_SPOKEN.split())
_PLAIN: Final = (
    "Repeat: {words}", "Reverse: {word}", "Uppercase: {words}", "Count: {words}",
)  # fmt: skip
_CHAT: Final = (
    "Explain {word} to a ten-year-old in two sentences.",
    "Write a short product description for a {word} {word2}.",
    "What are three facts about a {word}?",
    "Translate into French: The {word} is next to the {word2}.",
    "Summarise in one line why people like {word} and {word2}.",
    "Write a Python function that returns the {number} longest of a list of words.",
    "Which is heavier, a {word} or a {word2}? Answer briefly.",
    "Give me a title for a story about a {word}, a {word2} and the number {number}.",
)
STYLES: Final = {"chat": _CHAT, "skills": _PLAIN}


class Prompts(Protocol):
    """Where the next request's messages come from."""

    def draw(self) -> Messages: ...


class Generated:
    """Requests from templates and words."""

    def __init__(self, style: str, randomness: Randomness) -> None:
        self._templates = STYLES[style]
        self._randomness = randomness

    def draw(self) -> Messages:
        text = self._pick(self._templates).format(
            word=self._pick(_WORDS),
            word2=self._pick(_WORDS),
            words=" ".join(self._pick(_WORDS) for _ in range(1 + below(self._randomness, 4))),
            number=2 + below(self._randomness, 98),
        )
        return [{"role": "user", "content": text}]

    def _pick(self, items: Sequence[str]) -> str:
        return items[below(self._randomness, len(items))]


class Corpus:
    """Lines of a file, drawn at random: plain text, or JSON with "messages"."""

    def __init__(self, requests: Sequence[Messages], randomness: Randomness) -> None:
        self._requests = requests
        self._randomness = randomness

    def draw(self) -> Messages:
        return self._requests[below(self._randomness, len(self._requests))]


def read_corpus(path: Path, randomness: Randomness) -> Corpus:
    """Raises ConfigurationError for a file that cannot be read or holds nothing."""
    try:
        if path.stat().st_size > MAX_CORPUS_BYTES:
            raise ConfigurationError(f"{path} is larger than {MAX_CORPUS_BYTES >> 20} MiB; cut it")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigurationError(f"the prompts in {path} cannot be read as text") from None
    requests = [_messages(line) for line in lines if line.strip()]
    if not requests:
        raise ConfigurationError(f"{path} holds no prompt; write one a line")
    return Corpus(requests, randomness)


def _messages(line: str) -> Messages:
    try:
        value = json.loads(line)
    except ValueError:
        value = line
    found = value.get("messages") if isinstance(value, dict) else None
    if isinstance(found, list) and all(isinstance(item, dict) for item in found):
        return found
    return [{"role": "user", "content": value if isinstance(value, str) else line}]


def below(randomness: Randomness, limit: int) -> int:
    """A whole number from 0 up to, without, `limit`."""
    return int.from_bytes(randomness.token(8), "big") % limit
