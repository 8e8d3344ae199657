"""The network: a small causal transformer over bytes.

Pre-norm blocks, rotary positions, squared-ReLU feed-forward, tied embedding.  One addition makes
copying quick to learn: every head mixes each key and value with the one before it by learned
weights ("KV shifting"), so a single layer can find "what followed this byte last time".  The cache
holds plain keys and values.  A step mixes scores instead of keys and probabilities instead of
values, which is the same sum in another order and leaves the cache alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes of the network."""

    vocab: int = 260
    width: int = 128
    heads: int = 4
    layers: int = 4
    hidden: int = 512
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def rope_angles(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine tables ``[T, head_dim / 2]`` for the positions."""
    half = shape.head_dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    angles = positions.float()[:, None] * shape.rope_theta**-steps
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first half of each head against the second half by its position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def previous(x: Tensor) -> Tensor:
    """Move ``[B, H, S, hd]`` one position later; position 0 gets zeros."""
    return F.pad(x[:, :, :-1], (0, 0, 1, 0))


class Norm(nn.Module):
    """Root-mean-square normalisation."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.width))
        self.eps = shape.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * scale * self.weight


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.norm_attention = Norm(shape)
        self.norm_feed = Norm(shape)
        self.q = nn.Linear(shape.width, shape.width, bias=False)
        self.k = nn.Linear(shape.width, shape.width, bias=False)
        self.v = nn.Linear(shape.width, shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)
        # Half of the heads start by looking mostly at the previous key.
        shift = torch.tensor([0.7 if h < shape.heads // 2 else 0.1 for h in range(shape.heads)])
        self.key_now = nn.Parameter((1 - shift).view(-1, 1, 1))
        self.key_before = nn.Parameter(shift.clone().view(-1, 1, 1))
        self.value_now = nn.Parameter(torch.ones(shape.heads, 1, 1))
        self.value_before = nn.Parameter(torch.zeros(shape.heads, 1, 1))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rotated queries and keys and the values, ``[B, H, T, hd]``."""
        h = self.norm_attention(x)
        size = (x.shape[0], x.shape[1], self.shape.heads, self.shape.head_dim)
        q, k, v = (part(h).view(size).transpose(1, 2) for part in (self.q, self.k, self.v))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def mix(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Mix every key and value with the one before it."""
        keys = self.key_now * k + self.key_before * previous(k)
        values = self.value_now * v + self.value_before * previous(v)
        return keys, values

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the attention's answer and the feed-forward's."""
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm_feed(x))).square())

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        k, v = self.mix(k, v)
        q, k, v = (part.to(x.dtype) for part in (q, k, v))
        return self.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))


class SkillsModel(nn.Module):
    """Bytes in, logits for the next byte out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual = name.endswith(("out.weight", "down.weight"))
                scale = math.sqrt(2 * shape.layers) if into_residual else 1.0
                nn.init.normal_(weight, std=0.5 / math.sqrt(weight.shape[1]) / scale)
        nn.init.normal_(self.embedding.weight, std=0.05)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits ``[B, T, V]`` for a whole sequence (training)."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        cos, sin = rope_angles(positions, self.shape)
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(self.norm(x), self.embedding.weight)


class Step(nn.Module):
    """What is exported: extend the cache by ``T`` tokens and return the last logits."""

    def __init__(self, model: SkillsModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, ...]:
        """Take ``ids [B, T]`` and the cache ``[L, B, H, P, hd]``; return logits and the cache."""
        model = self.model
        done, new = past_k.shape[3], ids.shape[1]
        rows = torch.arange(new) + done
        cos, sin = rope_angles(rows, model.shape)
        hidden = torch.arange(done + new)[None, :] > rows[:, None]
        mask = hidden.float() * -1e9
        x = model.embedding(ids)
        all_k, all_v = [], []
        for i, block in enumerate(model.blocks):
            q, k, v = block.project(x, cos, sin)
            k = torch.cat((past_k[i], k), dim=2)
            v = torch.cat((past_v[i], v), dim=2)
            all_k.append(k)
            all_v.append(v)
            scores = q @ k.transpose(-1, -2) * model.shape.head_dim**-0.5
            scores = block.key_now * scores + block.key_before * F.pad(scores[..., :-1], (1, 0))
            shares = (scores + mask).softmax(-1)
            shares = block.value_now * shares + block.value_before * F.pad(shares[..., 1:], (0, 1))
            x = block.finish(x, shares @ v)
        logits = F.linear(model.norm(x[:, -1]), model.embedding.weight)
        return logits, torch.stack(all_k), torch.stack(all_v)
