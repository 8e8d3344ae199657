"""Train the skills model on one core and save its weights.

    python train.py --steps 9000 --out skills.pt

Conversations are packed one after another into rows, so a row is itself a long history and the
model learns to answer the last user turn whatever came before.  The first part of the training
uses short rows, the last part long ones.  Only answer tokens carry full weight in the loss.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import ASSISTANT, END, SYSTEM, USER, Chat, chat_stream
from model import Shape, SkillsModel

SHORT_ROW, LONG_ROW = 192, 640
LONG_FROM = 0.8  # the share of the training after which rows are long
PROMPT_WEIGHT = 0.02
# Weight of one answer token; short answers to hard questions count most.
ANSWER_WEIGHT = {"add": 3.0, "sort": 1.5, "story": 0.2, "count_to": 0.4, "fallback": 0.3}


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
        weights += [ANSWER_WEIGHT.get(turn.skill, 1.0)] * len(answer)
    return ids, weights


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield ``(inputs, targets, weights)``; send the row length and count before each."""
    stream, choose = chat_stream(seed), random.Random(seed)
    size = yield torch.empty(0), torch.empty(0), torch.empty(0)
    while True:
        length, rows = size
        all_ids, all_weights = [], []
        for _ in range(rows):
            ids: list[int] = []
            weights: list[float] = []
            while len(ids) < length + 1:
                more_ids, more_weights = tokens_of(next(stream), choose)
                ids += more_ids
                weights += more_weights
            all_ids.append(ids[: length + 1])
            all_weights.append(weights[1 : length + 1])
        x = torch.tensor(all_ids)
        size = yield x[:, :-1].contiguous(), x[:, 1:].contiguous(), torch.tensor(all_weights)


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
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="hurry to end by then")
    parser.add_argument("--tokens", type=int, default=3072, help="tokens a step")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--out", type=Path, default=Path("skills.pt"))
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    shape = Shape(layers=args.layers)
    model = SkillsModel(shape)
    compiled = torch.compile(model, dynamic=False)
    tuners = optimizers(model, args.rate)
    feed = batches(args.seed)
    next(feed)
    print("parameters", sum(p.numel() for p in model.parameters()), flush=True)

    start, smooth, done, step = time.time(), math.nan, 0.0, 0
    while done < 1:
        length = SHORT_ROW if done < LONG_FROM else LONG_ROW
        x, y, weights = feed.send((length, max(1, args.tokens // length)))
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
        done = max(step / args.steps, elapsed / 60 / args.minutes)
        if step % 100 == 0 or done >= 1:
            print(f"step {step} {done:.1%} {elapsed:.0f}s loss {smooth:.4f}", flush=True)
            torch.save({"shape": asdict(shape), "weights": model.state_dict()}, args.out)


if __name__ == "__main__":
    main()
