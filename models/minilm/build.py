"""Turn the published weights of all-MiniLM-L6-v2 into the three files that the engine loads.

$ python build.py FOLDER-OF-THE-PACKAGE OUT

Needs numpy and onnx, nothing else. The same weights give the same bytes everywhere: no random
number, no clock and no measured scale goes in. `reference.py` compares what comes out with plain
arithmetic.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, checker, helper, numpy_helper

LAYERS, HEADS, WIDTH, INNER = 6, 12, 384, 1536
HEAD_DIM = WIDTH // HEADS
MOST_TOKENS = 256  # of one input: what the model was published with (sentence_bert_config.json)
EPSILON = 1e-12
OPSET = 17
Weights = dict[str, NDArray[np.float32]]


def read_weights(path: Path) -> Weights:
    """A safetensors file: a length, a JSON header, the numbers."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    found: Weights = {}
    for name, told in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__" or told["dtype"] != "F32":
            continue
        begin, end = (8 + size + at for at in told["data_offsets"])
        found[name] = np.frombuffer(data[begin:end], "<f4").reshape(told["shape"])
    return found


class Graph:
    """Nodes and numbers of one ONNX graph, in the order in which they were added."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.nodes: list[Any] = []
        self.numbers: list[Any] = []

    def constant(self, name: str, value: Any, kind: Any) -> str:
        self.numbers.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def plain(self, name: str) -> str:
        """A weight as it is published: biases and norms."""
        return self.constant(name, self.weights[name], np.float32)

    def small(self, name: str, value: NDArray[np.float32], axis: int) -> tuple[str, str]:
        """A matrix in int8, with one scale for each row or column that is left beside `axis`."""
        scale = np.abs(value).max(axis=axis, keepdims=True) / np.float32(127)
        scale = np.where(scale == 0, np.float32(1), scale)
        whole = np.rint(value / scale).astype(np.int8)
        return self.constant(name, whole, np.int8), self.constant(
            f"{name}.scale", scale, np.float32
        )

    def add(self, kind: str, *inputs: str, output: str, **more: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **more))
        return output

    def dense(self, inputs: str, name: str) -> str:
        """inputs times the matrix, plus its bias. Published matrices are [out, in]."""
        matrix = np.ascontiguousarray(self.weights[f"{name}.weight"].T)
        whole, scale = self.small(f"{name}.weight", matrix, 0)
        wide = self.add("Cast", whole, output=f"{name}.wide", to=TensorProto.FLOAT)
        matrix_name = self.add("Mul", wide, scale, output=f"{name}.matrix")
        product = self.add("MatMul", inputs, matrix_name, output=f"{name}.product")
        return self.add("Add", product, self.plain(f"{name}.bias"), output=f"{name}.sum")

    def norm(self, inputs: str, name: str) -> str:
        return self.add(
            "LayerNormalization", inputs, self.plain(f"{name}.weight"), self.plain(f"{name}.bias"),
            output=f"{name}.out", axis=-1, epsilon=EPSILON,
        )  # fmt: skip

    def gathered(self, name: str, ids: str) -> str:
        """Rows of a table in int8, widened after they were looked up."""
        whole, scale = self.small(name, self.weights[name], 1)
        rows = self.add("Gather", whole, ids, output=f"{name}.rows")
        wide = self.add("Cast", rows, output=f"{name}.wide", to=TensorProto.FLOAT)
        scales = self.add("Gather", scale, ids, output=f"{name}.scales")
        return self.add("Mul", wide, scales, output=f"{name}.out")


def embeddings(graph: Graph) -> str:
    words = graph.gathered("embeddings.word_embeddings.weight", "ids")
    length = graph.add("Shape", "ids", output="length", start=1, end=2)
    graph.constant("zero", [0], np.int64)
    graph.constant("axis0", [0], np.int64)
    places = graph.constant(
        "places",
        graph.weights["embeddings.position_embeddings.weight"][:MOST_TOKENS]
        + graph.weights["embeddings.token_type_embeddings.weight"][0],
        np.float32,
    )
    here = graph.add("Slice", places, "zero", length, "axis0", output="here")
    both = graph.add("Add", words, here, output="embeddings.sum")
    return graph.norm(both, "embeddings.LayerNorm")


def attention(graph: Graph, inputs: str, name: str, mask: str) -> str:
    parts = {}
    for part, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
        rows = graph.dense(inputs, f"{name}.self.{part}")
        split = graph.add("Reshape", rows, "by_head", output=f"{name}.{part}.split")
        parts[part] = graph.add("Transpose", split, output=f"{name}.{part}.heads", perm=order)
    scores = graph.add("MatMul", parts["query"], parts["key"], output=f"{name}.scores")
    scaled = graph.add("Mul", scores, "per_head", output=f"{name}.scaled")
    masked = graph.add("Add", scaled, mask, output=f"{name}.masked")
    shares = graph.add("Softmax", masked, output=f"{name}.shares", axis=-1)
    mixed = graph.add("MatMul", shares, parts["value"], output=f"{name}.mixed")
    turned = graph.add("Transpose", mixed, output=f"{name}.turned", perm=[0, 2, 1, 3])
    joined = graph.add("Reshape", turned, "by_token", output=f"{name}.joined")
    out = graph.dense(joined, f"{name}.output.dense")
    return graph.norm(
        graph.add("Add", out, inputs, output=f"{name}.residual"), f"{name}.output.LayerNorm"
    )


def layer(graph: Graph, inputs: str, number: int, mask: str) -> str:
    name = f"encoder.layer.{number}"
    attended = attention(graph, inputs, f"{name}.attention", mask)
    inner = graph.dense(attended, f"{name}.intermediate.dense")
    turned = graph.add("Mul", inner, "root_half", output=f"{name}.gelu.turned")
    error = graph.add("Erf", turned, output=f"{name}.gelu.erf")
    raised = graph.add("Add", error, "one", output=f"{name}.gelu.raised")
    halved = graph.add("Mul", inner, "half", output=f"{name}.gelu.halved")
    active = graph.add("Mul", halved, raised, output=f"{name}.gelu")
    out = graph.dense(active, f"{name}.output.dense")
    return graph.norm(
        graph.add("Add", out, attended, output=f"{name}.residual"), f"{name}.output.LayerNorm"
    )


def pooled(graph: Graph, tokens: str) -> str:
    """The mean over an input's own tokens, then length 1."""
    graph.constant("axis1", [1], np.int64)
    graph.constant("axis2", [2], np.int64)
    column = graph.add("Unsqueeze", "present", "axis2", output="column")
    kept = graph.add("Mul", tokens, column, output="kept")
    summed = graph.add("ReduceSum", kept, "axis1", output="summed", keepdims=0)
    count = graph.add("ReduceSum", "present", "axis1", output="count", keepdims=1)
    mean = graph.add("Div", summed, count, output="mean")
    length = graph.add("ReduceL2", mean, output="norm", axes=[1], keepdims=1)
    return graph.add("Div", mean, length, output="vectors")


def model(weights: Weights) -> bytes:
    """ids and mask, int64 [B, T], to vectors, float32 [B, 384] of length 1."""
    graph = Graph(weights)
    graph.constant("by_head", [0, 0, HEADS, HEAD_DIM], np.int64)
    graph.constant("by_token", [0, 0, WIDTH], np.int64)
    graph.constant("per_head", HEAD_DIM**-0.5, np.float32)
    graph.constant("root_half", 0.5**0.5, np.float32)
    graph.constant("half", 0.5, np.float32)
    graph.constant("one", 1, np.float32)
    graph.constant("least", -1e9, np.float32)
    graph.constant("mask_axes", [1, 2], np.int64)
    present = graph.add("Cast", "mask", output="present", to=TensorProto.FLOAT)
    absent = graph.add("Sub", "one", present, output="absent")
    spread = graph.add("Unsqueeze", absent, "mask_axes", output="spread")
    mask = graph.add("Mul", spread, "least", output="blinds")
    flow = embeddings(graph)
    for number in range(LAYERS):
        flow = layer(graph, flow, number, mask)
    pooled(graph, flow)
    shape = ["B", "T"]
    made = helper.make_model(
        helper.make_graph(
            graph.nodes, "all-MiniLM-L6-v2",
            [helper.make_tensor_value_info(name, TensorProto.INT64, shape)
             for name in ("ids", "mask")],
            [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["B", WIDTH])],
            graph.numbers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8, producer_name="cocoon",
    )  # fmt: skip
    checker.check_model(made)
    return bytes(made.SerializeToString(deterministic=True))


def configuration() -> bytes:
    """What the engine must know to drive the graph."""
    told = {
        "model": "all-minilm-l6-v2",
        "kind": "embeddings",
        "context_length": MOST_TOKENS,
        "dimensions": WIDTH,
        "start_token": "[CLS]",
        "end_token": "[SEP]",
        "pad_token": "[PAD]",
        "quantisation": "int8-weights",
        "inputs": {"ids": "int64 [B, T]", "mask": "int64 [B, T]"},
        "outputs": {"vectors": f"float32 [B, {WIDTH}], of length 1"},
        "license": "Apache-2.0",
    }
    return (json.dumps(told, indent=2) + "\n").encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="the folder with model.safetensors")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "model.onnx").write_bytes(model(read_weights(args.package / "model.safetensors")))
    (args.out / "config.json").write_bytes(configuration())
    shutil.copyfile(args.package / "tokenizer.json", args.out / "tokenizer.json")
    for path in sorted(args.out.iterdir()):
        data = path.read_bytes()
        print(hashlib.sha256(data).hexdigest(), len(data), path.name)


if __name__ == "__main__":
    main()
