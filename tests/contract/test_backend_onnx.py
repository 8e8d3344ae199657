"""The embedded engine keeps the backends' contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cocoon.kernel.clock import SystemRandomness
from cocoon.kernel.errors import ConfigurationError, RateLimited
from services.provider.backends.base import Backend
from services.provider.backends.onnx import OnnxBackend
from services.provider.settings import SHIPPED_MODEL
from tests.contract.backend_contract import BackendContract, collect, request


class TestOnnxBackend(BackendContract):
    @pytest.fixture
    async def backend(self) -> AsyncIterator[Backend]:
        made = OnnxBackend(SHIPPED_MODEL, queue_limit=8, randomness=SystemRandomness())
        await made.start()
        yield made
        await made.close()

    async def test_a_full_queue_is_busy(self, backend: Backend) -> None:
        waiting = [
            backend.generate(request(), max_input_tokens=400, max_output_tokens=200)
            for _ in range(8)
        ]
        for outputs in waiting:
            await anext(outputs)
        with pytest.raises(RateLimited):
            await collect(backend, request())
        for outputs in waiting:
            await outputs.aclose()
        await collect(backend, request())

    async def test_a_folder_without_a_model_is_a_configuration_error(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError):
            OnnxBackend(tmp_path, queue_limit=1, randomness=SystemRandomness())
