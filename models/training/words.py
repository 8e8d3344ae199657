"""Word lists and random words: what the skills' contents are drawn from."""

from __future__ import annotations

import random


def listed(text: str) -> list[str]:
    """Split a list written as one string, at bars if it has any, else at spaces."""
    return text.split("|" if "|" in text else None)


WORDS = listed(
    "apple banana bridge butter candle castle cherry circle cloud cocoon coffee copper corner "
    "desert dinner doctor dragon engine family farmer father finger flower forest friend garden "
    "guitar hammer harbor hello horse house island jacket jungle kitchen ladder lemon letter "
    "library lion market melon mirror monkey morning mother mountain music needle number ocean "
    "orange paper pencil people pepper piano planet pocket potato queen rabbit river robot rocket "
    "school shadow silver sister spring square station stone street summer sunset teacher thunder "
    "ticket tiger tomato tower train travel turtle valley village violin water whale window winter "
    "wizard world yellow zebra cat dog sun moon tree fish bird star rain snow book door cup hat "
    "map key sea sky the and is my we go to see big red blue green good day one two"
)
FOREIGN = listed(
    "caf\u00e9 na\u00efve ni\u00f1o stra\u00dfe \u00e5ngstr\u00f6m \u043c\u0438\u0440 "
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u65e5\u672c \u4f60\u597d \u03b1\u03b2\u03b3 "
    "\u00fcber gar\u00e7on \U0001f600 \U0001f680 \u00bfqu\u00e9?"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
NAMES = listed(
    "Anna Bob Carlos Dmitri Eve Fatima Grace Hugo Ivan Julia Kenji Lena Mei Noah Olga Pedro Qi "
    "Rosa Sam Tara Uma Victor Wendy Xavier Yara Zoe Adam Bella Chloe David Elena Felix Gita Henry "
    "Ines Jack Karim Laura Maria Nadia Oscar Paula Ravi Sofia Tom Ursula Vera Walter Alice Peter "
    "Emma Liam Mia Lucas Nina Omar Priya Simon Leo Marta"
)
CITIES = listed(
    "Paris Berlin Tokyo Cairo Lima Oslo Rome Delhi Madrid Seoul London Vienna Prague Dublin Lisbon "
    "Athens Warsaw Sofia Milan Munich Zurich Geneva Boston Chicago Toronto Sydney Nairobi Lagos "
    "Mumbai Beijing Hanoi Bangkok Manila Jakarta Havana Bogota Quito Santiago Moscow Helsinki "
    "Stockholm Riga Kyiv Baku Dakar Tunis Rabat Denver Dallas Miami"
)


def random_word(rng: random.Random, low: int = 3, high: int = 10) -> str:
    """Draw a lower-case word: a real one, a pronounceable one or plain random letters."""
    kind = rng.random()
    if kind < 0.25:
        word = rng.choice(WORDS)
        if low <= len(word) <= high:
            return word
    length = rng.randint(low, high)
    if kind < 0.5:
        start = rng.randrange(2)
        return "".join(rng.choice(VOWELS if (start + i) % 2 else CONSONANTS) for i in range(length))
    return "".join(rng.choice(LETTERS) for _ in range(length))


def random_text(rng: random.Random) -> str:
    """Draw something to copy: a word, a phrase, digits or a little Unicode."""
    kind = rng.random()
    if kind < 0.45:
        return random_word(rng)
    if kind < 0.55:
        return rng.choice((str.upper, str.capitalize))(random_word(rng))
    if kind < 0.62:
        return "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 8)))
    if kind < 0.68:
        alphabet = LETTERS + LETTERS.upper() + "0123456789-_./"
        return "".join(rng.choice(alphabet) for _ in range(rng.randint(3, 12)))
    words = [random_word(rng, 2, 8) for _ in range(rng.randint(2, 8 if kind < 0.72 else 4))]
    if kind > 0.93:
        words.insert(rng.randrange(len(words)), rng.choice(FOREIGN))
    if kind > 0.97:
        words = ["".join(chr(rng.randint(0xA1, 0x7FF)) for _ in range(rng.randint(1, 5)))]
    text = rng.choice((" ", " ", " ", ", ")).join(words)
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:] + rng.choice((".", "!", "?", ""))
    return text


def any_name(rng: random.Random, known: list[str]) -> str:
    """Draw a known name, or (so that copying is learned) an invented one."""
    return rng.choice(known) if rng.random() < 0.6 else random_word(rng, 3, 8).capitalize()
