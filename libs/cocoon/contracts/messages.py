"""Messages of core NATS and INGRESS: requests, replies and updates between services.

They are never stored. Ciphertext travels as raw message bodies beside them, never inside JSON.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cocoon.contracts.base import Contract, Count, Hex16, Hex32, Name, Nanoton, Region, TimeMs
from cocoon.contracts.events import Epoch, OfferedModel, ProfiledModel, Quote
from cocoon.contracts.honesty import HonestyRule
from cocoon.contracts.matching import Affinity, Preferences

MAX_INLINE_ENVELOPE_BYTES = 512 * 1024  # larger envelopes reach the provider through SEALED

# NATS headers of `run_job`; the body is the envelope, or empty when H_SEALED names the blob.
H_JOB = "Cocoon-Job"
H_EPOCH = "Cocoon-Epoch"
H_REQ_HASH = "Cocoon-Req-Hash"
H_GATEWAY = "Cocoon-Gateway"
H_QUOTE = "Cocoon-Quote"  # canonical JSON of the Quote
H_SEALED = "Cocoon-Sealed"  # SHA-256 of the envelope in SEALED, under the provider's name
H_TRACEPARENT = "traceparent"


class ErrorBody(Contract):
    """A refusal on its way to an HTTP answer: the error tree's fields."""

    status: Annotated[int, Field(ge=400, le=599)]
    code: Name
    message: Annotated[str, Field(max_length=1000)]
    retry_after_s: Annotated[int, Field(ge=0, le=3600)] | None = None


class JobRequest(Contract):
    """Gateway to matcher: the envelope's public header and who pays; never the ciphertext."""

    gateway_id: Name
    command_id: Name
    job_id: Hex16
    account_id: Name
    api_key_id: Name
    model_id: Hex32
    req_hash: Hex32
    envelope_bytes: Count
    max_price_nanoton: Nanoton
    max_input_tokens: Count
    max_output_tokens: Count
    not_after_ms: TimeMs
    policy_hash: Hex32
    recipient_key_ids: tuple[Hex16, ...]
    stream: bool
    preferences: Preferences | None = None
    affinity: Affinity = ""


class MatchUpdate(Contract):
    """Matcher to gateway on `match_updates(gateway, job)`.

    matched: dispatch now (epoch rises at every match). committed: the match of `epoch` is in the
    log, bytes may go out. existing: this command id already has a job. waiting: all providers
    are busy and the matcher keeps the request for a while; do not repeat it. refused: nothing was
    accepted. ended: the job failed or was cancelled.
    """

    kind: Literal["matched", "committed", "existing", "waiting", "refused", "ended"]
    job_id: Hex16
    epoch: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    provider_id: str = ""
    key_id: str = ""
    quote: Quote | None = None
    quote_id: str = ""
    evidence_id: str = ""
    lease_ttl_ms: TimeMs = 0
    position: Annotated[int, Field(ge=0, le=2**53)] = 0
    req_hash: str = ""
    error: ErrorBody | None = None


class DispatchReport(Contract):
    """Gateway to matcher: what became of a dispatch."""

    job_id: Hex16
    epoch: Epoch
    outcome: Literal["busy", "refused", "silent", "began"]
    code: Name = "none"


class CancelJob(Contract):
    """The client has gone, or asked: stop. To the matcher, and to the provider."""

    job_id: Hex16
    epoch: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0


class DispatchReply(Contract):
    """Provider to gateway: accepted, or the coarse code of a refusal (CAI/1, Errors)."""

    accepted: bool
    code: Literal["ok", "busy", "bad_request", "unknown_key", "wrong_policy", "expired"] = "ok"


ModelIds = Annotated[tuple[Hex32, ...], Field(max_length=64)]


class Heartbeat(Contract):
    """Provider to matcher, once a second: which jobs run (renews their leases) and the load.

    Of its models, `full` have no room while others may have it, and `away` have no engine now.
    """

    provider_id: Name
    boot_id: Hex16
    sequence: Count
    running: tuple[tuple[Hex16, Epoch], ...]
    concurrency: Count
    draining: bool = False
    full: ModelIds = ()
    away: ModelIds = ()


class SubmitResult(Contract):
    """Provider to billing through INGRESS; the identity key signs `signed_bytes`."""

    provider_id: Name
    job_id: Hex16
    epoch: Epoch
    receipt: Annotated[str, Field(pattern=r"^[0-9a-f]{840}$")]
    blob_hash: Hex32
    response_bytes: Count
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    def signed_bytes(self) -> bytes:
        """What the provider's Ed25519 identity key signs."""
        return submission_bytes(
            self.provider_id, self.job_id, self.epoch, self.receipt, self.blob_hash
        )


def submission_bytes(
    provider_id: str, job_id: str, epoch: int, receipt: str, blob_hash: str
) -> bytes:
    text = "\n".join((provider_id, job_id, str(epoch), receipt, blob_hash))
    return b"cocoon submit result\0" + text.encode()


class ResultAck(Contract):
    """Billing to provider: the network has the result, or refused it for good."""

    job_id: Hex16
    epoch: Epoch
    outcome: Literal["result_sealed", "result_rejected"]
    reason: Name = "none"


class Reply(Contract):
    """The answer to any operator's or provider's request: an error, or `data` (JSON text)."""

    ok: bool
    error: ErrorBody | None = None
    data: str = ""


class EnrolRequest(Contract):
    identity_key: Hex32  # also the agent's NATS user key
    # open: this provider has no TEE. Left out otherwise: its evidence says what it has
    tier: Annotated[Literal["open"] | None, Field(exclude_if=lambda tier: tier is None)] = None


class OfferRequest(Contract):
    models: Annotated[tuple[OfferedModel, ...], Field(max_length=256)]
    concurrency: Annotated[int, Field(ge=1, le=65_536)]


class ProfileRequest(Contract):
    region: Region = ""
    models: Annotated[tuple[ProfiledModel, ...], Field(max_length=256)]


class Challenge(Contract):
    """What the evidence must bind, and the two values that it was made from."""

    challenge: Hex32
    checkpoint_root: Hex32
    challenge_random: Hex32
    expires_ms: TimeMs


class BundleRequest(Contract):
    bundle: Annotated[str, Field(pattern=r"^[0-9a-f]{2,8192}$")]


class DirectoryRequest(Contract):
    """Gateway to attestation. `after` pages: the answer's `next` (empty at the end)."""

    model: Annotated[str, Field(max_length=128)] | None = None  # a name or a model id; None: all
    after: Annotated[str, Field(max_length=256)] = ""


class ManifestRequest(Contract):
    """Gateway to attestation. Answered with the manifest's own bytes, which hash to the id."""

    model_id: Hex32


class BanRequest(Contract):
    """Operator to attestation: revoke at once and refuse the machine's evidence until lifted."""

    provider_id: Name
    lift: bool = False


class CanaryRequest(Contract):
    """Operator to attestation: how an audit job's answer compared with the reference's."""

    provider_id: Name
    model_id: Hex32
    job_id: Hex16
    outcome: Literal["passed", "differed", "unclear"]
    distance_bps: Annotated[int, Field(ge=0, le=10_000)]
    rule: HonestyRule


class Dispute(Contract):
    """What a client counted in an answer, and the signed receipt that says otherwise."""

    kind: Literal["input_tokens", "output_tokens"]
    counted_by: Literal["tokenizer", "bytes"]
    own_input_tokens: Count
    own_output_tokens: Count
    receipt: Annotated[str, Field(pattern=r"^[0-9a-f]{840}$")]


class DisputeRequest(Contract):
    """Gateway to billing: the same, with the job's id and whose API key sent it."""

    job_id: Hex16
    account_id: Name
    dispute: Dispute


class OpenAccountRequest(Contract):
    account_id: Name


class BalanceRequest(Contract):
    account_id: Name
    posted: Count = 0  # answer once the ledger has posted this position of the account's shard


class UnparkRequest(Contract):
    """Post the events of a stream that stands aside (`job/<id>`, `account/<id>`), in order."""

    stream: Name


class CreditRequest(Contract):
    account_id: Name
    amount_nanoton: Nanoton
    reference: Name  # one credit per reference, however often it is sent


class CreateKeyRequest(Contract):
    api_key_id: Name
    secret_hash: Hex32  # SHA-256 of the key's text; the text never leaves the CLI
    account_id: Name
    label: Annotated[str, Field(max_length=64)]


class RevokeKeyRequest(Contract):
    api_key_id: Name
