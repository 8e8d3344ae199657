"""Turn trained weights into the three files an engine loads.

$ python export.py skills.pt ../skills-1
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from data import SPECIAL_TOKENS, VOCAB_SIZE
from model import Shape, SkillsModel, Step
from onnx import helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from train import LONG_ROW

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}<|assistant|>"
)


def write_tokenizer(path: Path) -> None:
    """Write a tokenizer whose first 256 ids are the bytes themselves."""
    # The byte-level alphabet writes each byte as one printable character: printable ones as
    # themselves, the others from U+0100 on in order.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocab = {letters[byte]: byte for byte in range(256)}
    vocab |= {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.save(str(path))


def write_config(path: Path, shape: Shape) -> None:
    """Write what an engine must know to drive the graph."""
    ids = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
    config = {
        "model": "skills-1",
        "layers": shape.layers,
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "width": shape.width,
        "vocab_size": shape.vocab,
        "positions": "rope",
        "context_length": LONG_ROW,
        "trained_context_length": LONG_ROW,
        "special_tokens": ids,
        "end_token_id": ids["<|end|>"],
        "stop_token_ids": sorted(ids.values()),
        "chat_template": TEMPLATE,
        "inputs": {
            "ids": "int64 [B, T]",
            "past_k": "float32 [layers, B, heads, P, head_dim]",
            "past_v": "float32 [layers, B, heads, P, head_dim]",
        },
        "outputs": {
            "logits": "float32 [B, vocab_size], of the last position",
            "new_k": "float32 [layers, B, heads, P + T, head_dim]",
            "new_v": "float32 [layers, B, heads, P + T, head_dim]",
        },
        "default_temperature": 0.0,
        "license": "Apache-2.0",
    }
    path.write_text(json.dumps(config, indent=2) + "\n")


def write_float_graph(path: Path, model: SkillsModel) -> None:
    """Write the step graph with float32 weights."""
    shape = model.shape
    ids = torch.tensor([[257, 72, 258, 104], [258, 72, 105, 259]])
    past = torch.zeros(shape.layers, 2, shape.heads, 3, shape.head_dim)
    cache = {1: "B", 3: "P"}
    torch.onnx.export(
        Step(model).eval(),
        (ids, past, past.clone()),
        str(path),
        input_names=["ids", "past_k", "past_v"],
        output_names=["logits", "new_k", "new_v"],
        dynamic_axes={
            "ids": {0: "B", 1: "T"},
            "past_k": cache,
            "past_v": cache,
            "logits": {0: "B"},
            "new_k": {1: "B", 3: "S"},
            "new_v": {1: "B", 3: "S"},
        },
        opset_version=17,
        dynamo=False,
    )


def quantise_weights(source: Path, target: Path) -> None:
    """Store every weight matrix as int8 with one scale for each output column.

    The graph widens a matrix before use (``Cast``, ``Mul``), which onnxruntime does once, at load.
    Activations stay float32: were they quantised too, one sequence of a batch would set the
    scale of the others, and an answer would depend on who else is asking.
    """
    model = onnx.load(str(source))
    matrices = {
        name for node in model.graph.node if node.op_type == "MatMul" for name in node.input
    }
    stored, widen = [], []
    for number, tensor in enumerate(model.graph.initializer):
        if tensor.name not in matrices:
            stored.append(tensor)
            continue
        weight = numpy_helper.to_array(tensor)
        scale = np.abs(weight).max(axis=0, keepdims=True) / np.float32(127)
        whole = np.rint(weight / scale).astype(np.int8)
        name = f"weight_{number}"
        stored.append(numpy_helper.from_array(whole, name))
        stored.append(numpy_helper.from_array(scale, f"{name}_scale"))
        widen.append(helper.make_node("Cast", [name], [f"{name}_wide"], to=onnx.TensorProto.FLOAT))
        widen.append(helper.make_node("Mul", [f"{name}_wide", f"{name}_scale"], [tensor.name]))
    nodes = [*widen, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(stored)
    model.graph.node.extend(nodes)
    onnx.save(model, str(target))


def main() -> None:
    """Export, quantise and write the tokenizer and the configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--float", type=Path, help="keep the float32 graph here too")
    args = parser.parse_args()
    saved = torch.load(args.weights, weights_only=True)
    model = SkillsModel(Shape(**saved["shape"]))
    model.load_state_dict(saved["weights"])
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        graph = args.float or Path(scratch) / "float.onnx"
        write_float_graph(graph, model.eval())
        target = args.folder / "model.onnx"
        quantise_weights(graph, target)
    onnx.checker.check_model(str(target))
    write_tokenizer(args.folder / "tokenizer.json")
    write_config(args.folder / "config.json", model.shape)
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
