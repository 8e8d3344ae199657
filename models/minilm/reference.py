"""The same model in plain numpy, from the published weights: what the graph is compared with.

$ python reference.py FOLDER-OF-THE-PACKAGE MODEL.onnx     (needs onnxruntime and tokenizers too)

Prints how near each vector of the int8 graph is to the one of the weights as they were published,
and those vectors. Nothing of `build.py` is used.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

SENTENCES = (
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
    "A confidential prompt is sealed before it leaves the machine.",
    "x",
)
Weights = dict[str, Any]


def read_weights(path: Path) -> Weights:
    """A safetensors file: a length, a JSON header, the numbers."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    found: Weights = {}
    for name, told in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__" and told["dtype"] == "F32":
            begin, end = (8 + size + at for at in told["data_offsets"])
            found[name] = np.frombuffer(data[begin:end], "<f4").reshape(told["shape"])
    return found


def norm(x: Any, weights: Weights, name: str) -> Any:
    mean = x.mean(-1, keepdims=True)
    spread = np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-12)
    return (x - mean) / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def dense(x: Any, weights: Weights, name: str) -> Any:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x: Any) -> Any:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def vector(ids: list[int], weights: Weights) -> Any:
    """One input, float64 throughout, twelve heads, six layers, mean, length 1."""
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    x = (
        wide["embeddings.word_embeddings.weight"][ids]
        + wide["embeddings.position_embeddings.weight"][: len(ids)]
        + wide["embeddings.token_type_embeddings.weight"][0]
    )
    x = norm(x, wide, "embeddings.LayerNorm")
    for number in range(6):
        name = f"encoder.layer.{number}"
        query, key, value = (
            dense(x, wide, f"{name}.attention.self.{part}").reshape(len(ids), 12, 32)
            for part in ("query", "key", "value")
        )
        scores = np.einsum("qhd,khd->hqk", query, key) / math.sqrt(32)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", shares, value).reshape(len(ids), 384)
        out = dense(mixed, wide, f"{name}.attention.output.dense")
        x = norm(out + x, wide, f"{name}.attention.output.LayerNorm")
        inner = gelu(dense(x, wide, f"{name}.intermediate.dense"))
        x = norm(dense(inner, wide, f"{name}.output.dense") + x, wide, f"{name}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.sqrt((mean**2).sum())


def main() -> None:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when it is loaded
    import onnxruntime
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("model", type=Path)
    args = parser.parse_args()
    weights = read_weights(args.package / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(args.package / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    session = onnxruntime.InferenceSession(str(args.model), providers=["CPUExecutionProvider"])
    found = {}
    for text in SENTENCES:
        ids = tokenizer.encode(text).ids
        exact = vector(ids, weights)
        row = np.array([ids])
        (made,) = session.run(None, {"ids": row, "mask": np.ones_like(row)})
        print(f"{float(exact @ made[0]):.6f}  {text}")
        found[text] = [round(float(number), 6) for number in exact]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
