"""Measure the exported model, skill by skill, with onnxruntime alone.

$ python evaluate.py ../skills-1 --per-skill 100
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # else it writes below HOME and asks for its maker's host

import numpy as np
import onnxruntime as ort
from data import Chat, digit_sums, encode_prompt, held_out_set
from numpy.typing import NDArray
from tokenizers import Tokenizer

MAX_NEW_TOKENS = 320


@dataclass(frozen=True)
class Score:
    """How many of a skill's conversations were answered exactly right."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked


class SkillsEngine:
    """A minimal greedy decoder for the exported step graph."""

    def __init__(self, folder: Path, model: Path | None = None, threads: int = 1) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(
            str(model or folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )

    def empty_cache(self, batch: int = 1) -> NDArray[np.float32]:
        """Return a cache that holds no position yet."""
        c = self.config
        return np.zeros((c["layers"], batch, c["heads"], 0, c["head_dim"]), np.float32)

    def generate(
        self, prompt: list[int], limit: int = MAX_NEW_TOKENS, stop: bool = True
    ) -> list[int]:
        """Return the most likely tokens after ``prompt``, up to the first stop token."""
        stops = set(self.config["stop_token_ids"]) if stop else set()
        k, v = self.empty_cache(), self.empty_cache()
        ids = np.array([prompt], np.int64)
        out: list[int] = []
        while len(out) < limit:
            logits, k, v = self.session.run(None, {"ids": ids, "past_k": k, "past_v": v})
            token = int(logits[0].argmax())
            if token in stops:
                break
            out.append(token)
            ids = np.array([[token]], np.int64)
        return out

    def answer(self, chat: Chat) -> str:
        """Return the model's answer to the last turn of the conversation."""
        return str(self.tokenizer.decode(self.generate(encode_prompt(chat))))


def evaluate(engine: SkillsEngine, chats: list[Chat], show: int = 0) -> dict[str, Score]:
    """Return the score of each skill; print up to ``show`` wrong answers of each."""
    right: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    for chat in chats:
        turn = chat.turns[-1]
        answer = engine.answer(chat)
        asked[turn.skill] += 1
        right[turn.skill] += answer in turn.answers
        if answer not in turn.answers and asked[turn.skill] - right[turn.skill] <= show:
            print(f"  [{turn.skill}] {turn.prompt!r} -> {answer!r}, not {turn.answers[0]!r}")
    return {skill: Score(right[skill], asked[skill]) for skill in asked}


def tokens_per_second(engine: SkillsEngine, tokens: int = 400) -> float:
    """Return the single-stream decoding speed after a short prompt."""
    prompt = [258, *b"Count from 1 to 60", 259]
    engine.generate(prompt, 20, stop=False)
    start = time.perf_counter()
    engine.generate(prompt, tokens, stop=False)
    return tokens / (time.perf_counter() - start)


def main() -> None:
    """Print a table of accuracies and the decoding speed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, help="another graph than the folder's")
    parser.add_argument("--per-skill", type=int, default=100)
    parser.add_argument("--context", type=int, default=0, help="tokens of history before each")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print for each skill")
    args = parser.parse_args()
    engine = SkillsEngine(args.folder, args.model)
    scores = evaluate(engine, held_out_set(args.per_skill, context=args.context), args.show)
    for skill, score in scores.items():
        print(f"{skill:14} {score.right:4}/{score.asked:<4} {score.share:.3f}")
    for form, chats in digit_sums().items():
        score = evaluate(engine, chats, args.show)["add_digits"]
        print(f"{form.format('a', 'b'):18} {score.right:4}/{score.asked}")
    print(f"{tokens_per_second(engine):.0f} tokens/s, one stream, one thread")


if __name__ == "__main__":
    main()
