"""One network for all tests of this folder, with lines, clocks and points for them to spoil."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.lines_of import LinedWorld, lined_world


@pytest.fixture(scope="package")
def lined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LinedWorld]:
    with lined_world(tmp_path_factory.mktemp("faulty")) as found:
        yield found


@pytest.fixture
def world(lined: LinedWorld) -> Iterator[LinedWorld]:
    try:
        yield lined
    finally:
        lined.heal()
