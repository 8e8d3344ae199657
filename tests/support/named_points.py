"""A service that dies, or kills a server, at a named point: `named_points FOLDER NAME MODULE`.

The service is the product's own; what it calls at its edges is wrapped by name. A test arms a
point by a file `armed-NAME`; at the n-th passage the file becomes `fired-NAME` (so nobody dies
twice) and SIGKILL goes out, before anything else happens.
"""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocoon.kernel.clock import SystemClock
from cocoon.kernel.lean import without

if TYPE_CHECKING:
    from nats.aio.client import Client

SELF = "self"
_FLUSH_S, _DEATH_S = 2.0, 1.0
Hook = Callable[..., Awaitable[Any]]


class Points:
    """The points of one process. `passes` returns unless this passage is the armed one."""

    def __init__(self, folder: Path, name: str) -> None:
        self._armed, self._fired = folder / f"armed-{name}", folder / f"fired-{name}"
        self._count: dict[str, int] = {}
        self._pid = os.getpid()

    def due(self, point: str) -> dict[str, Any] | None:
        """The plan, if it is this point's turn now; it counts as fired from then on."""
        if os.getpid() != self._pid:
            return None
        try:
            plan: dict[str, Any] = json.loads(self._armed.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        if plan["at"] != point:
            return None
        seen = self._count[plan["id"]] = self._count.get(plan["id"], 0) + 1
        if seen < plan["on"]:
            return None
        self._armed.rename(self._fired)
        return plan

    def passes(self, point: str) -> None:
        plan = self.due(point)
        if plan is not None:
            kill(plan)

    async def passes_written(self, point: str, nc: Client) -> None:
        """The same, once the server has what was published before."""
        plan = self.due(point)
        if plan is not None:
            await nc.flush(timeout=_FLUSH_S)  # type: ignore[no-untyped-call]
            kill(plan)

    async def passes_within(self, point: str, work: Callable[[], Awaitable[Any]]) -> Any:
        """Do the work; at this point's turn the kill comes while the server has the question."""
        plan = self.due(point)
        if plan is None:
            return await work()
        running = asyncio.ensure_future(work())
        await asyncio.sleep(plan.get("after_s", 0.0005))
        kill(plan)
        return await running


def kill(plan: dict[str, Any]) -> None:
    """SIGKILL to this process or to the server that the plan names, all its processes."""
    if plan["kill"] == SELF:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # nothing more happens here
    pid = int(plan["kill"])
    os.killpg(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + _DEATH_S
    while time.monotonic() < deadline_s:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return


class SkewedClock(SystemClock):
    """A wall clock that is wrong by what a file says, at any moment."""

    file = Path()

    def now_ms(self) -> int:
        try:
            return super().now_ms() + int(self.file.read_text())
        except (FileNotFoundError, ValueError):
            return super().now_ms()


def around(where: Any, name: str, hook: Callable[[Hook], Hook]) -> None:
    """Replace `where.name` by what `hook` makes of it."""
    original = getattr(where, name)
    setattr(where, name, wraps(original)(hook(original)))


def _of_log(points: Points) -> None:
    """Every append of this process."""
    from cocoon.eventlog import append

    def hook(original: Hook) -> Hook:
        async def append_once(*arguments: Any) -> Any:
            points.passes("before the transaction")
            done = await points.passes_within(
                "within the transaction", lambda: original(*arguments)
            )
            points.passes("after the commit")
            return done

        return append_once

    around(append, "append_once", hook)


def _of_matcher(points: Points) -> None:
    from services.matcher import main

    _of_log(points)
    make = main._news

    def _news(nc: Any) -> Any:
        publish = make(nc)

        async def told(gateway_id: str, job_id: str, update: Any, traceparent: str) -> None:
            await publish(gateway_id, job_id, update, traceparent)
            if update.kind in ("matched", "committed"):
                await points.passes_written(f"after publishing {update.kind}", nc)

        return told

    main._news = _news


def _of_gateway(points: Points) -> None:
    from services.gateway import decide, handlers, run

    def asks(original: Hook) -> Hook:
        async def publish(self: Any, subject: str, *rest: Any) -> Any:
            asking = subject.endswith(".request_job")
            if asking:
                points.passes("before the matcher is asked")
            done = await original(self, subject, *rest)
            if asking:
                await points.passes_written("after the matcher is asked", self.nc)
            return done

        return publish

    def sends(original: Hook) -> Hook:
        async def _send(self: Any, parts: Any, *, last: bool = False) -> Any:
            if last:
                points.passes("before the answer's end")
            return await original(self, parts, last=last)

        return _send

    around(handlers.Gateway, "publish", asks)
    around(run.JobRun, "_send", sends)
    committed = decide.Relay.on_committed

    def on_committed(self: Any, epoch: int, provider_id: str = "") -> Any:
        points.passes("after the commit")
        return committed(self, epoch, provider_id)

    decide.Relay.on_committed = on_committed  # type: ignore[method-assign]


def _of_billing(points: Points) -> None:
    from cocoon.eventlog import relay
    from services.billing import handlers, ledger, store

    _of_log(points)

    def settles(original: Hook) -> Hook:
        async def on_message(self: Any, incoming: Any) -> None:
            await original(self, incoming)  # the worker acknowledges to the queue after this
            await points.passes_written("after publishing the ack", self._nc)
            points.passes("before the queue's ack")

        return on_message

    def writes(original: Hook) -> Hook:
        async def write(*arguments: Any) -> Any:
            done = await original(*arguments)
            points.passes("within the ledger's transaction")
            return done

        return write

    def posts(original: Hook) -> Hook:
        async def on_events(self: Any, batch: Any) -> None:
            await original(self, batch)
            points.passes("after the ledger's commit")

        return on_events

    def relays(original: Hook) -> Hook:
        async def _publish(self: Any, event: Any, inbox: str) -> None:
            await original(self, event, inbox)
            await points.passes_written("after the relay's publish", self._nc)

        return _publish

    around(handlers.Ingress, "on_message", settles)
    around(store, "write", writes)
    around(ledger.Ledger, "on_events", posts)
    around(relay._ShardRelay, "_publish", relays)


def _of_attestation(points: Points) -> None:
    from services.attestation import rpc

    _of_log(points)

    def replies(original: Hook) -> Hook:
        async def answer(*arguments: Any) -> Any:
            reply = await original(*arguments)
            if arguments[1] == "publish_bundle":
                points.passes("before the reply")
            return reply

        return answer

    around(rpc, "answer", replies)


def _of_provider(points: Points) -> None:
    from services.provider import frames, handlers, main, submitting

    vars(main)["SystemClock"] = SkewedClock

    def stores(original: Hook) -> Hook:
        async def store(self: Any, head: Any, response: bytes) -> Any:
            points.passes("before the spool")
            done = await original(self, head, response)
            points.passes("after the spool")
            return done

        return store

    def sends(original: Hook) -> Hook:
        async def send(
            self: Any, job_id: str, route: Any, offset: int, data: bytes, blob: Any = None
        ) -> None:
            await original(self, job_id, route, offset, data, blob)
            which = "last" if blob else "first" if offset == 0 else "middle"
            await points.passes_written(f"after its {which} frame", self._nc)

        return send

    def seals(original: Hook) -> Hook:
        async def put_sealed(*arguments: Any) -> Any:
            done = await original(*arguments)
            points.passes("after SEALED has it")
            return done

        return put_sealed

    def publishes(original: Hook) -> Hook:
        async def publish_durable(*arguments: Any, **named: Any) -> Any:
            done = await original(*arguments, **named)
            points.passes("after INGRESS has it")
            return done

        return publish_durable

    def replies(original: Hook) -> Hook:
        async def _answer(self: Any, message: Any, reply: Any) -> None:
            if reply.accepted:
                points.passes("before it accepts")
            await original(self, message, reply)

        return _answer

    around(submitting.Submitter, "store", stores)
    around(submitting, "put_sealed", seals)
    around(submitting, "publish_durable", publishes)
    around(frames.FrameSender, "send", sends)
    around(handlers.Handlers, "_answer", replies)
    acknowledge = submitting.Submitter.acknowledge

    def acknowledged(self: Any, ack: Any) -> None:
        points.passes("before its ack is taken")
        acknowledge(self, ack)

    submitting.Submitter.acknowledge = acknowledged  # type: ignore[method-assign]


_OF: dict[str, Callable[[Points], None]] = {
    "attestation": _of_attestation,
    "billing": _of_billing,
    "gateway": _of_gateway,
    "matcher": _of_matcher,
    "provider": _of_provider,
}


def main() -> None:
    folder, name, module = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    SkewedClock.file = folder / f"clock-{name}"
    service = module.rpartition(".")[2]
    with without("rich", *(() if service == "provider" else ("aiohttp",))):  # as its own start does
        _OF[service](Points(folder, name))
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
