"""The files of the spool before it was a journal: one a result, its head and then its response.

An agent that is upgraded finds unpaid results in them. They move into the journal, once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field

from cocoon.contracts.base import Contract, Count, Hex16, Hex32
from cocoon.contracts.events import Epoch
from cocoon.kernel import canonical
from services.provider.journal import SpoolHead

MAX_HEAD_BYTES: Final = 4096


class _Head(Contract):
    """The first line."""

    job_id: Hex16
    epoch: Epoch
    req_hash: Hex32
    receipt: Annotated[str, Field(pattern=r"^[0-9a-f]{840}$")]
    blob_hash: Hex32
    response_bytes: Count


def read_spool_file(path: Path) -> tuple[SpoolHead, bytes] | None:
    """A result, or None if the file is damaged. Raises OSError."""
    with path.open("rb") as file:
        line = file.readline(MAX_HEAD_BYTES)
        try:
            head = _Head.model_validate(canonical.loads_object(line.rstrip(b"\n")))
        except ValueError:  # pydantic's ValidationError is one
            return None
        response = file.read(head.response_bytes + 1)
    if len(response) != head.response_bytes:
        return None
    if hashlib.sha256(response).hexdigest() != head.blob_hash:
        return None
    return SpoolHead(**head.model_dump()), response
