"""What a job's client is told when it ends without a response. Pure; it decides no end itself."""

from __future__ import annotations

from typing import Final

from cocoon.contracts.messages import ErrorBody
from cocoon.kernel.errors import (
    CocoonError,
    Conflict,
    DeadlineExceeded,
    Unavailable,
    error_for_status,
)

# The client's sealing is out of date: it refreshes its directory and seals again, once.
RESEAL_CODES: Final = frozenset(
    {"unknown_key", "wrong_policy", "no_provider_recipient", "no_provider_attestation"}
)


def client_error(body: ErrorBody | None, refusal_code: str = "") -> CocoonError:
    """The error a client sees for a refusal of the matcher; outdated sealing becomes `reseal`.

    `refusal_code` is what the last provider said: it is nearer to the cause than a matcher that
    only knows that nobody is left.
    """
    if (body is not None and body.code in RESEAL_CODES) or refusal_code in RESEAL_CODES:
        return Conflict(
            "the request is sealed to keys or a policy that are no longer current; fetch the "
            "directory again and seal it anew, with a new job id",
            code="reseal",
        )
    if refusal_code == "expired":
        return DeadlineExceeded("the request's not_after has passed; seal it again", code="expired")
    if body is None:
        return Unavailable("the job ended without a result; send it again", code="job_failed")
    return error_for_status(
        body.status, body.message, code=body.code, retry_after_s=body.retry_after_s
    )


def idempotency_mismatch() -> CocoonError:
    """The job that a key names asked something else."""
    return Conflict(
        "this Idempotency-Key was used with another request; use a new key, or send the same "
        "sealed bytes again",
        code="idempotency_mismatch",
    )


def provider_lost() -> CocoonError:
    """The provider of a stream that had begun is gone."""
    return Unavailable(
        "the provider was lost after the first byte; GET /v1/jobs/ID says what was charged",
        code="provider_lost",
    )


def response_lost() -> CocoonError:
    """Neither the frames nor SEALED have the rest."""
    return Unavailable(
        "the response was lost on its way; GET /v1/jobs/ID says what was charged, and "
        "GET /v1/jobs/ID/response reads it again",
        code="response_lost",
    )
