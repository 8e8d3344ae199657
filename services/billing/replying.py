"""Work to a Reply: every refusal of the error tree is one, and names no value."""

from __future__ import annotations

from collections.abc import Awaitable

from pydantic import ValidationError

from cocoon.contracts.messages import ErrorBody, Reply
from cocoon.kernel.errors import BadRequest, CocoonError


async def replied(work: Awaitable[str]) -> Reply:
    """The answer's data, or why there is none."""
    try:
        return Reply(ok=True, data=await work)
    except ValidationError as error:
        fields = ", ".join(str(part) for e in error.errors() for part in e["loc"])
        failed: CocoonError = BadRequest(f"the request is not of its form: {fields}")
    except CocoonError as error:
        failed = error
    except ValueError:
        failed = BadRequest("the request is not JSON of the form that this verb takes")
    return Reply(
        ok=False,
        error=ErrorBody(
            status=failed.http_status,
            code=failed.code,
            message=failed.message[:1000],
            retry_after_s=failed.retry_after_s,
        ),
    )
