"""docs/protocol.md must name what the code refuses and measure what the code writes."""

from __future__ import annotations

import re
from pathlib import Path

import cocoon.sealing
from cocoon.sealing import INSIDE_CODES, Status
from cocoon.sealing.padding import BUCKETS, RecordType

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "protocol.md").read_text()
SOURCES = [path.read_text() for path in Path(cocoon.sealing.__file__).parent.glob("*.py")]


def test_every_code_that_is_raised_is_listed_and_explained() -> None:
    raised = set(re.findall(r'refuse\(\s*"([a-z_]+)"', "".join(SOURCES)))
    assert raised | {"truncated"} == INSIDE_CODES
    for code in INSIDE_CODES:
        assert re.search(rf"\b{code}\b", PAGE), code


def test_the_page_names_every_record_type_status_and_bucket() -> None:
    for kind in RecordType:
        assert f"| {kind.value} | {kind.name.lower()} |" in PAGE
    for status in Status:
        assert f"{status.value} {status.name.lower()}" in PAGE
    assert "{" + ", ".join(map(str, BUCKETS)) + "}" in PAGE


def test_the_page_s_tables_are_dense_and_as_long_as_the_structures() -> None:
    ends = []
    for table in re.findall(r"(?:^\|.*\|\n)+", PAGE, flags=re.MULTILINE):
        rows = re.findall(r"^\| (\d+) \| (\d+) \| ", table, flags=re.MULTILINE)
        if not rows:
            continue
        end = 0
        for offset, size in rows:
            assert int(offset) == end
            end += int(size)
        ends.append(end)
    assert ends == [113, 96, 104, 420, 157]
