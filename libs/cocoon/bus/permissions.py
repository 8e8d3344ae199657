"""What each role may publish and hear: the whole table, in one place. Pure.

A role has its own inbox prefix, so nobody can listen to another's replies. Subjects that start
with $JS are JetStream's API; wildcards there are whole words, so streams are named one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cocoon.contracts import subjects

INGRESS_DURABLE = "billing"


@dataclass(frozen=True, slots=True)
class Permissions:
    """Subjects that a user may publish to and subscribe to. `responses`: it may answer requests."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    responses: bool = True


def inbox_prefix(name: str) -> str:
    """The private inbox of a role or a provider: `_INBOX_<name>`."""
    return f"_INBOX_{name}"


def _inbox(name: str) -> str:
    return f"{inbox_prefix(name)}.>"


def _tail(shards: Sequence[int]) -> tuple[str, ...]:
    """Follow the event streams: an ephemeral consumer that delivers to the own inbox."""
    streams = [subjects.events_stream(shard) for shard in shards]
    return tuple(
        subject
        for stream in streams
        for subject in (
            f"$JS.API.STREAM.INFO.{stream}",
            f"$JS.API.CONSUMER.CREATE.{stream}.>",
            f"$JS.API.CONSUMER.DELETE.{stream}.>",
            f"$JS.FC.{stream}.>",
        )
    )


def _relay(shards: Sequence[int]) -> tuple[str, ...]:
    """Publish the log and rebuild a lost event stream. Only the relay may do either."""
    streams = [subjects.events_stream(shard) for shard in shards]
    return (
        "evt.>",
        *(
            f"$JS.API.STREAM.{verb}.{stream}"
            for stream in streams
            for verb in ("CREATE", "DELETE", "MSG.GET")
        ),
    )


_READ_SEALED = f"$JS.API.DIRECT.GET.{subjects.SEALED_STREAM}"


def gateway(shards: Sequence[int], gateway_id: str = "*") -> Permissions:
    """Asks the matcher, dispatches, relays frames; keeps requests and reads responses in SEALED."""
    return Permissions(
        publish=(
            "rpc.matcher.*.request_job",
            "rpc.matcher.*.report_dispatch",
            "rpc.matcher.*.cancel_job",
            subjects.DIRECTORY_REQUEST,
            "rpc.billing.*.balance",
            "cmd.provider.*.run_job",
            "cmd.provider.*.cancel_job",
            "sealed.*.>",
            f"{_READ_SEALED}.sealed.>",
            *_tail(shards),
        ),
        subscribe=(
            f"mat.{gateway_id}.>",
            f"tok.{gateway_id}.>",
            "rpc.gateway.>",
            _inbox("gateway"),
        ),
    )


def matcher(shards: Sequence[int]) -> Permissions:
    """Answers gateways, hears heartbeats; never sees ciphertext or frames."""
    return Permissions(
        publish=("mat.>", "cmd.provider.*.cancel_job", *_tail(shards)),
        subscribe=("rpc.matcher.>", subjects.HEARTBEATS, _inbox("matcher")),
    )


def billing(shards: Sequence[int]) -> Permissions:
    """Takes results from INGRESS, acknowledges them, and runs the relay."""
    ingress = subjects.INGRESS_STREAM
    return Permissions(
        publish=(
            "ack.provider.*",
            f"$JS.API.STREAM.INFO.{ingress}",
            f"$JS.API.CONSUMER.INFO.{ingress}.{INGRESS_DURABLE}",
            f"$JS.API.CONSUMER.MSG.NEXT.{ingress}.{INGRESS_DURABLE}",
            f"$JS.ACK.{ingress}.{INGRESS_DURABLE}.>",
            *_relay(shards),
            *_tail(shards),
        ),
        subscribe=("rpc.billing.>", _inbox("billing")),
    )


def attestation(shards: Sequence[int]) -> Permissions:
    """Answers enrolment, evidence and directory requests; hears heartbeats for the directory."""
    return Permissions(
        publish=_tail(shards),
        subscribe=("rpc.attestation.>", subjects.HEARTBEATS, _inbox("attestation")),
    )


def provider(provider_id: str) -> Permissions:
    """One provider's own subjects and nothing else: not its peers', not the events."""
    return Permissions(
        publish=(
            f"tok.*.{provider_id}.>",
            subjects.heartbeat(provider_id),
            f"cmd.platform.{provider_id}.>",
            f"rpc.attestation.{provider_id}.>",
            f"sealed.{provider_id}.>",
            f"{_READ_SEALED}.sealed.{provider_id}.>",
        ),
        subscribe=(
            f"cmd.provider.{provider_id}.>",
            subjects.acks(provider_id),
            _inbox(provider_id),
        ),
    )


def operator(_shards: Sequence[int] = ()) -> Permissions:
    """The command line: reads the state of the bus and asks services; no commands to providers."""
    return Permissions(
        publish=(
            "$JS.API.INFO",
            "$JS.API.STREAM.NAMES",
            "$JS.API.STREAM.LIST",
            "$JS.API.STREAM.INFO.*",
            "$JS.API.CONSUMER.LIST.*",
            "$JS.API.CONSUMER.INFO.*.*",
            "rpc.billing.>",
            "rpc.gateway.>",
            "rpc.attestation.platform.>",
        ),
        subscribe=(subjects.HEARTBEATS, _inbox("operator")),
        responses=False,
    )


def infra(_shards: Sequence[int] = ()) -> Permissions:
    """Declares streams and durables at deployment; reads and writes no message."""
    return Permissions(
        publish=(
            "$JS.API.INFO",
            "$JS.API.STREAM.CREATE.*",
            "$JS.API.STREAM.UPDATE.*",
            "$JS.API.STREAM.INFO.*",
            "$JS.API.CONSUMER.DURABLE.CREATE.*.*",
            "$JS.API.CONSUMER.CREATE.*.>",
            "$JS.API.CONSUMER.INFO.*.*",
        ),
        subscribe=(_inbox("infra"),),
        responses=False,
    )


# Services and people by name; a provider is `provider(provider_id)`.
ROLES: dict[str, Callable[[Sequence[int]], Permissions]] = {
    "gateway": gateway,
    "matcher": matcher,
    "billing": billing,
    "attestation": attestation,
    "operator": operator,
    "infra": infra,
}
