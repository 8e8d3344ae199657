"""The one way to publish durably: to a named stream, acknowledged, within a time limit.

A publish that "failed" may have landed: repeat it with the same message id.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import nats.errors
import nats.js.errors

from cocoon.kernel.errors import Fatal, Unavailable

if TYPE_CHECKING:
    from nats.js import JetStreamContext

MAX_PAYLOAD_BYTES = 1_048_576  # the server's max_payload


async def publish_durable(
    js: JetStreamContext,
    subject: str,
    body: bytes,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 5.0,
    *,
    stream: str,
    message_id: str | None = None,
) -> int:
    """Publish and wait for the stream's acknowledgement; return the sequence.

    Raises Unavailable (unknown outcome, the stream is full, no such stream yet) or Fatal (the
    broker refuses the message for good).
    """
    sent = dict(headers or {})
    if message_id is not None:
        sent["Nats-Msg-Id"] = message_id
    try:
        ack = await js.publish(subject, body, timeout=timeout_s, stream=stream, headers=sent)
    except nats.errors.MaxPayloadError:
        raise Fatal("this message is larger than the bus carries") from None
    except nats.js.errors.APIError as error:
        if error.code == 400:
            raise Fatal(f"{stream} refused a message (code {error.err_code})") from None
        raise Unavailable(f"{stream} took no message (code {error.err_code})") from None
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise Unavailable(f"{stream} did not acknowledge ({type(error).__name__})") from None
    return int(ack.seq)
