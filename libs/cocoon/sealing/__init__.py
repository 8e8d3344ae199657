"""CAI/1: end-to-end sealing between a client and an attested enclave, and its receipts.

docs/protocol.md is the specification. PyNaCl and the standard library only.
"""

from cocoon.sealing.client import (
    Recipient,
    RequestSecrets,
    SealedRequest,
    seal_request,
)
from cocoon.sealing.derive import key_id
from cocoon.sealing.enclave import (
    Accepted,
    OpenedRequest,
    ResponseSealer,
    accept_request,
    open_accepted,
    open_request,
)
from cocoon.sealing.envelope import (
    MAX_ENVELOPE_BYTES,
    RecipientSlot,
    RequestHeader,
    pack_flags,
    parse_header,
    request_hash,
)
from cocoon.sealing.keys import (
    EnclaveKeys,
    JobExports,
    KeyBundle,
    KeyRing,
    latest_not_after_ms,
    verify_bundle,
)
from cocoon.sealing.opener import (
    Data,
    ErrorRecord,
    Event,
    Finished,
    ResponseOpener,
    Usage,
)
from cocoon.sealing.pacing import Pace, Step
from cocoon.sealing.padding import Profile, default_profile, public_count
from cocoon.sealing.prefix import ResponsePrefix, parse_prefix
from cocoon.sealing.receipt import (
    RECEIPT_BYTES,
    Receipt,
    Status,
    check_chain,
    receipt_hash,
    verify_receipt,
)
from cocoon.sealing.refusals import INSIDE_CODES, outside_code
from cocoon.sealing.replay import Remembered, ReplayMemory

__all__ = [
    "INSIDE_CODES",
    "MAX_ENVELOPE_BYTES",
    "RECEIPT_BYTES",
    "Accepted",
    "Data",
    "EnclaveKeys",
    "ErrorRecord",
    "Event",
    "Finished",
    "JobExports",
    "KeyBundle",
    "KeyRing",
    "OpenedRequest",
    "Pace",
    "Profile",
    "Receipt",
    "Recipient",
    "RecipientSlot",
    "Remembered",
    "ReplayMemory",
    "RequestHeader",
    "RequestSecrets",
    "ResponseOpener",
    "ResponsePrefix",
    "ResponseSealer",
    "SealedRequest",
    "Status",
    "Step",
    "Usage",
    "accept_request",
    "check_chain",
    "default_profile",
    "key_id",
    "latest_not_after_ms",
    "open_accepted",
    "open_request",
    "outside_code",
    "pack_flags",
    "parse_header",
    "parse_prefix",
    "public_count",
    "receipt_hash",
    "request_hash",
    "seal_request",
    "verify_bundle",
    "verify_receipt",
]
