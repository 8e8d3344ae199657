"""`cocoon model`: a folder hashed, compared, listed; equal is 0, different 1, a wrong call 64."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cocoon.cli import model
from cocoon.cli.app import main
from cocoon.devnet.folder import DataFolder
from services.provider.settings import SHIPPED_MODEL

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`cocoon model ...` on a folder of its own: exit code, stdout, stderr."""
    monkeypatch.setenv("COCOON_ROOT", str(tmp_path))

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cocoon", "model", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "skills"
    shutil.copytree(SHIPPED_MODEL, made)
    return made


def test_add_writes_a_manifest_and_says_name_id_files_and_bytes(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    code, out, err = run("add", folder, "--name", "skills-1")
    place = tmp_path / ".cocoon" / "models" / "skills-1.json"
    model_id = hashlib.sha256(place.read_bytes()).hexdigest()
    assert code == 0
    assert out.splitlines() == [
        f"skills-1  {model_id}", "  3 files, 1,056,646 bytes; onnxruntime-cpu, int8-weights",
        f"  {place}",
    ]  # fmt: skip
    assert err == "not part of the model: README.md\n"
    assert run("add", folder, "--name", "skills-1")[1].endswith("(was there already)\n")


def test_another_manifest_is_not_overwritten_without_force(run: Run, folder: Path) -> None:
    asked = ("add", folder, "--name", "skills-1", "--json")
    first = json.loads(run(*asked)[1])
    code, out, err = run(*asked, "--quantisation", "fp16")
    assert (code, out, "--force" in err) == (1, "", True)
    assert hashlib.sha256(Path(first["file"]).read_bytes()).hexdigest() == first["model_id"]
    second = json.loads(run(*asked, "--quantisation", "fp16", "--force")[1])
    assert second["model_id"] != first["model_id"]


def test_engine_and_arguments_are_in_the_manifest(run: Run, folder: Path, tmp_path: Path) -> None:
    to = tmp_path / "mine.json"
    code, out, _ = run(
        "add", folder, "--name", "org/Model:7b", "--engine", "vllm", "--quantisation", "awq",
        "--argument", "dtype=half", "--argument", "extra=a=b", "--to", to, "--json",
    )  # fmt: skip
    told = json.loads(out)
    assert code == 0
    assert told["arguments"] == {"dtype": "half", "extra": "a=b"}
    assert (told["engine"], told["quantisation"], told["name"]) == ("vllm", "awq", "org/Model:7b")
    assert told["file"] == str(to)
    assert run("verify", to, "--folder", folder)[0] == 0


def test_verify_is_0_for_equal_and_1_with_a_line_for_each_file(run: Run, folder: Path) -> None:
    run("add", folder, "--name", "skills-1")
    code, out, _ = run("verify", "--folder", folder)
    assert (code, out.startswith("equal: 3 files, 1,056,646 bytes  skills-1 ")) == (0, True)
    content = bytearray((folder / "model.onnx").read_bytes())
    content[7] ^= 1
    (folder / "model.onnx").write_bytes(content)
    (folder / "tokenizer.json").unlink()
    (folder / "lora.safetensors").write_text("x")
    code, out, _ = run("verify", "skills-1", "--folder", folder)
    assert code == 1
    assert out.splitlines()[:3] == [
        "lora.safetensors: is not in the manifest",
        "model.onnx: has other content than the manifest says",
        "tokenizer.json: is missing",
    ]
    assert out.splitlines()[3].startswith("different  skills-1 ")
    code, out, _ = run("verify", "--folder", folder, "--json")
    told = json.loads(out)
    assert (code, told["equal"]) == (1, False)
    assert [(one["path"], one["kind"]) for one in told["differences"]] == [
        ("lora.safetensors", "extra"), ("model.onnx", "content"), ("tokenizer.json", "missing"),
    ]  # fmt: skip


def test_a_wrong_call_is_64_and_never_looks_like_a_difference(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    calls: list[tuple[tuple[object, ...], str]] = [
        (("verify", "--folder", folder), "no manifest is kept"),
        (("verify", "nope", "--folder", folder), "no manifest nope"),
        (("verify", broken, "--folder", folder), "is not a model manifest"),
        (("verify",), "--folder"),
        (("add", folder), "--name"),
        (("add", tmp_path / "absent", "--name", "m"), "is not a folder"),
        (("add", folder, "--name", "m", "--argument", "x"), "KEY=VALUE"),
        (("add", folder, "--name", "m", "--argument", "=x"), "KEY=VALUE"),
        (("add", folder, "--name", "m", "--argument", "a=1", "--argument", "a=2"), "twice"),
        (("add", folder, "--name", "a b"), "cannot be used: name"),
        (("add", folder, "--name", "m", "--to", "x", "--data", "y"), "not both"),
    ]
    for call, says in calls:
        code, out, err = run(*call)
        assert (code, out, says in err) == (64, "", True), (call, err)
    run("add", folder, "--name", "one")
    assert run("verify", "one", "--folder", tmp_path / "absent")[0] == 64
    run("add", folder, "--name", "two")
    code, _, err = run("verify", "--folder", folder)
    assert (code, "name one of the manifests: one, two" in err) == (64, True)


def test_a_link_that_leaves_the_folder_is_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    (folder / "more.bin").symlink_to(tmp_path / "outside")
    code, out, err = run("add", folder, "--name", "m")
    assert (code, out) == (1, "")
    assert "more.bin" in err
    assert "leaves the folder" in err


def test_long_work_says_how_far_it_is(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "hashed" not in run("add", folder, "--name", "m")[2]
    monkeypatch.setattr(model, "_SAY_AFTER_S", 0)
    assert "GB: model.onnx" in run("verify", "--folder", folder)[2]


class _Gateway(BaseHTTPRequestHandler):
    keys: ClassVar[list[str | None]] = []
    told: ClassVar[Any] = None

    def do_GET(self) -> None:
        self.keys.append(self.headers["Authorization"])
        self.send_response(200 if self.headers["Authorization"] == "Bearer mine" else 401)
        self.end_headers()
        self.wfile.write(json.dumps(self.told).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[str]:
    _Gateway.keys.clear()
    with HTTPServer(("127.0.0.1", 0), _Gateway) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_list_shows_what_is_kept_and_what_is_offered(
    run: Run, folder: Path, tmp_path: Path, gateway: str
) -> None:
    assert run("list")[1].startswith("no manifest is kept here")
    made = json.loads(run("add", folder, "--name", "skills-1", "--json")[1])["model_id"]
    (tmp_path / ".cocoon" / "models" / "odd.json").write_text("{")
    _Gateway.told = {"data": [{"id": "skills-1", "cocoon": {"model_ids": {made: 2, "cd" * 32: 1}}}]}
    code, out, err = run("list", "--gateway", gateway, "--key", "mine")
    assert code == 0
    assert "odd.json is not a model manifest" in err
    assert out.splitlines() == [
        "manifests",
        f"  skills-1  {made}  onnxruntime-cpu  int8-weights  3 files, 1,056,646 bytes",
        "offered",
        f"  skills-1  {made}  2 providers  its manifest is kept here",
        f"  skills-1  {'cd' * 32}  1 provider  no manifest of it is kept here",
    ]
    told = json.loads(run("list", "--gateway", f"{gateway}/v1", "--key", "mine", "--json")[1])
    assert [one["model_id"] for one in told["manifests"]] == [made]
    assert [one["providers"] for one in told["offered"]] == [2, 1]
    assert json.loads(run("list", "--json")[1])["offered"] is None


def test_this_network_s_key_goes_to_no_other_gateway(
    run: Run, tmp_path: Path, gateway: str
) -> None:
    kept = DataFolder(tmp_path / ".cocoon")
    kept.prepare()
    kept.api_key.write_text("mine")
    code, out, err = run("list", "--gateway", gateway)
    assert (code, out, "--key" in err) == (1, "", True)
    assert _Gateway.keys == [None]


@pytest.mark.parametrize("told", [None, [], {}, {"data": [{}]}, {"data": [{"id": "m"}]}])
def test_a_gateway_that_answers_something_else_is_refused(
    run: Run, gateway: str, told: Any
) -> None:
    _Gateway.told = told
    code, out, err = run("list", "--gateway", gateway, "--key", "mine")
    assert (code, out, "no list of models" in err) == (1, "", True)


def test_a_gateway_that_is_away_is_named(run: Run) -> None:
    code, _, err = run("list", "--gateway", "http://127.0.0.1:9")
    assert (code, "http://127.0.0.1:9" in err) == (1, True)
