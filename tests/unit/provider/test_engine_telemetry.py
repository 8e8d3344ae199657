"""The embedded engine tells nobody that it runs: nothing below HOME, one place that imports it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LOADS = {
    "the provider's engine": """
import sys
from pathlib import Path
from cocoon.kernel.clock import SystemRandomness
from services.provider.backends.onnx import OnnxBackend
OnnxBackend(Path(sys.argv[1]) / "models/skills-1", queue_limit=1, randomness=SystemRandomness())
""",
    "the evaluator": """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1] + "/models/training")
import evaluate
evaluate.SkillsEngine(Path(sys.argv[1]) / "models/skills-1")
""",
}


@pytest.mark.parametrize("script", LOADS.values(), ids=LOADS)
def test_loading_the_model_leaves_home_empty(script: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "XDG_"))}
    subprocess.run(
        [sys.executable, "-B", "-c", script, str(ROOT)],
        env={**environment, "HOME": str(tmp_path)}, cwd=ROOT, check=True, timeout=60,
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.rglob("*")) == []


def test_onnxruntime_is_imported_where_its_telemetry_is_switched_off() -> None:
    found = {
        file.relative_to(ROOT).as_posix()
        for top in ("libs", "services", "models", "benchmarks", "infra", "tests")
        for file in (ROOT / top).rglob("*.py")
        if re.search(r"^\s*(import|from) onnxruntime\b", file.read_text(), re.MULTILINE)
    }
    assert found == {
        "services/provider/backends/runtime.py", "models/training/evaluate.py",
        "models/minilm/reference.py",
    }  # fmt: skip
