"""docs/limits.md says what the settings say, and every row's test exists."""

from __future__ import annotations

import re
from pathlib import Path

from services.gateway.settings import GatewaySettings

ROOT = Path(__file__).resolve().parents[3]
ROW = re.compile(r"\| `(\w+)` \| ([0-9.]+) \|.*\| `(test_\w+)` \|\n")
INTERNAL = {"stall_s", "dispatch_timeout_s", "sealed_timeout_s", "rpc_timeout_s", "directory_ttl_s",
            "key_ttl_s", "drain_s"}  # fmt: skip


def rows() -> dict[str, tuple[str, str]]:
    page = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    return {name: (default, test) for name, default, test in ROW.findall(page)}


def test_every_limit_stands_in_the_table_with_its_default() -> None:
    limits = {
        name: str(field.default)
        for name, field in GatewaySettings.model_fields.items()
        if isinstance(field.default, int | float)
        and not name.endswith("_port")
        and name not in INTERNAL
    }
    assert {name: default for name, (default, _) in rows().items()} == limits


def test_every_row_names_a_test_that_exists() -> None:
    folder = ROOT / "tests" / "integration" / "gateway"
    code = "".join(path.read_text(encoding="utf-8") for path in folder.glob("test_*.py"))
    missing = [test for _, test in rows().values() if f"def {test}(" not in code]
    assert missing == []
