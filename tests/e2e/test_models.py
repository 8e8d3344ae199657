"""Who asks for a name learns which manifest answered, and anybody can hash the files again."""

from __future__ import annotations

import hashlib
import json

import openai

from cocoon.models.kept import load
from tests.support.asking import ask, get
from tests.support.network import ROOT, LiveNetwork

FOLDER = str(ROOT / "models" / "skills-1")


def test_the_id_in_an_answer_is_that_of_the_model_s_own_folder(network: LiveNetwork) -> None:
    made = network.cli("model", "add", FOLDER, "--name", "skills-1", "--json")
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    place = network.folder.models / "skills-1.json"
    assert hashlib.sha256(place.read_bytes()).hexdigest() == told["model_id"]

    (listed,) = get(network, "/v1/models").json()["data"]
    assert listed["cocoon"]["model_id"] == told["model_id"]
    assert listed["cocoon"]["model_ids"] == {told["model_id"]: 1}

    with openai.OpenAI(base_url=network.sidecar, api_key=network.api_key, max_retries=0) as client:
        whole = client.chat.completions.with_raw_response.create(**ask("Reverse: cocoon"))
        usage = whole.parse().usage
        assert usage is not None
        assert usage.model_dump()["cocoon"]["model_id"] == told["model_id"]
        with client.chat.completions.with_streaming_response.create(
            **ask("Count from 1 to 9"), stream=True
        ) as stream:
            stream.read()
    for headers in (whole.headers, stream.headers):
        assert headers["x-cocoon-model-id"] == told["model_id"]

    assert network.cli("model", "verify", "skills-1", "--folder", FOLDER).returncode == 0
    shown = json.loads(network.cli("model", "list", "--json").stdout)
    assert [one["model_id"] for one in shown["manifests"]] == [load(place).model_id]
    assert shown["offered"] == [{"name": "skills-1", "model_id": told["model_id"], "providers": 1}]
    assert "its manifest is kept here" in network.cli("model", "list").stdout
