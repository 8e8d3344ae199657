"""What each role may publish and hear: the whole table, in one place. Pure.

Everyone has an inbox prefix of his own, so nobody can listen to another's replies. Subjects that
start with $JS are JetStream's API; wildcards there are whole words, so streams are named one by
one. Which of these subjects leave the account is in bus/accounts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cocoon.bus.accounts import GATEWAYS, LOBBY, LOOK, OPERATORS, PLATFORM, READ_SEALED, SYSTEM
from cocoon.contracts import subjects

INGRESS_DURABLE = "billing"
CALLOUT = "$SYS.REQ.USER.AUTH"  # where the server asks who a connection is


@dataclass(frozen=True, slots=True)
class Permissions:
    """Subjects that a user may publish to and subscribe to, in the account where he lives.

    `responses`: he may answer a request once, wherever its asker wants the answer. Only who lives
    outside PLATFORM has it; services there answer to requests from other accounts only.
    """

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    account: str = PLATFORM
    responses: bool = False


def inbox_prefix(name: str) -> str:
    """The private inbox of a service, a gateway or a provider by its id: `_INBOX_<name>`."""
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


_ANSWERS = "_R_.>"  # where the server takes the answers to requests from other accounts


def gateway(gateway_id: str) -> Permissions:
    """Asks the matcher, dispatches, relays frames; keeps requests and reads responses in SEALED.

    It hears what is for its own id only.
    """
    return Permissions(
        publish=(
            "rpc.matcher.*.request_job",
            "rpc.matcher.*.report_dispatch",
            "rpc.matcher.*.cancel_job",
            subjects.DIRECTORY_REQUEST,
            subjects.MANIFEST_REQUEST,
            "rpc.billing.*.balance",
            "rpc.billing.*.dispute",
            "cmd.provider.*.run_job",
            "cmd.provider.*.cancel_job",
            "sealed.*.*.*",
            f"{READ_SEALED}.sealed.*.*.*",
        ),
        subscribe=(
            f"mat.{gateway_id}.*",
            f"tok.{gateway_id}.>",
            "rpc.gateway.keys.*",
            _inbox(gateway_id),
        ),
        account=GATEWAYS,
        responses=True,
    )


def matcher_name(shard: int) -> str:
    """What an account shard's matcher is called: the first is "matcher", then "matcher-2"."""
    return "matcher" if shard == 1 else f"matcher-{shard}"


def matcher(shards: Sequence[int], name: str = "matcher") -> Permissions:
    """Answers gateways, hears heartbeats; never sees ciphertext or frames.

    It hears and reads what is for its own account shard, and the network's events.
    """
    asked = tuple(f"rpc.matcher.{shard}.*" for shard in shards if shard != subjects.NETWORK_SHARD)
    return Permissions(
        publish=("mat.>", "cmd.provider.*.cancel_job", *_tail(shards)),
        subscribe=(*asked, subjects.HEARTBEATS, _inbox(name)),
    )


def billing(shards: Sequence[int]) -> Permissions:
    """Takes results from INGRESS, acknowledges them, and runs the relay."""
    ingress = subjects.INGRESS_STREAM
    return Permissions(
        publish=(
            "ack.provider.*",
            f"$JS.API.STREAM.INFO.{ingress}",
            f"$JS.API.CONSUMER.INFO.{ingress}.{INGRESS_DURABLE}",
            f"$JS.API.CONSUMER.DURABLE.CREATE.{ingress}.{INGRESS_DURABLE}",
            f"$JS.API.CONSUMER.MSG.NEXT.{ingress}.{INGRESS_DURABLE}",
            f"$JS.ACK.{ingress}.{INGRESS_DURABLE}.>",
            _ANSWERS,
            *_relay(shards),
            *_tail(shards),
        ),
        subscribe=("rpc.billing.>", "rpc.books.>", _inbox("billing")),
    )


def attestation(shards: Sequence[int]) -> Permissions:
    """Answers enrolment, evidence and directory requests; hears heartbeats for the directory."""
    return Permissions(
        publish=(_ANSWERS, *_tail(shards)),
        subscribe=(
            "rpc.attestation.>",
            subjects.from_lobby("*", "*"),
            subjects.HEARTBEATS,
            _inbox("attestation"),
        ),
    )


def entry(_shards: Sequence[int] = ()) -> Permissions:
    """Attestation's second connection: tells the server who comes in where, and ends what it must.

    It lives in the server's own account, where the server asks; it hears nothing else there.
    """
    return Permissions(
        publish=("$SYS.REQ.ACCOUNT.*.CONNZ", "$SYS.REQ.SERVER.*.KICK"),
        subscribe=(CALLOUT, _inbox("entry")),
        account=SYSTEM,
        responses=True,
    )


def stranger(provider_id: str) -> Permissions:
    """In the lobby: ask attestation in one's own name, and hear the answer."""
    return Permissions(
        publish=(subjects.attestation(provider_id, "*"),),
        subscribe=(_inbox(provider_id),),
        account=LOBBY,
    )


def provider(provider_id: str, account: str) -> Permissions:
    """One provider's own subjects and nothing else: not its peers', not the events.

    `account`: the berth where it lives alone.
    """
    return Permissions(
        publish=(
            f"tok.*.{provider_id}.*.*",
            subjects.heartbeat(provider_id),
            subjects.submit_result(provider_id),
            subjects.attestation(provider_id, "*"),
            subjects.books(provider_id, "*"),
            f"sealed.{provider_id}.*.*",
            f"{READ_SEALED}.sealed.{provider_id}.*.*",
        ),
        subscribe=(
            f"cmd.provider.{provider_id}.*",
            subjects.acks(provider_id),
            _inbox(provider_id),
        ),
        account=account,
    )


def operator(_shards: Sequence[int] = ()) -> Permissions:
    """The command line: reads the state of the bus and asks services; no commands to providers."""
    return Permissions(
        publish=(
            *LOOK,
            "rpc.billing.*.*",
            "rpc.gateway.keys.*",
            subjects.attestation("platform", "*"),
        ),
        subscribe=(subjects.HEARTBEATS, _inbox("operator")),
        account=OPERATORS,
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
    )


# Services and people by name. The others are `gateway(gateway_id)`, and those who come in by the
# callout: `stranger(provider_id)` and `provider(provider_id, berth)`.
ROLES: dict[str, Callable[[Sequence[int]], Permissions]] = {
    "matcher": matcher,
    "billing": billing,
    "attestation": attestation,
    "entry": entry,
    "operator": operator,
    "infra": infra,
}
