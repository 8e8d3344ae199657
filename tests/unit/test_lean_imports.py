"""Services start without what they never use; it can still be imported afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cocoon.kernel.lean import without

SEEN = """
import sys
from cocoon.kernel.lean import without
with without("aiohttp", "rich"):
    import services.{name}.main
print(sorted({{"aiohttp", "rich"}} & set(sys.modules)))
import aiohttp
"""


@pytest.mark.parametrize("name", ["attestation", "billing", "gateway", "matcher"])
def test_a_platform_service_loads_no_web_client_and_no_colours(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SEEN.format(name=name)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "[]\n"


def test_what_is_loaded_already_stays() -> None:
    before = __import__("json")
    with without("json", "a_package_that_nobody_has"):
        assert sys.modules["json"] is before
        with pytest.raises(ImportError):
            __import__("a_package_that_nobody_has")
    assert "a_package_that_nobody_has" not in sys.modules
