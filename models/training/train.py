"""Train the skills model on one core and save its weights.

$ python train.py --steps 7000 --out skills.pt

Conversations are packed one after another into rows, so a row is itself a long history and the
model learns to answer the last user turn whatever came before.  Most rows are short, which is
quick; every fourth step, and the last part of the training, uses long ones.  Only answer tokens
carry full weight in the loss.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from data import ASSISTANT, END, SYSTEM, USER, Chat, chat_stream
from model import Shape, SkillsModel
from torch import Tensor, nn

SHORT_ROW, LONG_ROW = 192, 640
LONG_EVERY, LONG_FROM = 4, 0.85  # every fourth step; all steps after this share of the training
PROMPT_WEIGHT = 0.02
# Weight of one answer token; short answers to hard questions count most.  Where the answer ends
# is the whole difficulty of counting to N, and only one token in a hundred says it.
ANSWER_WEIGHT = {"add": 3.0, "add_digits": 3.0, "sort": 1.5, "story": 0.5}
END_WEIGHT = {"add": 3.0, "add_digits": 3.0, "count_to": 10.0}


def tokens_of(chat: Chat, choose: random.Random) -> tuple[list[int], list[float]]:
    """Return a conversation's tokens and the loss weight of each as a target."""
    ids: list[int] = []
    weights: list[float] = []
    if chat.system is not None:
        ids += [SYSTEM, *chat.system.encode()]
        weights += [0.0] * len(ids)
    for turn in chat.turns:
        prompt = [USER, *turn.prompt.encode(), ASSISTANT]
        answer = [*choose.choice(turn.answers).encode(), END]
        ids += prompt + answer
        weights += [PROMPT_WEIGHT] * len(prompt)
        weights += [ANSWER_WEIGHT.get(turn.skill, 1.0)] * (len(answer) - 1)
        weights += [END_WEIGHT.get(turn.skill, 1.0)]
    return ids, weights


class Packer:
    """Packs the training conversations into rows; the same seed gives the same rows."""

    def __init__(self, seed: int) -> None:
        self.stream = chat_stream(seed)
        self.choose = random.Random(seed)

    def row(self, length: int) -> tuple[list[int], list[float]]:
        """Return one row, cut after ``length`` tokens, and the tokens' weights."""
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length:
            more_ids, more_weights = tokens_of(next(self.stream), self.choose)
            ids += more_ids
            weights += more_weights
        return ids[:length], weights[:length]

    def batch(self, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, targets and the targets' weights, each ``[rows, length]``."""
        packed = [self.row(length + 1) for _ in range(rows)]
        ids = torch.tensor([row for row, _ in packed])
        weights = torch.tensor([row for _, row in packed])
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights[:, 1:].contiguous()


def loss_of(model: nn.Module, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of the next-token loss."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    losses = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def optimizers(model: SkillsModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    rest = [p for n, p in model.named_parameters() if p.dim() != 2 or n.startswith("embedding")]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.97), weight_decay=0.0, fused=True),
    ]


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="hurry to end by then")
    parser.add_argument("--tokens", type=int, default=3072, help="tokens a step")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--resume", type=Path, help="weights to start from")
    parser.add_argument("--done", type=float, default=0.0, help="share of the schedule they had")
    parser.add_argument("--out", type=Path, default=Path("skills.pt"))
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    shape = Shape(layers=args.layers)
    model = SkillsModel(shape)
    if args.resume:
        model.load_state_dict(torch.load(args.resume, weights_only=True)["weights"])
    compiled = torch.compile(model, dynamic=False)
    tuners = optimizers(model, args.rate)
    packer = Packer(args.seed)
    print("parameters", sum(p.numel() for p in model.parameters()), flush=True)

    start, smooth, done, step = time.time(), math.nan, args.done, 0
    while done < 1:
        long = step % LONG_EVERY == LONG_EVERY - 1 or done > LONG_FROM
        length = LONG_ROW if long else SHORT_ROW
        x, y, weights = packer.batch(max(1, args.tokens // length), length)
        warm = min(1.0, (step + 1) / 150)
        for group in (g for tuner in tuners for g in tuner.param_groups):
            group["lr"] = args.rate * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        loss = loss_of(compiled, x, y, weights)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for tuner in tuners:
            tuner.step()
            tuner.zero_grad(set_to_none=True)
        step += 1
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        elapsed = time.time() - start
        spent = max(step / args.steps, elapsed / 60 / args.minutes)
        done = args.done + (1 - args.done) * spent
        if step % 100 == 0 or done >= 1:
            print(f"step {step} {done:.1%} {elapsed:.0f}s loss {smooth:.4f}", flush=True)
            torch.save({"shape": asdict(shape), "weights": model.state_dict()}, args.out)


if __name__ == "__main__":
    main()
