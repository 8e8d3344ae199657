"""A model id names one model: any byte, name or argument makes another, an order does not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cocoon.contracts.messages import Reply
from cocoon.kernel.errors import ConfigurationError, Conflict
from cocoon.models import ModelFile, ModelManifest
from cocoon.models.describing import describe_folder
from cocoon.models.kept import keep, kept_in, load, place_of
from cocoon.models.manifest import MAX_PUBLISHED_BYTES, describe_server, parse_published
from services.provider.settings import SHIPPED_MODEL

NAMES = st.text("abcXYZ019._-+ ", min_size=1, max_size=12).filter(lambda s: s.strip("."))
WORDS = st.text("abcXYZ019._-/:", min_size=1, max_size=12)
HASHES = st.binary(min_size=32, max_size=32).map(bytes.hex)
FILES = st.builds(
    ModelFile,
    path=st.lists(NAMES, min_size=1, max_size=3).map("/".join),
    size_bytes=st.integers(0, 2**53),
    sha256=HASHES,
)
MANIFESTS = st.builds(
    ModelManifest,
    name=WORDS,
    engine=WORDS,
    files=st.lists(FILES, max_size=4, unique_by=lambda file: file.path).map(tuple),
    tokenizer_sha256=st.none() | HASHES,
    quantisation=WORDS,
    arguments=st.dictionaries(WORDS, st.text(max_size=8), max_size=3),
)


def described(**changes: Any) -> ModelManifest:
    """The manifest of skills-1 as a dictionary would change it."""
    made = describe_folder(SHIPPED_MODEL, "skills-1").model_dump(mode="json")
    return ModelManifest.model_validate({**made, **changes})


def test_the_shipped_model_keeps_its_id() -> None:
    """What runs today is sealed to by this id."""
    made = describe_folder(SHIPPED_MODEL, "skills-1")
    assert made.model_id == "d385e392b7f93025d136258351e4a3bebb48f5ff36528cb2187dbef948f046a2"
    assert [file.path for file in made.files] == ["config.json", "model.onnx", "tokenizer.json"]


@settings(max_examples=200, deadline=None)
@given(MANIFESTS, st.data())
def test_the_id_changes_with_whatever_changes(made: ModelManifest, data: st.DataObject) -> None:
    value = made.model_dump(mode="json")
    field = data.draw(st.sampled_from(sorted(set(value) - {"format"})))
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "files": st.lists(FILES, max_size=4, unique_by=lambda file: file.path),
        "tokenizer_sha256": st.none() | HASHES,
        "arguments": st.dictionaries(WORDS, st.text(max_size=8), max_size=3),
    }
    other = ModelManifest.model_validate({**value, field: data.draw(kinds.get(field, WORDS))})
    assert (other.model_id == made.model_id) == (other == made)


@settings(max_examples=100, deadline=None)
@given(MANIFESTS, st.randoms(use_true_random=False))
def test_the_order_of_files_and_arguments_does_not_matter(made: ModelManifest, chance: Any) -> None:
    value = made.model_dump(mode="json")
    chance.shuffle(value["files"])
    arguments = list(value["arguments"].items())
    chance.shuffle(arguments)
    value["arguments"] = dict(arguments)
    assert ModelManifest.model_validate(value).model_id == made.model_id


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, st.binary(max_size=64), min_size=1, max_size=4), st.data())
def test_any_byte_and_any_name_of_a_folder_is_in_its_id(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes], data: st.DataObject
) -> None:
    contents = {f"x{name}": content for name, content in contents.items()}
    folder = tmp_path_factory.mktemp("model")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    before = describe_folder(folder, "m").model_id
    name = data.draw(st.sampled_from(sorted(contents)))
    content = contents[name]
    if content:
        at = data.draw(st.integers(0, len(content) - 1))
        flipped = bytearray(content)
        flipped[at] ^= 1 << data.draw(st.integers(0, 7))
        (folder / name).write_bytes(flipped)
        assert describe_folder(folder, "m").model_id != before
        (folder / name).write_bytes(content)
    assert describe_folder(folder, "m").model_id == before
    (folder / name).rename(folder / f"renamed {name}")
    assert describe_folder(folder, "m").model_id != before
    (folder / "one-more").write_bytes(b"")
    (folder / f"renamed {name}").rename(folder / name)
    assert describe_folder(folder, "m").model_id != before


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "/", "/a", "a/", "a//b", "../a", "a/..", "a/../b", "a/./b", "./a", "a\\b",
     "..\\a", "a\n", "a\0b", "\x7f", "é", "a" * 513, "a/..\n"],
)  # fmt: skip
def test_a_path_that_leaves_the_folder_or_has_two_forms_is_refused(path: str) -> None:
    with pytest.raises(ValidationError):
        ModelFile(path=path, size_bytes=0, sha256="00" * 32)


@pytest.mark.parametrize(
    "path", ["a", "a/b/c.safetensors", "...", "..a", "a..b", "a/...b", ".a", "C:x", "my model.gguf"]
)
def test_an_ordinary_path_is_taken(path: str) -> None:
    assert ModelFile(path=path, size_bytes=0, sha256="00" * 32).path == path


@settings(max_examples=500, deadline=None)
@given(st.text("a./\\\n", max_size=12))
def test_what_is_taken_stays_in_the_folder(path: str) -> None:
    try:
        ModelFile(path=path, size_bytes=0, sha256="00" * 32)
    except ValidationError:
        return
    pure = PurePosixPath(path)
    assert not pure.is_absolute()
    assert ".." not in pure.parts
    assert str(pure) == path


def test_a_file_named_twice_is_refused() -> None:
    file = {"path": "a", "size_bytes": 0, "sha256": "00" * 32}
    with pytest.raises(ValidationError):
        described(files=[file, file])


def test_the_sha256_of_a_kept_file_is_the_model_id(tmp_path: Path) -> None:
    made = described()
    place = place_of(tmp_path / "models", made.name)
    assert keep(made, place)
    assert not keep(made, place)  # the very same
    assert hashlib.sha256(place.read_bytes()).hexdigest() == made.model_id
    other = described(quantisation="fp16")
    with pytest.raises(Conflict, match="--force"):
        keep(other, place)
    assert load(place) == made
    assert keep(other, place, force=True)
    assert load(place) == other


@settings(max_examples=50, deadline=None)
@given(MANIFESTS)
def test_a_file_gives_back_its_manifest_however_it_is_written(made: ModelManifest) -> None:
    value = json.loads(made.to_canonical())
    again = ModelManifest.model_validate(json.loads(json.dumps(value, indent=2)))
    assert (again, again.model_id) == (made, made.model_id)


@pytest.mark.parametrize("name", ["a/b", "../a", "..", "org/Model:7b", "/etc/passwd"])
def test_a_name_never_leaves_the_folder_of_manifests(tmp_path: Path, name: str) -> None:
    place = place_of(tmp_path, name)
    assert place.parent == tmp_path
    keep(described(name=name), place)
    assert [(path, manifest and manifest.name) for path, manifest in kept_in(tmp_path)] == [
        (place, name)
    ]


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json", '{"format": 2}', "[" * 5000])
def test_what_is_no_manifest_is_refused_by_its_place(tmp_path: Path, text: str) -> None:
    place = tmp_path / "m.json"
    place.write_text(text)
    with pytest.raises(ConfigurationError, match=r"m\.json is not a model manifest"):
        load(place)
    assert list(kept_in(tmp_path)) == [(place, None)]


@settings(max_examples=200, deadline=None)
@given(MANIFESTS, st.data())
def test_a_published_manifest_is_taken_as_it_is_and_in_no_other_bytes(
    made: ModelManifest, data: st.DataObject
) -> None:
    sent = made.to_canonical()
    assert parse_published(sent, made.model_id) == made
    at = data.draw(st.integers(0, len(sent) - 1))
    flipped = sent[:at] + bytes([sent[at] ^ data.draw(st.integers(1, 255))]) + sent[at + 1 :]
    spaced = json.dumps(json.loads(sent), indent=1).encode()
    for other in (flipped, spaced, sent + b" ", sent[:-1], b""):
        with pytest.raises(ValueError, match="SHA-256"):
            parse_published(other, made.model_id)
    with pytest.raises(ValueError, match="canonical"):  # an id that was made of other bytes
        parse_published(spaced, hashlib.sha256(spaced).hexdigest())


def test_a_published_manifest_has_a_bound_that_leaves_room_for_many_shards() -> None:
    """Quoted in an answer of the bus it stays within the bus's 1 MiB."""
    files = tuple(
        ModelFile(path=f"model-{n:05}-of-01500.safetensors", size_bytes=5 * 10**9, sha256="ab" * 32)
        for n in range(1500)
    )
    shards = described(files=[file.model_dump() for file in files])
    assert parse_published(shards.to_canonical(), shards.model_id) == shards
    worst = describe_server("quotes", {f"{n:02}": '"\\' * 2048 for n in range(31)})
    assert len(worst.to_canonical()) < MAX_PUBLISHED_BYTES
    reply = Reply(ok=True, data=worst.to_canonical().decode())
    assert len(reply.model_dump_json()) < 1024 * 1024
    long = describe_server("long", {f"{n:02}": "\\" * 4096 for n in range(64)})
    with pytest.raises(ValueError, match="SHA-256"):
        parse_published(long.to_canonical(), long.model_id)
