"""The words of a job at the gateway: what decide.py's machine is told, and what it asks for."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from cocoon.kernel.errors import CocoonError


class Timing(NamedTuple):
    """How long a job waits for what, in milliseconds."""

    repeat_ask_ms: int = 1_000
    match_timeout_ms: int = 2_000
    first_byte_ms: int = 120_000
    waiting_repeat_ms: int = 5_000  # a matcher that queued the request may have died since
    stall_ms: int = 2_000  # silence after which the log is asked
    attached_lookup_ms: int = 250
    job_ms: int = 1_800_000


class Match(NamedTuple):
    """A live match: whose frames count, and what the client is told about it."""

    epoch: int
    provider_id: str
    quote_json: str
    quote_id: str
    evidence_id: str


class Frame(NamedTuple):
    """A message of sealed bytes. `total` and `blob_hash` belong to the last one only."""

    provider_id: str
    epoch: int
    offset: int
    data: bytes
    last: bool = False
    total: int = 0
    blob_hash: bytes = b""


class LogView(NamedTuple):
    """What the log says of the job: its live or last match, its end, its response."""

    match: Match | None
    ended: CocoonError | None = None
    blob_hash: bytes = b""  # of the settled response, empty before
    total: int = 0
    absent: bool = False  # the log was read and has no such job
    here: bool = False  # it is this request's own job, asked of the matcher by this gateway


class Ask(NamedTuple):
    """Send the JobRequest to the matcher (again, with the same command id)."""


class Dispatch(NamedTuple):
    match: Match


class Report(NamedTuple):
    epoch: int
    outcome: Literal["busy", "refused", "silent", "began"]
    code: str = "none"


class CancelAtMatcher(NamedTuple):
    epoch: int


class CancelAtProvider(NamedTuple):
    provider_id: str
    epoch: int


class Start(NamedTuple):
    """Send status 200 and the headers; `length` is the body's size if it is known."""

    match: Match
    length: int | None


class Send(NamedTuple):
    data: bytes


class Fetch(NamedTuple):
    """Read the response's rest from SEALED: bytes from `offset` up to `total`."""

    match: Match
    blob_hash: bytes
    offset: int
    total: int


class Lookup(NamedTuple):
    """Ask the log what has become of the job."""


class Finish(NamedTuple):
    """The body is complete."""


class Fail(NamedTuple):
    """End with an error; `truncated` = bytes went out, so the body just stops."""

    error: CocoonError
    truncated: bool


class Abandon(NamedTuple):
    """The client has gone; nobody is there to be answered."""


Action: TypeAlias = (
    Ask | Dispatch | Report | CancelAtMatcher | CancelAtProvider | Start | Send | Fetch | Lookup
    | Finish | Fail | Abandon
)  # fmt: skip
