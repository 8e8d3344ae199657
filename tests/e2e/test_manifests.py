"""A stranger who sees an answer's model id learns from the network what exactly it names."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cocoon.client import manifest_of
from cocoon.models.describing import describe_folder
from tests.support.asking import ask, get, sql
from tests.support.network import ROOT, LiveNetwork

FOLDER = ROOT / "models" / "skills-1"


def published(network: LiveNetwork, model_id: str) -> httpx.Response:
    """The gateway's answer without a key, once the provider's publication is through."""
    for _ in range(100):
        answer = httpx.get(f"{network.gateway}/v1/manifests/{model_id}", trust_env=False)
        if answer.status_code != 404:
            return answer
        time.sleep(0.1)
    raise AssertionError("the manifest was never published")


@pytest.fixture
def answered(network: LiveNetwork) -> str:
    """The model id that an answer told."""
    with openai.OpenAI(base_url=network.sidecar, api_key=network.api_key, max_retries=0) as client:
        answer = client.chat.completions.with_raw_response.create(**ask("Reverse: cocoon"))
        return str(answer.headers["x-cocoon-model-id"])


def test_the_id_of_an_answer_leads_to_the_files_that_made_it(
    network: LiveNetwork, answered: str
) -> None:
    answer = published(network, answered)
    assert (answer.status_code, "immutable" in answer.headers["cache-control"]) == (200, True)
    assert hashlib.sha256(answer.content).hexdigest() == answered
    manifest = asyncio.run(manifest_of(network.gateway, answered))
    assert manifest == describe_folder(FOLDER, "skills-1")
    through = httpx.get(f"{network.sidecar}/manifests/{answered}", trust_env=False)
    assert through.content == answer.content
    (row,) = sql(network, "SELECT published_by FROM attestation.manifests")
    listed = get(network, "/v1/directory?model=skills-1").json()["providers"]
    assert row[0] in {entry["provider_id"] for entry in listed}


def test_the_list_of_models_tells_kind_and_quantisation_of_the_manifest(
    network: LiveNetwork, answered: str
) -> None:
    published(network, answered)
    for _ in range(100):
        (listed,) = get(network, "/v1/models").json()["data"]
        if listed["cocoon"]["kind"] is not None:
            break
        time.sleep(0.1)
    told = listed["cocoon"]
    assert (told["model_id"], told["kind"]) == (answered, "chat")
    assert told["quantisation"] == describe_folder(FOLDER, "skills-1").quantisation


def test_an_id_that_nobody_published_is_404_with_a_sentence(network: LiveNetwork) -> None:
    answer = httpx.get(f"{network.gateway}/v1/manifests/{'ab' * 32}", trust_env=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "manifest_not_found")
    assert "nobody has published" in answer.json()["error"]["message"]


def test_a_stranger_shows_keeps_and_verifies_what_a_name_is(
    network: LiveNetwork, answered: str, tmp_path: Path
) -> None:
    """On a machine that has neither the network's folder nor the model's manifest."""

    def model(*arguments: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "COCOON_ROOT": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-m", "cocoon.cli", "model", *map(str, arguments)], env=environment,
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    published(network, answered)
    at: tuple[Any, ...] = ("--gateway", network.gateway)
    shown = model("show", answered, *at)  # by id: no key is needed
    assert (shown.returncode, shown.stderr) == (0, "")
    expected = describe_folder(FOLDER, "skills-1")
    for word in (
        f"skills-1  {answered}", "kind          chat", f"engine        {expected.engine}",
        f"quantisation  {expected.quantisation}", f"tokenizer     {expected.tokenizer_sha256}",
        "argument      context_tokens=640", "files         3 files, 1,056,646 bytes",
        network.gateway, *(file.sha256 for file in expected.files),
    ):  # fmt: skip
        assert word in shown.stdout, word
    assert model("show", "skills-1", *at).returncode == 1  # a name needs one
    saved = model("show", "skills-1", *at, "--key", network.api_key, "--save", "--json")
    told = json.loads(saved.stdout)
    assert (told["model_id"], told["kind"], told["others"]) == (answered, "chat", [])
    kept = Path(told["file"])
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == answered
    assert model("verify", "skills-1", "--folder", FOLDER).returncode == 0
    copy = tmp_path / "copy"
    shutil.copytree(FOLDER, copy)
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"x")
    other = model("verify", "skills-1", "--folder", copy)
    assert (other.returncode, "model.onnx" in other.stdout) == (1, True)
    assert str(kept) in model("show", "skills-1").stdout  # and without any network
    assert model("show", "unknown", *at, "--key", network.api_key).returncode == 1
    assert "--gateway" in model("show", "ab" * 32).stderr
