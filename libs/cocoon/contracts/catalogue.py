"""Who appends each event and when; who may publish and hear each subject: data for the documents.

The database refuses an append that EVENTS does not give to the role, and a checkpoint that
CONSUMERS does not; tests hold the rest against the bus's permissions and against the models.
"""

from __future__ import annotations

from dataclasses import dataclass

from cocoon.contracts import books, subjects
from cocoon.contracts import messages as m
from cocoon.contracts.base import Contract

# type -> (the stream's aggregate, who appends it, when)
EVENTS: dict[str, tuple[str, str, str]] = {
    "JobRequested": ("job", "matcher", "a gateway's request is accepted; first event of its job"),
    "FundsHeld": (
        "job",
        "matcher",
        "with JobRequested, when the account can pay the most it costs",
    ),
    "FundsRefused": ("job", "matcher", "with JobRequested, when it cannot; the job ends"),
    "ProviderMatched": ("job", "matcher", "with FundsHeld, or with the LeaseExpired before it"),
    "LeaseExpired": (
        "job",
        "matcher",
        "the live epoch ends without a result; nothing else ends it",
    ),
    "JobFailed": ("job", "matcher", "with LeaseExpired, when nobody may try again; the job ends"),
    "JobCancelled": ("job", "matcher", "with LeaseExpired, after a cancel; the job ends"),
    "ResultSealed": ("job", "billing", "a valid receipt of the live epoch arrived"),
    "ResultRejected": ("job", "billing", "a receipt was wrong, stale or late; nothing is paid"),
    "PaymentSettled": ("job", "billing", "with ResultSealed, always; the job ends"),
    "AccountOpened": ("account", "billing", "an operator opens an account"),
    "DepositCredited": ("account", "billing", "a deposit arrived; once per reference"),
    "LedgerSnapshotTaken": (
        "ledger",
        "billing",
        "every so many events, once billing has replayed them and found its tables equal",
    ),
    "ProviderEnrolled": ("provider", "attestation", "an agent enrols, or its tier changes"),
    "OfferPublished": ("provider", "attestation", "models, prices or places changed"),
    "ProviderAttested": ("provider", "attestation", "evidence was verified with an ok verdict"),
    "AttestationRevoked": ("provider", "attestation", "evidence ran out, was replaced or banned"),
    "KeyBundlePublished": ("provider", "attestation", "a key epoch's signed bundle was verified"),
    "PolicyPublished": ("policy", "attestation", "the network's signed policy changed"),
    "OpenTierLimitsSet": (
        "policy",
        "attestation",
        "just before the PolicyPublished of a policy that allows the open tier",
    ),
    "ProviderProfilePublished": (
        "provider",
        "attestation",
        "a provider tells its region, or another quantisation of a model",
    ),
    "MatchingSeedCommitted": (
        "matching",
        "matcher",
        "before the first decision whose draw comes from the period's secret",
    ),
    "MatchingSeedRevealed": (
        "matching",
        "matcher",
        "a while after the next period began: everybody can check the draws",
    ),
    "CanaryJudged": ("honesty", "attestation", "an auditor judged one of its jobs; once a job"),
    "HonestyDecided": ("honesty", "attestation", "with CanaryJudged, once its test is sure"),
    "HonestyLifted": ("honesty", "attestation", "an operator lifts a ban"),
    "DisputeOpened": ("dispute", "billing", "a client counted fewer tokens; once a job"),
}

# consumer -> whose it is: the one role that may move its checkpoint and park behind it
CONSUMERS: dict[str, str] = {"ledger": "billing"}


@dataclass(frozen=True, slots=True)
class Channel:
    """A subject of the bus: its address with {parameters}, its two ends, and what it carries."""

    name: str
    address: str
    publishers: tuple[str, ...]
    hearers: tuple[str, ...]
    payload: type[Contract] | str  # a message's model, or what the bytes are
    summary: str
    reply: type[Contract] | str = ""  # of a core request
    stream: str = ""  # the JetStream stream that holds it; hearers read the stream


def _verbs() -> tuple[Channel, ...]:
    """The requests of operators and providers: one subject per verb, answered with Reply."""
    attestation = (
        ("enrol", "{provider_id}", ("provider",), m.EnrolRequest, "become known"),
        ("challenge", "{provider_id}", ("provider",), "an empty object", "ask what to bind"),
        (
            "submit_evidence", "{provider_id}", ("provider",),
            "ProviderEvidence (cocoon.evidence.provider)", "have the machine verified",
        ),
        ("publish_offer", "{provider_id}", ("provider",), m.OfferRequest, "models and prices"),
        (
            "publish_profile", "{provider_id}", ("provider",), m.ProfileRequest,
            "region and quantisations",
        ),
        ("publish_bundle", "{provider_id}", ("provider",), m.BundleRequest, "a key epoch's bundle"),
        (
            "publish_manifest", "{provider_id}", ("provider",),
            "ModelManifest (cocoon.models.manifest), canonical",
            "what exactly a model id names; the bytes hash to it",
        ),
        ("standing", "{provider_id}", ("provider",), "an empty object", "how the network sees it"),
        (
            "directory", "platform", ("gateway", "operator"), m.DirectoryRequest,
            "a model's providers with their evidence and keys",
        ),
        (
            "manifest", "platform", ("gateway", "operator"), m.ManifestRequest,
            "the published manifest of a model id",
        ),
        ("policy", "platform", ("operator",), "an empty object", "the signed policy"),
        ("ban", "platform", ("operator",), m.BanRequest, "revoke a machine at once"),
        ("canary", "platform", ("operator",), m.CanaryRequest, "how an audit job was judged"),
    )  # fmt: skip
    billing = (
        ("open_account", ("operator",), m.OpenAccountRequest, "open an account"),
        ("credit_deposit", ("operator",), m.CreditRequest, "credit a deposit"),
        ("balance", ("gateway", "operator"), m.BalanceRequest, "what is free and what is held"),
        ("dispute", ("gateway", "operator"), m.DisputeRequest, "a count against a receipt's"),
        ("parked", ("operator",), "an empty object", "the streams that the ledger has put aside"),
        ("unpark", ("operator",), m.UnparkRequest, "post such a stream's events in order"),
    )
    own_books = (
        ("earnings", books.EarningsRequest, "what its jobs brought, by day, model or job"),
        ("lost", books.LostRequest, "jobs that went elsewhere, and by which margin"),
        ("simulate", books.SimulateRequest, "what a price would earn with the log's demand"),
    )
    keys = (
        ("create", m.CreateKeyRequest, "make an API key known by its hash"),
        ("list", "an empty object", "the API keys' public names"),
        ("revoke", m.RevokeKeyRequest, "end an API key"),
    )
    return (
        *(
            Channel(
                f"attestation.{verb}", subjects.attestation(who, verb), asks, ("attestation",),
                payload, summary, reply=m.Reply,
            )
            for verb, who, asks, payload, summary in attestation
        ),
        *(
            Channel(
                f"billing.{verb}", f"rpc.billing.{{shard}}.{verb}", asks, ("billing",),
                payload, summary, reply=m.Reply,
            )
            for verb, asks, payload, summary in billing
        ),
        *(
            Channel(
                f"books.{verb}", subjects.books("{provider_id}", verb), ("provider",),
                ("billing",), payload, summary, reply=m.Reply,
            )
            for verb, payload, summary in own_books
        ),
        *(
            Channel(
                f"keys.{verb}", subjects.gateway_keys(verb), ("operator",), ("gateway",),
                payload, summary, reply=m.Reply,
            )
            for verb, payload, summary in keys
        ),
    )  # fmt: skip


_JOB, _PROVIDER, _GATEWAY = "{job_id}", "{provider_id}", "{gateway_id}"

CHANNELS: tuple[Channel, ...] = (
    Channel(
        "events", "evt.{shard}.{aggregate}.{id}.{event_name}", ("billing",),
        ("matcher", "billing", "attestation"),
        "an event's data exactly as the log holds it, CloudEvents headers beside it",
        "the log, position for position: the relay beside billing publishes, nobody else may",
        stream="EVENTS_{shard}",
    ),
    Channel(
        "request_job", "rpc.matcher.{shard}.request_job", ("gateway",), ("matcher",),
        m.JobRequest, "hold and match a job; the answers come on match_updates",
    ),
    Channel(
        "report_dispatch", "rpc.matcher.{shard}.report_dispatch", ("gateway",), ("matcher",),
        m.DispatchReport, "what became of a dispatch: busy, refused, silent, or it began",
    ),
    Channel(
        "cancel_at_matcher", "rpc.matcher.{shard}.cancel_job", ("gateway",), ("matcher",),
        m.CancelJob, "the client has gone or asked to stop",
    ),
    Channel(
        "match_updates", subjects.match_updates(_GATEWAY, _JOB), ("matcher",), ("gateway",),
        m.MatchUpdate, "matched, committed, existing, waiting, refused, ended",
    ),
    Channel(
        "run_job", subjects.run_job(_PROVIDER), ("gateway",), ("provider",),
        "the sealed envelope, or nothing when a header names it in SEALED",
        "dispatch of a matched job; the answer comes on tokens",
    ),
    Channel(
        "cancel_job", subjects.cancel_job(_PROVIDER), ("gateway", "matcher"), ("provider",),
        m.CancelJob, "stop a running job; its receipt tells what was delivered",
    ),
    Channel(
        "tokens", f"tok.{_GATEWAY}.{_PROVIDER}.{_JOB}.{{epoch}}", ("provider",), ("gateway",),
        "kind u8; 2: a DispatchReply; 0 and 1: offset u64 big-endian, on the last (1) the blob's "
        "SHA-256, then sealed bytes",
        "whether a dispatch was taken, then numbered pieces of the sealed response",
    ),
    Channel(
        "heartbeat", subjects.heartbeat(_PROVIDER), ("provider",),
        ("matcher", "attestation", "operator"), m.Heartbeat,
        "once a second: what runs, which renews its leases",
    ),
    Channel(
        "submit_result", subjects.submit_result(_PROVIDER), ("provider",), ("billing",),
        m.SubmitResult, "a signed receipt, kept until billing has committed its outcome",
        stream=subjects.INGRESS_STREAM,
    ),
    Channel(
        "acks", subjects.acks(_PROVIDER), ("billing",), ("provider",), m.ResultAck,
        "the network has the result, or has refused it for good",
    ),
    Channel(
        "sealed", f"sealed.{_PROVIDER}.{{sha256}}.{{index}}", ("gateway", "provider"),
        ("gateway", "provider"), "a chunk of ciphertext, named by the SHA-256 of the whole",
        "sealed requests too large for a dispatch, and sealed responses, for an hour at most",
        stream=subjects.SEALED_STREAM,
    ),
    *_verbs(),
)  # fmt: skip
