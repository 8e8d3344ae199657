"""The shipped model still does what its card says: each skill asked held-out questions.

It decodes greedily with the evaluator of models/training (numpy, onnxruntime and tokenizers only).
The floors lie a little under the measured shares, so that another processor's rounding passes and
a broken export or a forgotten skill does not. No time is asserted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MODELS = Path(__file__).parents[2] / "models"
HELD_OUT = 40  # questions drawn for each skill
LONG_ANSWERS = {"count_to": 12, "story": 10}  # of which so many are asked, to stay quick

FLOORS = {
    "repeat": 0.95,
    "reverse": 0.92,
    "uppercase": 0.95,
    "lowercase": 0.95,
    "count_letters": 0.95,
    "sentiment": 0.97,
    "add": 0.92,
    "add_digits": 0.97,
    "sort": 0.9,
    "extract_json": 0.97,
    "count_to": 0.9,
    "story": 0.8,
    "small_talk": 0.97,
    "fallback": 0.95,
}

FIRST_THINGS_TYPED = (
    ("Hello", "Hello! How can I help you?"),
    ("Say hello", "hello"),
    ("Please say hello", "hello"),
    ("Reverse hello", "olleh"),
    ("Please reverse hello", "olleh"),
    ("Reverse the word hello", "olleh"),
    ("Reverse: cocoon", "noococ"),
    ("Repeat: Hello, world!", "Hello, world!"),
    ("What is 1 + 1?", "2"),
    ("What is 2+2?", "4"),
    ("1+1", "2"),
    ("12+30", "42"),
    ("What is 17 + 25?", "42"),
    ("Count to 10", "1 2 3 4 5 6 7 8 9 10"),
    ("Count to ten", "1 2 3 4 5 6 7 8 9 10"),
    ("Please count to 5", "1 2 3 4 5"),
    ("Sort 3 1 2", "1 2 3"),
    ("Uppercase hello", "HELLO"),
)


@pytest.fixture(scope="module")
def evaluator() -> Iterator[Any]:
    """models/training/evaluate.py, whose neighbours import each other by their bare names."""
    folder = str(MODELS / "training")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("evaluate")
    finally:
        sys.path.remove(folder)
        for name in ("evaluate", "data"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def engine(evaluator: Any) -> Any:
    return evaluator.SkillsEngine(MODELS / "skills-1")


@pytest.fixture(scope="module")
def questions(evaluator: Any) -> dict[str, list[Any]]:
    by_skill: dict[str, list[Any]] = {}
    for chat in evaluator.held_out_set(HELD_OUT):
        by_skill.setdefault(chat.turns[-1].skill, []).append(chat)
    return by_skill


def asked(engine: Any, prompt: str) -> str:
    """The answer to one message, tokens as in config.json."""
    special = engine.config["special_tokens"]
    ids = [special["<|user|>"], *prompt.encode(), special["<|assistant|>"]]
    return str(engine.tokenizer.decode(engine.generate(ids)))


def test_every_skill_has_a_floor(questions: dict[str, list[Any]]) -> None:
    assert questions.keys() == FLOORS.keys()


@pytest.mark.parametrize("skill", FLOORS)
def test_skill_answers_held_out_questions(
    skill: str, engine: Any, evaluator: Any, questions: dict[str, list[Any]]
) -> None:
    chats = questions[skill][: LONG_ANSWERS.get(skill, HELD_OUT)]
    score = evaluator.evaluate(engine, chats, show=3)[skill]
    assert score.share >= FLOORS[skill], f"{skill}: {score.right} of {score.asked} right"


@pytest.mark.parametrize("form", ["What is {} + {}?", "{}+{}"])
def test_sums_of_two_single_digits_are_right(form: str, engine: Any, evaluator: Any) -> None:
    score = evaluator.evaluate(engine, evaluator.digit_sums()[form], show=3)["add_digits"]
    assert score.asked == 100
    assert score.right >= 98


@pytest.mark.parametrize(("prompt", "answer"), FIRST_THINGS_TYPED)
def test_first_things_people_type_are_answered(prompt: str, answer: str, engine: Any) -> None:
    assert asked(engine, prompt) == answer


@pytest.mark.parametrize("prompt", ["Tell me a story", "Tell me a story about a fox"])
def test_a_story_is_told_on_a_plain_request(prompt: str, engine: Any) -> None:
    told = asked(engine, prompt)
    assert told.startswith(("Once there was", "An old sailor", "Nobody believed"))
    assert ("fox" in told) == ("fox" in prompt)
