"""One job at the gateway as a pure state machine: what comes in, what has to be done next.

It holds the first byte until the match is committed, keeps the response's bytes in order and
exactly once, and ends exactly once. It knows no sockets, no clocks and no plaintext.
"""

from __future__ import annotations

from typing import Final, Literal

from cocoon.contracts.messages import ErrorBody
from cocoon.kernel.errors import CocoonError, DeadlineExceeded, Unavailable
from services.gateway.actions import (
    Abandon,
    Action,
    Ask,
    CancelAtMatcher,
    CancelAtProvider,
    Dispatch,
    Fail,
    Fetch,
    Finish,
    Frame,
    LogView,
    Lookup,
    Match,
    Report,
    Send,
    Start,
    Timing,
)  # fmt: skip
from services.gateway.refusals import (
    client_error,
    idempotency_mismatch,
    provider_lost,
    response_lost,
)
from services.gateway.waits import Waits

MAX_REFUSALS: Final = 2  # of a match announced: the matcher is asked once more in between


class Relay:
    """The machine. Every `on_...` takes the monotonic time and returns the actions, in order.

    `attached`: a repeat of a run that goes on: nothing is asked of the matcher, and a cancel only
    follows once the job is known to be this gateway's and no other line here waits (`alone`).
    `buffer_limit` bounds the unsent bytes held here; what does not fit is read from SEALED.
    """

    __slots__ = (
        "_attached", "_buffer_limit", "_committed_epoch", "_existing", "_fetching", "_held",
        "_held_bytes", "_here", "_last", "_match", "_received", "_refusal", "_refusals", "_refused",
        "_started", "_stream", "_waits", "done",
    )  # fmt: skip

    def __init__(
        self, *, stream: bool, attached: bool, timing: Timing, buffer_limit: int,
        not_after_in_ms: int, now_ms: int,
    ) -> None:  # fmt: skip
        self.done = False
        self._stream = stream
        self._attached = attached
        self._here = not attached  # the job was asked of the matcher by this gateway
        self._existing = False  # the matcher has said that the log has the job
        self._buffer_limit = buffer_limit
        self._match: Match | None = None
        self._committed_epoch = 0
        self._started = False
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._received = 0  # the response's bytes in order so far, sent or held
        self._last: tuple[bytes, int] | None = None  # blob hash and size of the whole response
        self._fetching = False
        self._refusal = ""
        self._refusals = 0  # of the matcher, after it had announced a match
        self._refused: ErrorBody | None = None
        self._waits = Waits(timing, attached, not_after_in_ms, now_ms)

    # ---- what the shell asks ----

    @property
    def live_match(self) -> Match | None:
        return self._match

    @property
    def held_bytes(self) -> int:
        """The response's bytes that wait here to be let out."""
        return self._held_bytes

    @property
    def started(self) -> bool:
        """Whether status 200 has gone out."""
        return self._started

    @property
    def wake_at_ms(self) -> int:
        """When `on_time` has something to do, at the earliest."""
        asking = self._match is None and not self._attached
        return self._waits.wake_at_ms(
            asking=asking, silent=not self._received and not self._started
        )

    # ---- the matcher ----

    def begin(self) -> list[Action]:
        return [Lookup()] if self._attached else [Ask()]

    def on_matched(self, match: Match, now_ms: int) -> list[Action]:
        """A first match or the next epoch. Too late once bytes are out: the body ends there."""
        old = self._match
        if self.done or self._fetching or (old is not None and match.epoch <= old.epoch):
            return []
        self._here = True  # the matcher tells only the gateway that asked
        return self._adopt(match, now_ms)

    def _adopt(self, match: Match, now_ms: int) -> list[Action]:
        old = self._match
        actions: list[Action] = []
        if old is not None:
            actions.append(CancelAtProvider(old.provider_id, old.epoch))
        if self._started:
            if not self._attached:
                actions.append(CancelAtMatcher(match.epoch))
            return [*actions, *self._fail(provider_lost())]
        self._match = match
        self._held.clear()
        self._held_bytes = self._received = 0
        self._last = None
        self._waits.on_progress(now_ms)
        return [*actions, Dispatch(match)]

    def on_committed(self, epoch: int, provider_id: str = "") -> list[Action]:
        """The match of `epoch` is in the log, with this provider.

        Two matchers may have announced one each while the one took over from the other: only the
        log says which it is.
        """
        match = self._match
        if self.done:
            return []
        if match and match.epoch == epoch and provider_id not in ("", match.provider_id):
            return [Lookup()]
        self._committed_epoch = max(self._committed_epoch, epoch)
        return self._pump()

    def on_waiting(self, now_ms: int) -> list[Action]:
        """The matcher queues the request until a provider is free: ask rarely."""
        self._waits.on_queued(now_ms)
        return []

    def on_existing(self, same_request: bool) -> list[Action]:
        """The command has a job already: serve its response, or refuse another request for it."""
        if self.done or self._match is not None or self._attached:
            return []
        if not same_request:
            return self._fail(idempotency_mismatch())
        self._attached = self._existing = True
        self._here = False  # until the log says so
        self._waits.on_attached()
        return [Lookup()]

    def on_refused(self, error: ErrorBody | None) -> list[Action]:
        """The matcher takes no such job. After a match it may be a stale matcher's word, or its
        append failed: the log decides. Twice, with nothing in the log, it counts.
        """
        if self.done:
            return []
        if self._match is None and not self._committed_epoch and not self._existing:
            return self.on_ended(error)
        self._refused = error
        self._refusals += 1
        return [Lookup()]

    def on_ended(self, error: ErrorBody | None) -> list[Action]:
        """Refused before it began, or failed or cancelled later."""
        if self.done:
            return []
        actions: list[Action] = []
        if self._match is not None and not self._attached:
            actions.append(CancelAtProvider(self._match.provider_id, self._match.epoch))
        return [*actions, *self._fail(client_error(error, self._refusal))]

    # ---- the provider ----

    def on_dispatch(
        self, epoch: int, outcome: Literal["accepted", "busy", "refused", "silent"], code: str
    ) -> list[Action]:
        """The provider's answer to a dispatch, or none in time."""
        match = self._match
        if self.done or match is None or epoch != match.epoch or outcome == "accepted":
            return []
        if self._received or self._last is not None or self._attached:
            return []  # its bytes have come, so it runs
        self._refusal = code if outcome == "refused" else ""
        return [Report(epoch, outcome, code)]

    def on_frame(self, frame: Frame, now_ms: int) -> list[Action]:
        """Take a frame of the live epoch; others, repeats and anything after a gap are ignored."""
        match = self._match
        if (
            self.done or self._fetching or match is None or frame.epoch != match.epoch
            or frame.provider_id != match.provider_id
        ):  # fmt: skip
            return []
        skip = self._received - frame.offset
        if skip >= 0:
            data = frame.data[skip:] if skip else frame.data
            if data and self._held_bytes + len(data) <= self._buffer_limit:
                self._held.append(data)
                self._held_bytes += len(data)
                self._received += len(data)
                self._waits.on_progress(now_ms)
        if frame.last and self._last is None and frame.total >= self._received:
            self._last = (frame.blob_hash, frame.total)
        return self._pump()

    # ---- SEALED and the log ----

    def on_filled(self, data: bytes) -> list[Action]:
        """Bytes of the blob that follow those received so far."""
        if self.done or not self._fetching or self._last is None:
            return []
        total = self._last[1]
        data = data[: total - self._received]
        self._received += len(data)
        actions = self._open(total)
        if data:
            actions.append(Send(data))
        return [*actions, *self._finish()] if self._received == total else actions

    def on_fill_ended(self) -> list[Action]:
        """SEALED has no more bytes, or never had the blob."""
        if self.done or not self._fetching:
            return []
        return self._fail(response_lost())

    def on_log(self, view: LogView, now_ms: int) -> list[Action]:
        """What the log says, asked after a silence: missed updates and lost last frames."""
        if self.done or self._fetching:
            return []
        if view.ended is not None:
            return self._fail(view.ended)
        known = self._match
        self._here = self._here or view.here
        if view.match is None:
            # Announced and never committed: the matcher died or was fenced. Its successor decides.
            lost = view.absent and known is not None and not self._committed_epoch
            if lost and self._refusals >= MAX_REFUSALS:
                return self.on_ended(self._refused)
            return [Ask()] if lost and not self._attached else []
        actions: list[Action] = []
        there = (view.match.epoch, view.match.provider_id)
        if (
            known is None
            or view.match.epoch > known.epoch
            or (view.match.epoch == known.epoch and view.match.provider_id != known.provider_id)
        ):
            if view.blob_hash and not self._started:  # settled: nothing is left to dispatch
                self._match = view.match
                self._held.clear()
                self._held_bytes = self._received = 0
                self._last = None
            else:
                actions = self._adopt(view.match, now_ms)
        if self.done or self._match is None:
            return actions
        if there != (self._match.epoch, self._match.provider_id):
            return actions
        self._committed_epoch = max(self._committed_epoch, view.match.epoch)
        if view.blob_hash and view.total >= self._received:
            self._last = self._last or (view.blob_hash, view.total)
        return [*actions, *self._pump()]

    # ---- time and the client ----

    def on_time(self, now_ms: int, *, alone: bool = True) -> list[Action]:
        """Whatever is due at `now_ms`. `alone`: nobody else here waits for the job."""
        if self.done:
            return []
        late = ""
        if now_ms >= self._waits.job_ends_at:
            late = "the job took longer than the gateway allows"
        elif not self._received and not self._started and now_ms >= self._waits.first_byte_at:
            late = "no provider answered in time; send the request again"
        if late:
            cancels = self._cancel() if alone or not self._attached else []
            return [*cancels, *self._fail(DeadlineExceeded(late))]
        if self._match is None and not self._attached:
            return self._await_matcher(now_ms)
        if self._fetching:
            return []
        return [Lookup()] if self._waits.lookup_due(now_ms) else []

    def _await_matcher(self, now_ms: int) -> list[Action]:
        if self._waits.ask_due(now_ms):
            return [Ask()]
        if self._waits.matcher_is_silent(now_ms):
            silent = Unavailable(
                "the matcher does not answer; send the request again", retry_after_s=2
            )
            return [*self._cancel(), *self._fail(silent)]
        return []

    def on_disconnect(self, *, alone: bool = True) -> list[Action]:
        """The client has gone. The job goes on while another line here waits for it."""
        if self.done:
            return []
        actions = self._cancel() if alone and not self._fetching else []
        self.done = True
        return [*actions, Abandon()]

    # ---- inside ----

    def _pump(self) -> list[Action]:
        """Let out what may go out: nothing before the commit, a whole body unless it streams."""
        match = self._match
        if match is None or self._committed_epoch != match.epoch:
            return []
        last = self._last
        complete = last is not None and self._received == last[1]
        actions: list[Action] = []
        if complete or (self._stream and self._held):
            actions = self._open(self._received if complete and not self._stream else None)
        if last is None:
            return actions
        if complete:
            return [*actions, *self._finish()]
        self._fetching = True
        if not self._started:  # the stored bytes serve for all: hold none meanwhile
            self._held.clear()
            self._held_bytes = self._received = 0
        return [*actions, Fetch(match, last[0], self._received, last[1])]

    def _open(self, length: int | None) -> list[Action]:
        """Start the answer if it has not started, and empty the buffer."""
        actions: list[Action] = []
        if not self._started:
            match = self._match
            assert match is not None  # noqa: S101 - nothing is sent without a match
            self._started = True
            actions.append(Start(match, length))
            # A repeat's reader too: whoever has an answer must never be given another one.
            actions.append(Report(match.epoch, "began"))
        if self._held:
            actions.append(Send(self._held[0] if len(self._held) == 1 else b"".join(self._held)))
            self._held.clear()
            self._held_bytes = 0
        return actions

    def _finish(self) -> list[Action]:
        self.done = True
        return [Finish()]

    def _fail(self, error: CocoonError) -> list[Action]:
        self.done = True
        return [Fail(error, self._started)]

    def _cancel(self) -> list[Action]:
        if not self._here:
            return []  # the gateway that asked decides, or nobody has said whose job it is
        if self._match is None:
            return [CancelAtMatcher(0)]
        match = self._match
        return [CancelAtMatcher(match.epoch), CancelAtProvider(match.provider_id, match.epoch)]
