"""Every NATS subject and stream name, in one place."""

from __future__ import annotations

import re

NETWORK_SHARD = 0  # providers, attestation, policy
INGRESS_STREAM = "INGRESS"
SEALED_STREAM = "SEALED"
PLATFORM_INGRESS = "cmd.platform.*.submit_result"
HEARTBEATS = "hb.provider.*"

_WORD = re.compile(r"(?<!^)(?=[A-Z])")


def snake(event_type: str) -> str:
    """ "JobRequested" -> "job_requested"."""
    return _WORD.sub("_", event_type).lower()


def events_stream(shard: int) -> str:
    return f"EVENTS_{shard}"


def event(shard: int, stream: str, event_type: str) -> str:
    """Subject of an event on `stream` ("job/<id>"): evt.<shard>.job.<id>.job_requested."""
    aggregate, _, ident = stream.partition("/")
    return f"evt.{shard}.{aggregate}.{ident}.{snake(event_type)}"


def request_job(shard: int) -> str:
    """Gateway to matcher, core request; the two replies go to `match_updates`."""
    return f"rpc.matcher.{shard}.request_job"


def report_dispatch(shard: int) -> str:
    """Gateway to matcher: a provider refused a dispatch, did not answer, or began its output."""
    return f"rpc.matcher.{shard}.report_dispatch"


def cancel_at_matcher(shard: int) -> str:
    return f"rpc.matcher.{shard}.cancel_job"


def match_updates(gateway: str, job: str) -> str:
    """Matcher to gateway: matched, committed, refused, ended."""
    return f"mat.{gateway}.{job}"


def run_job(provider: str) -> str:
    """Gateway to provider with the ciphertext; the provider accepts or refuses on `tokens`."""
    return f"cmd.provider.{provider}.run_job"


def cancel_job(provider: str) -> str:
    return f"cmd.provider.{provider}.cancel_job"


def acks(provider: str) -> str:
    """Platform to provider: result_sealed or result_rejected for its jobs."""
    return f"ack.provider.{provider}"


def submit_result(provider: str) -> str:
    return f"cmd.platform.{provider}.submit_result"


def heartbeat(provider: str) -> str:
    return f"hb.provider.{provider}"


def tokens(gateway: str, provider: str, job: str, epoch: int) -> str:
    """Provider to gateway: the answer to a dispatch, then numbered sealed frames."""
    return f"tok.{gateway}.{provider}.{job}.{epoch}"


def sealed_chunk(provider: str, digest: str, index: int) -> str:
    """A chunk of ciphertext in SEALED, named by the SHA-256 of the whole."""
    return f"sealed.{provider}.{digest}.{index}"


def attestation(provider: str, verb: str) -> str:
    """Provider to attestation, core request: enrol, challenge, submit_evidence, publish_offer,
    publish_profile, publish_bundle, publish_manifest; or an operator's or a gateway's verb with
    provider = "platform"."""
    return f"rpc.attestation.{provider}.{verb}"


def from_lobby(provider: str, verb: str) -> str:
    """What attestation hears of a request by somebody who has no place on the bus yet."""
    return f"lobby.attestation.{provider}.{verb}"


DIRECTORY_REQUEST = "rpc.attestation.platform.directory"
MANIFEST_REQUEST = "rpc.attestation.platform.manifest"


def billing(shard: int, verb: str) -> str:
    """Operator to billing, core request: open_account, credit_deposit, balance."""
    return f"rpc.billing.{shard}.{verb}"


def books(provider: str, verb: str) -> str:
    """Provider to billing, core request: earnings, lost, simulate."""
    return f"rpc.books.{provider}.{verb}"


def gateway_keys(verb: str) -> str:
    """Operator to gateways, core request: create, list, revoke."""
    return f"rpc.gateway.keys.{verb}"
