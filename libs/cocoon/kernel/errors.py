"""The one error tree. Handlers branch on the family only; doors use the class's HTTP shape.

CocoonError
├── Rejected            the input is wrong or not allowed; the same input fails again
│   ├── BadRequest            400  invalid_request_error
│   ├── Unauthenticated       401  authentication_error
│   ├── InsufficientFunds     402  insufficient_quota
│   ├── Forbidden             403  permission_error
│   ├── NotFound              404  not_found_error
│   ├── MethodNotAllowed      405  invalid_request_error   (Allow)
│   ├── Conflict              409  conflict_error
│   ├── TooLarge              413  invalid_request_error
│   ├── SealingError          400  invalid_request_error   (a code of CAI/1)
│   └── EvidenceRejected      502  untrusted_provider_error (a verdict code)
├── Transient           the same input may succeed later
│   ├── RateLimited           429  rate_limit_error        (Retry-After)
│   ├── Unavailable           503  service_unavailable_error
│   └── DeadlineExceeded      504  timeout_error
└── Fatal               an invariant broke or a component is unusable; park and page
    ├── LogCorrupt
    └── ConfigurationError

An error's message is written for the person who must act on it and never contains a payload.
"""

from __future__ import annotations


class CocoonError(Exception):
    """Base of every error this project raises on purpose."""

    http_status: int = 500
    openai_type: str = "api_error"
    default_code: str = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after_s = retry_after_s

    def to_openai(self) -> dict[str, dict[str, str | None]]:
        """Return the OpenAI error object: `{"error": {message, type, param, code}}`."""
        return {
            "error": {
                "message": self.message,
                "type": self.openai_type,
                "param": self.param,
                "code": self.code,
            }
        }


class Rejected(CocoonError):
    """Wrong or not allowed: the same input fails again."""

    http_status = 400
    openai_type = "invalid_request_error"
    default_code = "rejected"


class BadRequest(Rejected):
    default_code = "bad_request"


class Unauthenticated(Rejected):
    http_status = 401
    openai_type = "authentication_error"
    default_code = "invalid_api_key"


class InsufficientFunds(Rejected):
    http_status = 402
    openai_type = "insufficient_quota"
    default_code = "insufficient_funds"


class Forbidden(Rejected):
    http_status = 403
    openai_type = "permission_error"
    default_code = "forbidden"


class NotFound(Rejected):
    http_status = 404
    openai_type = "not_found_error"
    default_code = "not_found"


class MethodNotAllowed(Rejected):
    """`allowed` is the value of the answer's Allow header."""

    http_status = 405
    default_code = "method_not_allowed"

    def __init__(self, message: str, *, allowed: str = "") -> None:
        super().__init__(message)
        self.allowed = allowed


class Conflict(Rejected):
    http_status = 409
    openai_type = "conflict_error"
    default_code = "conflict"


class TooLarge(Rejected):
    http_status = 413
    default_code = "request_too_large"


class SealingError(Rejected):
    """A CAI/1 refusal; `code` is one of the codes that docs/protocol.md lists."""

    default_code = "decrypt_failed"


class EvidenceRejected(Rejected):
    """A provider's evidence failed; `code` is the verdict's code."""

    http_status = 502
    openai_type = "untrusted_provider_error"
    default_code = "evidence_rejected"


class Transient(CocoonError):
    """The same input may succeed later."""

    http_status = 503
    openai_type = "service_unavailable_error"
    default_code = "unavailable"


class RateLimited(Transient):
    http_status = 429
    openai_type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class Unavailable(Transient):
    default_code = "unavailable"


class DeadlineExceeded(Transient):
    http_status = 504
    openai_type = "timeout_error"
    default_code = "deadline_exceeded"


class Fatal(CocoonError):
    """An invariant broke or a component is unusable."""

    default_code = "fatal"


class LogCorrupt(Fatal):
    default_code = "log_corrupt"


class ConfigurationError(Fatal):
    default_code = "configuration"


_BY_CODE_FAMILY: tuple[type[CocoonError], ...] = (
    BadRequest, Unauthenticated, InsufficientFunds, Forbidden, NotFound, Conflict, TooLarge,
    EvidenceRejected, RateLimited, Unavailable, DeadlineExceeded,
)  # fmt: skip


def error_for_status(
    status: int, message: str, *, code: str | None = None, param: str | None = None,
    retry_after_s: int | None = None,
) -> CocoonError:  # fmt: skip
    """Return the tree's error for an HTTP status that a peer answered (Unavailable if unknown)."""
    for cls in _BY_CODE_FAMILY:
        if cls.http_status == status:
            return cls(message, code=code, param=param, retry_after_s=retry_after_s)
    return Unavailable(message, code=code, param=param, retry_after_s=retry_after_s)
