"""No weights are served that were not checked: an agent with other files than its manifest ends."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from cocoon.bus.service import Stop
from cocoon.kernel.clock import SystemRandomness
from cocoon.kernel.errors import ConfigurationError
from cocoon.models import ModelManifest
from cocoon.models.describing import describe_folder
from cocoon.models.kept import keep
from services.provider import weights
from services.provider.backends import making
from services.provider.backends.onnx import OnnxBackend
from services.provider.settings import SHIPPED_MODEL, ProviderSettings
from tests.support.engine_server import EngineServer
from tests.support.provider_world import ProviderWorld, end


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    shutil.copytree(SHIPPED_MODEL, made)
    return made


@pytest.fixture
def given(tmp_path: Path, folder: Path) -> dict[str, Any]:
    """Settings with a manifest: of another quantisation, so that its id is its own."""
    made = describe_folder(folder, "skills-1", quantisation="as-given")
    keep(made, tmp_path / "manifest.json")
    return {"model_dir": folder, "model_manifest_file": tmp_path / "manifest.json"}


def kept(given: dict[str, Any], **changes: Any) -> ModelManifest:
    """The same manifest with changes, in its place."""
    place = given["model_manifest_file"]
    value = {**describe_folder(SHIPPED_MODEL, "skills-1").model_dump(mode="json"), **changes}
    made = ModelManifest.model_validate(value)
    keep(made, place, force=True)
    return made


async def refused(world: ProviderWorld, **settings: Any) -> str:
    with pytest.raises(ConfigurationError) as error:
        async with world.agent(**settings):
            pass
    assert world.offer is None
    return error.value.message


async def test_a_model_that_is_its_manifest_s_is_offered_under_that_id(
    world: ProviderWorld, given: dict[str, Any]
) -> None:
    async with world.agent(**given):
        assert world.offer is not None
        assert world.offer.model_id == kept(given, quantisation="as-given").model_id
        assert (await world.ask(max_output=40)).raw_receipt


async def test_the_command_s_manifest_starts_a_provider(
    world: ProviderWorld, folder: Path, tmp_path: Path
) -> None:
    made = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cocoon.cli", "model", "add", str(folder), "--name", "mine",
        "--argument", "threads=1", "--data", str(tmp_path / "net"), "--json",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    told = json.loads((await made.communicate())[0])
    process = await world.process(model_dir=folder, model_manifest_file=told["file"])
    try:
        assert world.offer is not None
        assert (world.offer.name, world.offer.model_id) == ("mine", told["model_id"])
        assert (await world.ask(max_output=40)).raw_receipt
    finally:
        assert await end(process) == 0


async def test_a_folder_s_own_description_that_no_manifest_takes_is_a_sentence(
    world: ProviderWorld, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "quantisation": "two words"}))
    assert "no manifest takes: quantisation" in await refused(world, model_dir=folder)


@pytest.mark.parametrize("at", [0, 500_000, -1])
async def test_one_byte_that_differs_stops_the_agent_before_its_engine_loads(
    world: ProviderWorld, given: dict[str, Any], folder: Path, at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    loaded: list[object] = []
    monkeypatch.setattr(making, "OnnxBackend", lambda *a, **k: loaded.append(a))
    content = bytearray((folder / "model.onnx").read_bytes())
    content[at] ^= 1
    (folder / "model.onnx").write_bytes(content)
    assert "'model.onnx' has other content" in await refused(world, **given)
    assert loaded == []


async def test_the_process_says_which_file_and_ends_with_1(
    world: ProviderWorld, given: dict[str, Any], folder: Path
) -> None:
    (folder / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(AssertionError, match=r"tokenizer\.json' has 2 bytes"):
        await end(await world.process(**given))


async def test_files_beside_the_manifest_s_and_files_it_does_not_name_stop_it(
    world: ProviderWorld, given: dict[str, Any], folder: Path
) -> None:
    (folder / "model.onnx_data").write_bytes(b"more")
    assert "'model.onnx_data' is not in the manifest" in await refused(world, **given)
    (folder / "model.onnx_data").unlink()
    files = describe_folder(folder, "m").model_dump(mode="json")["files"]
    kept(given, files=[file for file in files if file["path"] != "model.onnx"])
    assert "model.onnx is missing" in await refused(world, **given)


@pytest.mark.parametrize(
    ("changes", "settings", "says"),
    [
        ({"engine": "vllm"}, {}, "engine vllm"),
        ({"arguments": {"context_tokens": "64"}}, {}, "context_tokens is 64"),
        ({"name": "other"}, {"model_name": "skills-1"}, "is of other"),
    ],
)
async def test_a_manifest_that_states_something_else_than_runs_stops_it(
    world: ProviderWorld, given: dict[str, Any], changes: dict[str, Any],
    settings: dict[str, Any], says: str,
) -> None:  # fmt: skip
    kept(given, **changes)
    assert says in await refused(world, **given, **settings)


async def test_a_server_s_folder_is_hashed_when_its_operator_names_it(
    world: ProviderWorld, given: dict[str, Any], folder: Path
) -> None:
    made = kept(given, engine="vllm", arguments={"model": "served-name", "context_tokens": "640"})
    engine = OnnxBackend(SHIPPED_MODEL, queue_limit=4, randomness=SystemRandomness())
    await engine.start()
    server = EngineServer(engine, "served-name")
    try:
        async with server.serve() as url:
            settings = {**given, "backend_url": url, "backend_context_tokens": 640}
            async with world.agent(**settings):
                assert world.offer is not None
                assert (world.offer.name, world.offer.model_id) == ("skills-1", made.model_id)
                assert (await world.ask(max_output=40)).raw_receipt
                assert server.bodies[0]["model"] == "served-name"
            world.offer = None
            without = {key: value for key, value in settings.items() if key != "model_dir"}
            assert "nobody looked at them" in await refused(world, **without)
            del settings["model_manifest_file"]
            assert "only against a manifest" in await refused(world, **settings)
            (folder / "config.json").write_text("{}")
            settings = {**given, "backend_url": url, "backend_context_tokens": 640}
            assert "'config.json' has 2 bytes" in await refused(world, **settings)
    finally:
        await engine.close()


async def test_a_server_s_manifest_without_files_states_its_engine(
    world: ProviderWorld, given: dict[str, Any]
) -> None:
    made = kept(given, engine="sglang", files=[], tokenizer_sha256=None, arguments={})
    settings = ProviderSettings(
        **world.settings(
            model_manifest_file=given["model_manifest_file"], backend_url="http://[::1]:9"
        )
    )
    assert await weights.checked_manifest(settings.config().models[0], Stop()) == made


async def test_hashing_says_how_far_it_is_and_ends_when_the_process_is_to_end(
    world: ProviderWorld, given: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[int, int]] = []
    stop = Stop()
    loop = asyncio.get_running_loop()

    class Log:
        def info(self, event: str, **fields: Any) -> None:
            if event == "model_hashing":
                said.append((fields["offset"], fields["size_bytes"]))
                asyncio.run_coroutine_threadsafe(ended(), loop).result()

    async def ended() -> None:
        stop()
        for _ in range(3):
            await asyncio.sleep(0)

    monkeypatch.setattr(weights, "PROGRESS_S", 0)
    monkeypatch.setattr(weights, "_log", Log())
    settings = ProviderSettings(**world.settings(**given))
    assert await weights.checked_manifest(settings.config().models[0], stop) is None
    total = sum(
        (folder / name).stat().st_size for name in ("config.json", "model.onnx", "tokenizer.json")
    )
    assert said == [((folder / "config.json").stat().st_size, total)]


async def test_a_folder_for_another_kind_than_is_stated_is_refused(world: ProviderWorld) -> None:
    said = await refused(world, model_kind="embeddings")
    assert said.startswith("the manifest is of a model for chat and the settings say")


async def test_a_configuration_that_its_engine_cannot_read_is_a_sentence(
    world: ProviderWorld, folder: Path
) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "context_length": "long"}))
    said = await refused(world, model_dir=folder)
    assert said == "the files of skills-1 hold what their engine cannot read (ValueError)"
