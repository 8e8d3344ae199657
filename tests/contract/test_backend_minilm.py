"""Both engines for embeddings keep their contract, on the real all-MiniLM-L6-v2."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cocoon.chat.embeddings import floats
from cocoon.devnet import minilm
from cocoon.kernel.errors import (
    BadRequest,
    CocoonError,
    ConfigurationError,
    RateLimited,
    Unavailable,
)
from cocoon.models.describing import describe_folder
from cocoon.models.kept import load
from cocoon.models.verifying import verify
from services.provider.backends.base import Embedder
from services.provider.backends.onnx_embeddings import OnnxEmbedder
from services.provider.backends.openai_compatible import OpenAICompatibleEmbedder
from services.provider.settings import SHIPPED_MODEL
from tests.contract.embedder_contract import MODEL, EmbedderContract, cosine, request, vectors
from tests.support.engine_server import EngineServer
from tests.support.minilm import need_minilm
from tests.support.network import ROOT

REFERENCE = ROOT / "tests" / "vectors" / "minilm.json"


class TestOnnxEmbedder(EmbedderContract):
    @pytest.fixture
    async def embedder(self) -> AsyncIterator[Embedder]:
        made = OnnxEmbedder(need_minilm(), queue_limit=8)
        await made.start()
        yield made
        await made.close()

    async def test_it_gives_the_published_weights_vectors(self, embedder: Embedder) -> None:
        """The vectors of models/minilm/reference.py: float64, from the weights as published."""
        for text, expected in json.loads(REFERENCE.read_bytes()).items():
            (made,) = await vectors(embedder, text)
            assert cosine(made, expected) > 0.998

    async def test_a_full_queue_is_busy(self, embedder: Embedder) -> None:
        waiting = [
            asyncio.create_task(embedder.embed(request(*["word " * 50] * 8), max_input_tokens=9999))
            for _ in range(8)
        ]
        await asyncio.sleep(0)
        with pytest.raises(RateLimited):
            await vectors(embedder, "x")
        waiting[0].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert sum(not task.cancelled() for task in waiting) == 7
        await vectors(embedder, "x")

    async def test_closing_ends_what_waits(self, embedder: Embedder) -> None:
        waiting = [
            asyncio.create_task(
                embedder.embed(request(*["word " * 50] * 64), max_input_tokens=9999)
            )
            for _ in range(4)
        ]
        await asyncio.sleep(0)
        await embedder.close()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert any(isinstance(error, Unavailable) for error in ended)
        assert all(isinstance(error, Unavailable) for error in ended)

    def test_a_model_for_chat_is_a_configuration_error(self) -> None:
        with pytest.raises(ConfigurationError, match="not that of a model for embeddings"):
            OnnxEmbedder(SHIPPED_MODEL, queue_limit=1)


def test_the_built_folder_is_what_the_committed_manifest_names() -> None:
    folder = need_minilm()
    manifest = load(minilm.MANIFEST)
    verify(manifest, folder)
    assert describe_folder(folder, minilm.NAME) == manifest
    assert (manifest.kind, manifest.arguments["context_tokens"]) == ("embeddings", "256")
    assert hashlib.sha256(minilm.MANIFEST.read_bytes()).hexdigest() == manifest.model_id


def test_the_installers_hashes_are_the_manifests() -> None:
    listed = (ROOT / "models" / "minilm" / "SHA256SUMS").read_text().split()
    named = {file.path: file.sha256 for file in load(minilm.MANIFEST).files}
    assert dict(zip(listed[1::2], listed[::2], strict=True)) == named


def test_a_folder_that_was_changed_is_not_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(need_minilm(), folder)
    with (folder / "model.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"\x01")
    with pytest.raises(ConfigurationError, match="other content"):
        verify(load(minilm.MANIFEST), folder)


class TestOpenAICompatibleEmbedder(EmbedderContract):
    @pytest.fixture
    async def server(self) -> AsyncIterator[tuple[EngineServer, str]]:
        engine = OnnxEmbedder(need_minilm(), queue_limit=64)
        await engine.start()
        server = EngineServer(engine, MODEL)
        async with server.serve() as url:
            yield server, url
        await engine.close()

    @pytest.fixture
    async def embedder(self, server: tuple[EngineServer, str]) -> AsyncIterator[Embedder]:
        made = OpenAICompatibleEmbedder(server[1], MODEL, context_tokens=256, queue_limit=8)
        await made.start()
        yield made
        await made.close()

    async def test_it_is_the_embedded_engines_vector_exactly(self, embedder: Embedder) -> None:
        own = OnnxEmbedder(need_minilm(), queue_limit=1)
        await own.start()
        assert await vectors(own, "exactly") == await vectors(embedder, "exactly")
        await own.close()

    async def test_vectors_are_put_in_order_by_their_index(
        self, server: tuple[EngineServer, str], embedder: Embedder
    ) -> None:
        expected = await vectors(embedder, "one", "two", "three")
        server[0].fault = "mixed"
        assert await vectors(embedder, "one", "two", "three") == expected

    @pytest.mark.parametrize(
        ("fault", "error"),
        [
            ("400", BadRequest),
            ("429", RateLimited),
            ("500", Unavailable),
            ("404", Unavailable),
            ("garbage", Unavailable),
            ("no_usage", Unavailable),
            ("fewer", Unavailable),
            ("infinite", Unavailable),
            ("shorter", Unavailable),
        ],
    )
    async def test_a_failing_server_is_an_error_without_its_text(
        self, server: tuple[EngineServer, str], embedder: Embedder, fault: str,
        error: type[CocoonError],
    ) -> None:  # fmt: skip
        server[0].fault = fault
        with pytest.raises(error) as caught:
            await embedder.embed(request("canary", "two"), max_input_tokens=99)
        assert "quotes" not in caught.value.message
        assert "canary" not in caught.value.message
        server[0].fault = ""
        made = await embedder.embed(request("canary"), max_input_tokens=99)
        assert len(floats(made.vectors[0])) == 384

    async def test_only_what_is_needed_is_passed_on(
        self, server: tuple[EngineServer, str], embedder: Embedder
    ) -> None:
        asked = request("x", user="me", encoding_format="base64")
        await embedder.embed(asked, max_input_tokens=99)
        assert server[0].bodies[-1] == {
            "model": MODEL, "input": ["x"], "encoding_format": "float",
        }  # fmt: skip
