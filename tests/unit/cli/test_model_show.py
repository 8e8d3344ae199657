"""`cocoon model show`: what a name or an id is, believed only by its hash, and kept if asked."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from cocoon.cli.app import main
from cocoon.models import ModelFile, ModelManifest
from cocoon.models.kept import keep
from cocoon.models.manifest import describe_server

Run = Callable[..., tuple[int, str, str]]
ONE = describe_server("skills-1", {"model": "skills-1", "note": "\x1b[2Jred"})
TWO = describe_server("skills-1", {})
MANY = ModelManifest(
    name="big", engine="vllm", quantisation="fp8", arguments={"kind": "embeddings"},
    files=tuple(ModelFile(path=f"{n:03}", size_bytes=n, sha256="ab" * 32) for n in range(25)),
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`cocoon model show ...` in a folder of its own: exit code, stdout, stderr."""
    monkeypatch.setenv("COCOON_ROOT", str(tmp_path))

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cocoon", "model", "show", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run


class _Gateway(BaseHTTPRequestHandler):
    documents: ClassVar[dict[str, bytes]] = {}
    ids: ClassVar[dict[str, int]] = {}

    def do_GET(self) -> None:
        key, _, name = self.headers["Authorization"], *self.path.rpartition("/")[1:]
        if self.path.startswith("/v1/manifests/"):
            assert key is None, "a key was sent where none is needed"
            document = self.documents.get(name)
            told = document or b'{"error": {"message": "nobody has published it"}}'
            status = 200 if document else 404
        else:
            status = 200 if key == "Bearer mine" else 401
            models = [{"id": "skills-1", "cocoon": {"model_ids": self.ids}}]
            told = json.dumps({"data": models}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def at() -> Iterator[tuple[str, ...]]:
    _Gateway.documents = {m.model_id: m.to_canonical() for m in (ONE, TWO, MANY)}
    _Gateway.ids = {ONE.model_id: 2, TWO.model_id: 1}
    with HTTPServer(("127.0.0.1", 0), _Gateway) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield "--gateway", f"http://127.0.0.1:{server.server_port}", "--key", "mine"
        server.shutdown()
        thread.join()


def test_an_id_shows_what_the_network_published_under_it(run: Run, at: tuple[str, ...]) -> None:
    code, out, err = run(MANY.model_id, *at)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:7] == [
        f"big  {MANY.model_id}", "  kind          embeddings", "  engine        vllm",
        "  quantisation  fp8", "  tokenizer     not stated", "  argument      kind=embeddings",
        "  files         25 files, 300 bytes",
    ]  # fmt: skip
    assert lines[7].split() == ["ab" * 32, "0", "000"]
    assert lines[-2:] == [
        "    and 5 more: --json lists all",
        f"  checked       its SHA-256 is the model id; from {at[1]}",
    ]
    told = json.loads(run(MANY.model_id, *at, "--json")[1])
    assert ModelManifest.model_validate(told["manifest"]) == MANY
    assert (told["model_id"], told["file"]) == (MANY.model_id, None)


def test_a_name_is_what_most_providers_offer_and_the_others_are_told(
    run: Run, at: tuple[str, ...]
) -> None:
    code, out, err = run("skills-1", *at)
    assert (code, out.splitlines()[0]) == (0, f"skills-1  {ONE.model_id}")
    assert "no file was hashed" in out
    assert f"is also {TWO.model_id}, of 1 provider" in err
    assert "\x1b" not in out  # what a manifest holds does not reach a terminal as it is
    assert "no model unknown" in run("unknown", *at)[2]


@pytest.mark.parametrize("document", [TWO.to_canonical(), b"{}", ONE.to_canonical() + b" "])
def test_a_gateway_that_gives_a_wrong_manifest_is_refused_and_nothing_is_kept(
    run: Run, at: tuple[str, ...], tmp_path: Path, document: bytes
) -> None:
    _Gateway.documents = {ONE.model_id: document}
    code, out, err = run(ONE.model_id, *at, "--save")
    assert (code, out, "SHA-256" in err) == (1, "", True)
    assert not list(tmp_path.rglob("*.json"))


def test_an_offer_under_another_name_than_its_manifest_s_is_told(
    run: Run, at: tuple[str, ...]
) -> None:
    _Gateway.ids = {MANY.model_id: 1}
    code, _, err = run("skills-1", *at)
    assert (code, "offered as skills-1 and its manifest names it big" in err) == (0, True)


def test_saved_is_kept_by_its_name_and_replaces_another_only_by_force(
    run: Run, at: tuple[str, ...], tmp_path: Path
) -> None:
    place = tmp_path / ".cocoon" / "models" / "skills-1.json"
    assert f"kept in       {place}" in run(ONE.model_id, *at, "--save")[1]
    assert hashlib.sha256(place.read_bytes()).hexdigest() == ONE.model_id
    code, out, err = run(TWO.model_id, *at, "--save")
    assert (code, out, "--force" in err) == (1, "", True)
    elsewhere = tmp_path / "two.json"
    assert run(TWO.model_id, *at, "--to", elsewhere)[0] == 0
    assert hashlib.sha256(elsewhere.read_bytes()).hexdigest() == TWO.model_id
    assert run(TWO.model_id, *at, "--save", "--force")[0] == 0
    assert hashlib.sha256(place.read_bytes()).hexdigest() == TWO.model_id


def test_what_is_kept_is_shown_without_a_network(run: Run, tmp_path: Path) -> None:
    place = tmp_path / ".cocoon" / "models" / "skills-1.json"
    keep(ONE, place)
    for asked in ("skills-1", ONE.model_id):
        code, out, _ = run(asked)
        assert (code, f"from {place}" in out) == (0, True)
    for asked in ("unknown", "cd" * 32):
        code, out, err = run(asked)
        assert (code, out, "--gateway" in err) == (64, "", True)


def test_what_nobody_published_is_said(run: Run, at: tuple[str, ...]) -> None:
    code, out, err = run("cd" * 32, *at)
    assert (code, out, "nobody has published it" in err) == (1, "", True)
    assert run("skills-1", *at[:2])[0] == 1  # a name needs a key
