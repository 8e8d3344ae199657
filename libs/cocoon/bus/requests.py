"""Asking a service over core NATS and reading its Reply: operators' and providers' requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import nats.errors

from cocoon.contracts.base import Contract
from cocoon.contracts.messages import Reply
from cocoon.kernel.errors import Unavailable, error_for_status

if TYPE_CHECKING:
    from nats.aio.client import Client


async def ask(nc: Client, subject: str, body: Contract | None = None, timeout_s: float = 5) -> str:
    """Send a request and return the reply's `data`.

    Raises the tree's error that the service answered, or Unavailable if nobody answered.
    """
    payload = body.to_canonical() if body is not None else b"{}"
    try:
        message = await nc.request(subject, payload, timeout=timeout_s)
    except nats.errors.NoRespondersError:
        raise Unavailable(
            f"nobody answers {subject}; is the network up? See `./cocoon status`"
        ) from None
    except (nats.errors.Error, TimeoutError, OSError):
        raise Unavailable(f"{subject} was not answered within {timeout_s:.0f} s") from None
    reply = Reply.model_validate_json(message.data)
    if reply.ok:
        return reply.data
    error = reply.error
    if error is None:
        raise Unavailable(f"{subject} refused without a reason")
    raise error_for_status(
        error.status, error.message, code=error.code, retry_after_s=error.retry_after_s
    )
