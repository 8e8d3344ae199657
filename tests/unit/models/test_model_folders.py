"""A folder is compared file by file; what is no model is skipped, what leaves it refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cocoon.kernel.errors import ConfigurationError
from cocoon.models import ModelManifest
from cocoon.models.describing import describe_folder
from cocoon.models.folder import walk
from cocoon.models.verifying import differences, verify

SHARDS = tuple(f"model-0000{one}-of-00003.safetensors" for one in (1, 2, 3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Like a folder of a large model: shards, a tokenizer, a subfolder, what is no part of it."""
    made = tmp_path / "model"
    for name, text in {
        **dict.fromkeys(SHARDS, "weights"),
        "config.json": '{"torch_dtype": "bfloat16"}',
        "tokenizer.json": "{}",
        "original/params.json": "{}",
        "README.md": "read me",
        "LICENSE": "free",
        ".gitattributes": "x",
        ".cache/huggingface/lock": "x",
        "__pycache__/code.pyc": "x",
    }.items():
        place = made / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return made


@pytest.fixture
def manifest(folder: Path) -> ModelManifest:
    return describe_folder(folder, "m")


def told(manifest: ModelManifest, folder: Path) -> list[tuple[str, str]]:
    return [(one.path, one.kind) for one in differences(manifest, folder)]


def test_shards_and_subfolders_are_hashed_and_what_is_no_model_is_named(
    folder: Path, manifest: ModelManifest
) -> None:
    assert [file.path for file in manifest.files] == [
        "config.json", *SHARDS, "original/params.json", "tokenizer.json",
    ]  # fmt: skip
    assert walk(folder).skipped == [
        ".cache", ".gitattributes", "LICENSE", "README.md", "__pycache__",
    ]  # fmt: skip
    assert manifest.tokenizer_sha256 == manifest.files[-1].sha256
    assert (manifest.engine, manifest.quantisation) == ("openai-compatible", "bfloat16")
    assert differences(manifest, folder) == []
    verify(manifest, folder)


def test_each_difference_is_named_by_its_file(folder: Path, manifest: ModelManifest) -> None:
    weights = folder / SHARDS[0]
    weights.write_text("weighty")  # as long as before
    (folder / SHARDS[1]).write_text("weights and more")
    (folder / SHARDS[2]).unlink()
    (folder / "original" / "adapter.bin").write_text("more")
    assert told(manifest, folder) == [
        (SHARDS[0], "content"), (SHARDS[1], "size"), (SHARDS[2], "missing"),
        ("original/adapter.bin", "extra"),
    ]  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"00001-of.*and 1 more"):
        verify(manifest, folder)


def test_weights_in_a_folder_with_a_paper_s_name_are_not_overlooked(
    folder: Path, manifest: ModelManifest
) -> None:
    (folder / "notes.md").mkdir()
    (folder / "notes.md" / "model.safetensors").write_text("others")
    assert told(manifest, folder) == [("notes.md/model.safetensors", "extra")]


def test_what_is_no_part_of_a_model_is_no_difference(folder: Path, manifest: ModelManifest) -> None:
    (folder / "README.md").write_text("better")
    (folder / ".hidden").write_text("x")
    assert told(manifest, folder) == []


def test_a_link_that_leaves_the_folder_is_refused_and_never_read(
    folder: Path, manifest: ModelManifest, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (folder / SHARDS[0]).rename(outside)  # the very same bytes
    (folder / SHARDS[0]).symlink_to(outside)
    assert told(manifest, folder) == [(SHARDS[0], "unreadable")]
    with pytest.raises(ConfigurationError, match="leaves the folder"):
        describe_folder(folder, "m")


def test_a_link_within_the_folder_is_its_file(folder: Path, manifest: ModelManifest) -> None:
    (folder / ".blobs").mkdir()
    (folder / SHARDS[0]).rename(folder / ".blobs" / "one")
    (folder / SHARDS[0]).symlink_to(Path(".blobs") / "one")
    assert told(manifest, folder) == []
    assert describe_folder(folder, "m") == manifest


@pytest.mark.parametrize("kind", ["nothing", "circle", "folder", "pipe"])
def test_what_is_no_file_is_refused(folder: Path, manifest: ModelManifest, kind: str) -> None:
    odd = folder / "odd"
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to({"nothing": "absent", "circle": "odd", "folder": "original"}[kind])
    assert told(manifest, folder) == [("odd", "unreadable")]
    with pytest.raises(ConfigurationError, match="odd"):
        describe_folder(folder, "m")


def test_a_folder_that_is_itself_a_link_is_read(
    folder: Path, manifest: ModelManifest, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert describe_folder(tmp_path / "link", "m") == manifest


def test_odd_names_empty_and_absent_folders_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no file"):
        describe_folder(tmp_path, "m")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        describe_folder(tmp_path / "absent", "m")
    (tmp_path / "a\nb").write_text("x")
    with pytest.raises(ConfigurationError, match=r"'a\\nb' cannot be in a manifest"):
        describe_folder(tmp_path, "m")


def test_the_embedded_engine_wants_its_three_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"context_length": 8}')
    (tmp_path / "model.onnx").write_text("x")
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json is missing"):
        describe_folder(tmp_path, "m")
    (tmp_path / "tokenizer.json").write_text("{}")
    made = describe_folder(tmp_path, "m", arguments={"threads": "1"})
    assert made.engine == "onnxruntime-cpu"
    assert made.arguments == {"context_tokens": "8", "threads": "1"}
    (tmp_path / "model.onnx_data").write_text("weights beside the graph")
    assert describe_folder(tmp_path, "m").model_id != made.model_id


def test_progress_counts_every_byte(folder: Path) -> None:
    heard: list[tuple[int, int]] = []
    made = describe_folder(folder, "m", told=lambda _, done, total: heard.append((done, total)))
    assert heard[-1] == (made.size_bytes, made.size_bytes)
    assert heard == sorted(heard)
