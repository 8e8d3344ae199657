"""The JetStream streams and the one durable consumer, declared at deployment.

Services never declare or change them, but for the relay, which rebuilds a lost event stream.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import nats.errors

from cocoon.bus.permissions import INGRESS_DURABLE
from cocoon.contracts import subjects
from cocoon.kernel.errors import Fatal, NotFound, Unavailable

if TYPE_CHECKING:
    from nats.aio.client import Client

_NS = 1_000_000_000
# The server keeps hundreds of bytes of memory for every subject, and each message of these two
# streams has its own: both are bounded by count, too. Who is further behind reads the log.
EVENTS_WINDOW_S = 14 * 86_400
EVENTS_MAX = 100_000
EVENTS_DUPLICATES_S = 10  # message ids take memory too; the relay's fence needs none
SEALED_WINDOW_S = 3_600
SEALED_MAX = 32_768  # chunks; a response is seldom more than one
INGRESS_ACK_WAIT_S = 30
INGRESS_MAX_OF_ONE = 1024  # messages of one provider: nobody fills the queue for the others
_MADE_WITH = frozenset({"first_seq", "num_replicas", "persist_mode"})  # kept by what is there
_STREAM_NOT_FOUND, _CONSUMER_NOT_FOUND = 10059, 10014
API_TIMEOUT_S = 5.0


def events_config(shard: int, first_seq: int = 1, replicas: int = 1) -> dict[str, Any]:
    """EVENTS_<shard>: a copy of the log, so it may acknowledge before it syncs (R1 only)."""
    return {
        "name": subjects.events_stream(shard),
        "subjects": [f"evt.{shard}.>"],
        "retention": "limits",
        "storage": "file",
        "num_replicas": replicas,
        "max_age": EVENTS_WINDOW_S * _NS,
        "max_msgs": EVENTS_MAX,
        "duplicate_window": EVENTS_DUPLICATES_S * _NS,
        "discard": "old",
        "deny_delete": True,
        "first_seq": first_seq,
        **_unsynced(replicas),
    }


def _unsynced(replicas: int) -> dict[str, Any]:
    """For streams whose messages exist elsewhere: the server syncs every write of the others."""
    return {"persist_mode": "async"} if replicas == 1 else {}


def ingress_config(replicas: int = 1) -> dict[str, Any]:
    """INGRESS: results on their way to billing; a full queue refuses instead of forgetting.

    What a broker's death takes, its provider submits again: it keeps a result until billing has
    acknowledged it (docs/adr/0006).
    """
    return {
        "name": subjects.INGRESS_STREAM,
        "subjects": [subjects.PLATFORM_INGRESS],
        "retention": "workqueue",
        "storage": "file",
        "num_replicas": replicas,
        "max_bytes": 512 * 1024 * 1024,
        "max_msgs_per_subject": INGRESS_MAX_OF_ONE,
        "discard_new_per_subject": True,
        "max_msg_size": 256 * 1024,
        "duplicate_window": 120 * _NS,
        "discard": "new",
        "deny_delete": False,
        **_unsynced(replicas),
    }


def sealed_config(replicas: int = 1) -> dict[str, Any]:
    """SEALED: ciphertext in chunks, named by its digest, for an hour (docs/adr/0003)."""
    return {
        "name": subjects.SEALED_STREAM,
        "subjects": ["sealed.>"],
        "retention": "limits",
        "storage": "file",
        "num_replicas": replicas,
        "max_age": SEALED_WINDOW_S * _NS,
        "max_msgs_per_subject": 1,
        "max_msgs": SEALED_MAX,
        "max_bytes": 4 * 1024 * 1024 * 1024,
        "duplicate_window": 120 * _NS,
        "discard": "old",
        "allow_direct": True,
    }


def ingress_durable() -> dict[str, Any]:
    """Billing's pull consumer: explicit acks, redelivery after seconds, never given up.

    Its state is the broker's memory: kept on disk it could know more than a queue whose last
    writes a crash took, and would pass the next results by. Billing declares it again.
    """
    return {
        "durable_name": INGRESS_DURABLE,
        "name": INGRESS_DURABLE,
        "ack_policy": "explicit",
        "ack_wait": INGRESS_ACK_WAIT_S * _NS,
        "deliver_policy": "all",
        "max_deliver": -1,
        "max_ack_pending": 4096,
        "mem_storage": True,
        "replay_policy": "instant",
    }


async def api(nc: Client, verb: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One JetStream API request ("STREAM.INFO.EVENTS_0").

    Raises NotFound, Unavailable (no answer in time, or no JetStream) or Fatal (a refusal).
    """
    try:
        message = await nc.request(
            f"$JS.API.{verb}", json.dumps(body or {}).encode(), timeout=API_TIMEOUT_S
        )
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise Unavailable(f"JetStream did not answer {verb} ({type(error).__name__})") from None
    answer: dict[str, Any] = json.loads(message.data)
    refusal = answer.get("error")
    if refusal is None:
        return answer
    code = refusal.get("err_code")
    if code in (_STREAM_NOT_FOUND, _CONSUMER_NOT_FOUND):
        raise NotFound(f"JetStream has nothing for {verb}", code=str(code))
    if refusal.get("code") == 503:
        raise Unavailable(f"JetStream is not ready for {verb}")
    raise Fatal(f"JetStream refused {verb}: {refusal.get('description')}", code=str(code))


async def create_events_stream(nc: Client, shard: int, first_seq: int, replicas: int = 1) -> None:
    """Create EVENTS_<shard> so that its next sequence is `first_seq`. Raises Fatal if it exists."""
    config = events_config(shard, first_seq, replicas)
    await api(nc, f"STREAM.CREATE.{config['name']}", config)


async def declare_streams(nc: Client, shards: Sequence[int], replicas: int = 1) -> None:
    """Create what is missing: EVENTS_<shard>, INGRESS with billing's durable, SEALED.

    An existing stream takes the bounds of today. Raises Unavailable or Fatal.
    """
    wanted = [events_config(shard, replicas=replicas) for shard in shards]
    wanted += [ingress_config(replicas), sealed_config(replicas)]
    for config in wanted:
        try:
            found = await api(nc, f"STREAM.INFO.{config['name']}")
        except NotFound:
            await api(nc, f"STREAM.CREATE.{config['name']}", config)
            continue
        now = found["config"]
        bounds = {key: value for key, value in config.items() if key not in _MADE_WITH}
        if not bounds.items() <= now.items():
            await api(nc, f"STREAM.UPDATE.{config['name']}", {**now, **bounds})
    await declare_ingress_consumer(nc)


async def declare_ingress_consumer(nc: Client) -> None:
    """Make billing's consumer where it is missing; an older network's is left as it is.

    Raises NotFound without INGRESS, Unavailable or Fatal.
    """
    stream = subjects.INGRESS_STREAM
    try:
        await api(nc, f"CONSUMER.INFO.{stream}.{INGRESS_DURABLE}")
    except NotFound:
        await api(
            nc,
            f"CONSUMER.DURABLE.CREATE.{stream}.{INGRESS_DURABLE}",
            {"stream_name": stream, "config": ingress_durable()},
        )
