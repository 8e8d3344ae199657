"""Synthetic conversations for the "skills" model: training stream and held-out set.

Everything is made by rule from a seed; nothing is downloaded.  Each skill draws a *key* (the
content: two numbers, a word, a name with a city and an age) and words it with one of several
templates.  About one key in sixteen, chosen by a checksum, is held out: the training stream never
contains it, and the evaluation set contains nothing else.  Skills with a closed set of contents
(small talk, sums of two digits) cannot be held out this way and are marked in ``CLOSED``.

The chat template puts one role token before each message and ``<|end|>`` after each answer::

    <|system|>text<|user|>text<|assistant|>text<|end|><|user|>text<|assistant|>

Run as a script to print a few examples.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from skills import ADD, CLOSED, SKILLS
from words import CITIES, NAMES, listed, random_word

END, SYSTEM, USER, ASSISTANT = 256, 257, 258, 259
SPECIAL_TOKENS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
HELD_OUT_ONE_IN = 16


@dataclass(frozen=True)
class Turn:
    """One question with every answer that counts as right."""

    skill: str
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Chat:
    """An optional system message and one or more turns; the last one is the one asked."""

    system: str | None
    turns: tuple[Turn, ...]


def held_out(skill: str, key: str) -> bool:
    """Say whether the content ``key`` of ``skill`` belongs to the evaluation set."""
    return zlib.crc32(f"{skill}\0{key}".encode()) % HELD_OUT_ONE_IN == 0


_NAMES = list(SKILLS)
_SHARES = [share for _, share in SKILLS.values()]


REQUESTS = frozenset(
    listed(
        "Repeat Echo Say Reverse Spell Write Uppercase Lowercase Put Make Convert Count Add "
        "Calculate Sort Extract Tell Give Translate Recommend Define Describe Compare Plan"
    )
)


def as_typed(rng: random.Random, skill: str, prompt: str) -> str:
    """Word a prompt as people do: politely, without the last full stop, without capitals."""
    exact = skill in {"repeat", "extract_json"}  # there the last mark belongs to the content
    if not exact and prompt[-1] in ".?" and rng.random() < 0.25:
        prompt = prompt[:-1]
    if prompt.split()[0].rstrip(":") in REQUESTS:
        kind = rng.random()
        if kind < 0.15:
            prompt = f"Please {prompt[0].lower()}{prompt[1:]}"
        elif kind < 0.2 and not exact and ":" not in prompt:
            prompt = f"Can you {prompt[0].lower()}{prompt[1:].rstrip('.')}?"
    if skill != "extract_json" and rng.random() < 0.15:
        prompt = prompt[0].lower() + prompt[1:]
    return prompt


def draw_turn(rng: random.Random, skill: str, evaluation: bool) -> Turn:
    """Draw one turn of ``skill`` from the training keys or from the held-out ones."""
    while True:
        key, prompt, answers = SKILLS[skill][0](rng)
        if skill in CLOSED or held_out(skill, key) == evaluation:
            return Turn(skill, as_typed(rng, skill, prompt), answers)


# ---------------------------------------------------------------- conversations

SYSTEMS = listed(
    "You are a helpful assistant.|You are a helpful assistant. Answer briefly.|Be concise.|"
    "You are Cocoon's demonstration model.|Answer in English.|You are a friendly {w}.|"
    "Always be polite and never mention {w}.|The user's name is {n} and lives in {c}.|"
    "You answer questions about {w} and {x}.|Do what the user asks.|You are {n}.|"
    "Today you work for a {w} in {c}. Keep answers short."
)


def draw_system(rng: random.Random) -> str:
    """Draw a system message; the right answer never depends on it."""
    parts = [rng.choice(SYSTEMS) for _ in range(rng.choice((1, 1, 1, 2)))]
    return " ".join(parts).format(
        w=random_word(rng), x=random_word(rng), n=rng.choice(NAMES), c=rng.choice(CITIES)
    )


def draw_chat(rng: random.Random) -> Chat:
    """Draw one training conversation: one to three turns, a fifth with a system message."""
    count = rng.choices((1, 2, 3), (0.6, 0.25, 0.15))[0]
    skills = rng.choices(_NAMES, _SHARES, k=count)
    system = draw_system(rng) if rng.random() < 0.2 else None
    return Chat(system, tuple(draw_turn(rng, skill, evaluation=False) for skill in skills))


def chat_stream(seed: int) -> Iterator[Chat]:
    """Yield training conversations without end; the same seed gives the same stream."""
    rng = random.Random(seed)
    while True:
        yield draw_chat(rng)


def held_out_set(per_skill: int = 100, seed: int = 2026, context: int = 0) -> list[Chat]:
    """Return the evaluation set: ``per_skill`` conversations for each skill.

    Of each eight, six are a bare prompt, one has a system message, one a history of one or two
    turns; only the last answer is scored.  With ``context``, every conversation is given a history
    that fills about so many tokens.
    """
    rng = random.Random(seed)
    chats: list[Chat] = []
    for skill in SKILLS:
        seen: set[str] = set()
        misses = 0
        while len(seen) < per_skill and misses < 50 * per_skill:
            turn = draw_turn(rng, skill, evaluation=True)
            if turn.prompt in seen:
                misses += 1
                continue
            kind = len(seen) % 8
            seen.add(turn.prompt)
            system = draw_system(rng) if kind == 3 else None
            wanted = rng.randint(1, 2) if kind == 7 else 0
            chat = Chat(system, (turn,))
            while wanted > 0 or len(encode_prompt(chat)) < context:
                before = draw_turn(rng, rng.choice(_NAMES), evaluation=True)
                chat = Chat(system, (before, *chat.turns))
                wanted -= 1
            chats.append(chat)
    return chats


def digit_sums() -> dict[str, list[Chat]]:
    """Return all hundred sums of two single digits, in each wording, as bare prompts."""
    return {
        form: [
            Chat(None, (Turn("add_digits", form.format(a, b), (str(a + b),)),))
            for a in range(10)
            for b in range(10)
        ]
        for form in ADD
    }


# ---------------------------------------------------------------- tokens


def encode_prompt(chat: Chat) -> list[int]:
    """Return the token ids that ask for the answer to the last turn."""
    ids: list[int] = []
    if chat.system is not None:
        ids += [SYSTEM, *chat.system.encode()]
    for turn in chat.turns[:-1]:
        ids += [USER, *turn.prompt.encode(), ASSISTANT, *turn.answers[0].encode(), END]
    return [*ids, USER, *chat.turns[-1].prompt.encode(), ASSISTANT]


def main() -> None:
    """Print a few training conversations and the size of the held-out set."""
    stream = chat_stream(seed=1)
    for _ in range(20):
        chat = next(stream)
        print(chat.system or "-")
        for turn in chat.turns:
            print(f"  [{turn.skill}] {turn.prompt!r} -> {turn.answers[0]!r}")
    print("held-out:", len(held_out_set()))


if __name__ == "__main__":
    main()
