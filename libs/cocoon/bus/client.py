"""nats-py's client for hot routes: fewer wake-ups a message, and a guard against forged replies.

Overrides sixteen private methods of the pinned nats-py (>=2.16,<2.17); the tests of this package
run them against a real server.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import nats.errors
from nats.aio.client import Client

from cocoon.bus.reading import over

if TYPE_CHECKING:
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

_log = logging.getLogger("cocoon.bus")
_FETCHED: Final = b"Nats-Stream"  # the server puts this header on every message that it fetches
_DELIVERED: Final = b"$JS.ACK."  # and a reply like this on every message that a consumer delivers
_WRITE_BUFFER_BYTES: Final = 1024 * 1024  # above it nats-py's flusher waits for the server
_HEADERS_BEGIN: Final = b"NATS/1.0\r\n"
_NO_LINES: Final = {10: " ", 13: " "}
_TOKEN_BYTES: Final = 10
_CLOSE_S: Final = 1.0  # for the server to take what was written last
_REFUSED: Final = "permissions violation"
_QUOTE: Final = "'"
_POLL_S: Final = 0.01
_NONCE: Final = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")

DirectHandler = Callable[["Msg"], None]
RawHandler = Callable[[bytes, bytes, bytes], None]  # reply, header block, payload


class BusClient(Client):
    """A connection whose writes go out in the loop's next turn, without waking a task for them."""

    def __init__(self) -> None:
        super().__init__()
        self._direct: dict[int, DirectHandler] = {}
        self._raw: dict[int, RawHandler] = {}
        self._writes_soon = False

    async def subscribe_direct(self, subject: str, handler: DirectHandler) -> Subscription:
        """Call `handler(message)` from the reading loop itself: no queue, no task, no waiting.

        For handlers that only put the message where it belongs. An exception is logged by its
        class, and the next message is read.
        """

        async def first_ones(message: Msg) -> None:
            self._hand(handler, message)

        subscription = await self.subscribe(subject, cb=first_ones)
        self._direct[subscription._id] = handler
        return subscription

    async def subscribe_raw(self, subject: str, handler: RawHandler) -> Subscription:
        """Like `subscribe_direct`, for a handler that does not need every message's headers read.

        `read_headers` reads a block. Not over a WebSocket, where nats-py reads.
        """

        async def too_early(message: Msg) -> None:
            """Before this returns the subject is known to nobody."""

        subscription = await self.subscribe(subject, cb=too_early)
        self._raw[subscription._id] = handler
        return subscription

    def read_headers(self, block: bytes) -> dict[str, str]:
        """A header block's names and values; none for one that cannot be read."""
        return self._headers(block) or {} if block else {}

    async def reconnect(self, timeout_s: float) -> None:
        """Come in anew, as after a lost line. Raises TimeoutError, and goes on trying."""
        await self.force_reconnect()
        async with asyncio.timeout(timeout_s):
            while not self.is_connected:  # noqa: ASYNC110 - nats-py has no event for it
                await asyncio.sleep(_POLL_S)

    # ---- nats-py's own methods ----

    async def _connect_to_server(self, s: Any) -> None:
        """As nats-py does, but a WebSocket has deadlines; see `BusWebSocket`.

        And the line of an attempt that came to nothing is closed, not left to the collector.
        """
        if s.uri.scheme not in ("ws", "wss"):
            self._cut()
            await super()._connect_to_server(s)
            return
        from cocoon.bus.websocket import BusWebSocket  # aiohttp: only who uses it loads it

        s.last_attempt = time.monotonic()
        if self._transport is not None:
            self._transport.close()  # type: ignore[no-untyped-call]
            await self._transport.wait_closed()  # type: ignore[no-untyped-call]
        transport = self._transport = BusWebSocket()
        context = self.ssl_context if s.uri.scheme == "wss" else None
        await transport.open(s.uri.geturl(), context, self.options["connect_timeout"])

    async def _process_connect_init(self) -> None:
        """As nats-py does, but a server that hangs up without a word has not let us in."""
        await super()._process_connect_init()
        if not self.is_connected:
            for task in (self._reading_task, self._ping_interval_task, self._flusher_task):
                if task is not None:
                    task.cancel()
            raise nats.errors.Error("nats: no authorization in time")

    def _connect_command(self) -> bytes:
        """As nats-py does, but only a nonce is signed: the key signs other things in other places.

        A text of its own choice would give a false bus whatever signature it needs.
        """
        nonce = self._server_info.get("nonce")
        if nonce is not None and not (isinstance(nonce, str) and _NONCE.match(nonce)):
            raise nats.errors.Error("nats: what the server asks to be signed is not a nonce")
        return super()._connect_command()

    async def _process_err(self, err_msg: str) -> None:
        """As nats-py does, but whatever the server ends a line for, another is opened.

        A login runs out, or is taken back: who may come in again is the server's to say.
        """
        if _REFUSED in err_msg.lower() or not self.is_connected:
            await super()._process_err(err_msg)
            return
        error = nats.errors.Error(f"nats: {err_msg.strip(_QUOTE)}")
        await self._error_cb(error)
        await self._process_op_err(error)

    async def _init_request_sub(self) -> None:
        await super()._init_request_sub()
        subscription = next(reversed(self._subs.values()))
        self._direct[subscription._id] = self._on_reply

    def _on_reply(self, message: Msg) -> None:
        future = self._resp_map.get(message.subject.rpartition(".")[2])
        if future is not None and not future.done():
            future.set_result(message)

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        self._direct.pop(sid, None)
        self._raw.pop(sid, None)
        super()._remove_sub(sid, max_msgs)

    async def _attempt_reconnect(self) -> None:
        """As nats-py does, but what a dead line has not taken is not waited for."""
        self._cut()
        await super()._attempt_reconnect()

    def _cut(self) -> None:
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()
        elif (abort := getattr(self._transport, "abort", None)) is not None:
            abort()

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        """As nats-py does, but a dead line is not waited for."""
        cut = asyncio.get_running_loop().call_later(_CLOSE_S, self._cut)
        try:
            await super()._close(status, do_cbs)
        finally:
            cut.cancel()

    async def _read_loop(self) -> None:
        """As nats-py does, but that messages of direct handlers never come here."""
        reader = getattr(self._transport, "_io_reader", None)
        writer = getattr(self._transport, "_io_writer", None)
        if reader is None or writer is None:  # a WebSocket
            await super()._read_loop()
            return
        reading = over(reader, writer, self._deliver)
        try:
            while whole := await reading.whole():
                await self._ps.parse(whole)
            error = nats.errors.UnexpectedEOF()
            if not (self.is_closed or self.is_reconnecting):
                await self._error_cb(error)
                await self._process_op_err(error)
        except asyncio.CancelledError:
            pass
        except Exception as broken:  # noqa: BLE001 - whatever nats-py's parser met, it is deaf now
            await self._process_op_err(broken)

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        """What was not delivered on arrival."""
        if self._may_come(sid, reply, headers):
            await super()._process_msg(sid, subject, reply, data, headers)

    def _deliver(self, sid: int, subject: bytes, reply: bytes, headers: bytes, data: bytes) -> bool:
        """Hand a message to its direct handler. Returns False if it has none."""
        handler, raw = self._direct.get(sid), self._raw.get(sid)
        if handler is None and raw is None:
            return False
        self.stats["in_msgs"] += 1
        self.stats["in_bytes"] += len(data)
        if not self._may_come(sid, reply, headers):
            return True
        try:
            if raw is not None:
                raw(reply, headers, data)
            elif handler is not None:
                found = self._headers(headers) if headers else None
                self._hand(handler, self._build_message(sid, subject, reply, data, found))
        except Exception as error:  # noqa: BLE001 - the connection serves others too
            _log.error("bus handler failed", extra={"kind": type(error).__name__})
        return True

    def _may_come(self, sid: int, reply: bytes, headers: bytes) -> bool:
        """Drop what JetStream was asked to send here and not to an inbox of ours.

        Whoever may fetch a stored message, or make a consumer, names the subject that it goes to,
        and the server does not ask whether he may publish there.
        """
        stored = (headers and _FETCHED in headers) or (reply and reply.startswith(_DELIVERED))
        if stored and not self._is_inbox(sid):
            _log.warning("bus message refused", extra={"kind": "ForgedReply"})
            return False
        return True

    def _headers(self, block: bytes) -> dict[str, str] | None:
        """A header block's names and values; nats-py's own way where a status stands in it."""
        if block.startswith(_HEADERS_BEGIN):
            return self._parse_header_lines(block[len(_HEADERS_BEGIN) :])
        try:
            self._process_headers(block).send(None)
        except StopIteration as done:
            found: dict[str, str] | None = done.value
            return found
        return None  # it waits for nothing

    def _is_inbox(self, sid: int) -> bool:
        subscription = self._subs.get(sid)
        own = self._inbox_prefix.decode()
        return subscription is not None and subscription.subject.startswith(f"{own}.")

    def _hand(self, handler: DirectHandler, message: Msg) -> None:
        try:
            handler(message)
        except Exception as error:  # noqa: BLE001 - the connection serves others too
            # by its class only: a message may be quoted in the text
            _log.error("bus handler failed", extra={"kind": type(error).__name__})

    async def _request_new_style(
        self, subject: str, payload: bytes, timeout: float = 1,  # noqa: ASYNC109 - its own name
        headers: dict[str, Any] | None = None,
    ) -> Msg:  # fmt: skip
        """As nats-py does, with one timer in place of a waiting task's wrapper."""
        if self.is_draining_pubs:
            raise nats.errors.ConnectionDrainingError
        if not self._resp_sub_prefix:
            await self._init_request_sub()
        assert self._resp_sub_prefix is not None  # noqa: S101 - for mypy
        loop = asyncio.get_running_loop()
        token, future = secrets.token_hex(_TOKEN_BYTES), loop.create_future()
        self._resp_map[token] = future
        timer = loop.call_later(timeout, _expire, future)
        try:
            await self.publish(
                subject, payload, f"{self._resp_sub_prefix.decode()}{token}", headers
            )
            message: Msg = await future
        finally:
            timer.cancel()
            del self._resp_map[token]
        return message

    async def _send_publish(
        self, subject: str, reply: str, payload: bytes, payload_size: int,
        headers: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        """As nats-py does, written in one piece."""
        if not headers:
            head = f"PUB {subject} {reply} {payload_size}\r\n".encode()
        else:
            block = _header_block(headers)
            total = len(block) + payload_size
            head = f"HPUB {subject} {reply} {len(block)} {total}\r\n".encode() + block
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += payload_size
        await self._send_command(b"%b%b\r\n" % (head, payload))
        await self._flush_pending()

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        writer = getattr(self._transport, "_io_writer", None)
        if (
            force_flush
            or writer is None
            or not self.is_connected
            or writer.transport.get_write_buffer_size() > _WRITE_BUFFER_BYTES
        ):
            return await super()._flush_pending(force_flush)
        if not self._writes_soon:
            self._writes_soon = True
            asyncio.get_running_loop().call_soon(self._write_pending)
        return None

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        self._write_pending()  # the answer stands for everything that was published before it
        await super()._send_ping(future)

    def _write_pending(self) -> None:
        self._writes_soon = False
        if self._pending and self.is_connected and self._transport is not None:
            pending, self._pending, self._pending_data_size = self._pending, [], 0
            self._transport.writelines(pending)

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        """As nats-py does; a header block that cannot be read counts as no headers.

        Whoever may publish writes these bytes, and an exception here would end the reading loop:
        the connection would stay open and hear nothing more.
        """
        try:
            return await super()._process_headers(headers)
        except (ValueError, IndexError):
            _log.warning("bus message refused", extra={"kind": "BadHeaders"})
            return None

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        """As nats-py does, without its slow look at every character."""
        found = {}
        for line in raw.decode("utf-8", "replace").split("\r\n"):
            name, colon, value = line.partition(":")
            if name and colon and name.isascii() and name.isprintable() and " " not in name:
                found[name] = value.strip()
        return found


def _expire(future: asyncio.Future[Msg]) -> None:
    if not future.done():
        future.set_exception(nats.errors.TimeoutError())


def _header_block(headers: Mapping[str, Any]) -> bytes:
    """The headers as the protocol writes them; a value's line ends become spaces."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers):
        lines = "".join(
            [f"{name}: {str(value).translate(_NO_LINES)}\r\n" for name, value in headers.items()]
        )
    return b"NATS/1.0\r\n%b\r\n" % lines.encode()
