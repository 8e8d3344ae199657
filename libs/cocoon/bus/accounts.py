"""Which NATS account an identity lives in, and which subjects cross between accounts. Pure.

A reply subject is a name that the asker chooses, and the server does not ask whether he may publish
there. Inside his own account he can therefore name anything; across a crossing the server puts a
private reply of its own in its place. So every provider lives alone, in a berth: one of a fixed
number of equal accounts. Gateways and operators have an account each, strangers share the lobby,
and what is not in this table does not cross.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from cocoon.contracts import subjects

PLATFORM = "PLATFORM"  # matcher, billing, attestation, infra; the only one with JetStream
GATEWAYS, OPERATORS = "GATEWAYS", "OPERATORS"
SYSTEM = "SYS"  # the server's own: it asks here who a connection is
LOBBY = "LOBBY"  # whoever has not enrolled yet; all that it can do is ask attestation
NAMED = (PLATFORM, GATEWAYS, OPERATORS, SYSTEM, LOBBY)  # every other account is a berth
MAX_BERTHS = 9999

# What an operator may ask of JetStream: to look, never at a message.
LOOK = tuple(
    f"$JS.API.{verb}"
    for verb in (
        "INFO", "STREAM.NAMES", "STREAM.LIST", "STREAM.INFO.*", "CONSUMER.LIST.*",
        "CONSUMER.INFO.*.*",
    )
)  # fmt: skip

READ_SEALED = f"$JS.API.DIRECT.GET.{subjects.SEALED_STREAM}"


@dataclass(frozen=True, slots=True)
class Crossing:
    """A subject that goes from one account into another, under the same name unless `arrives`.

    "message": one way, and costs nothing. "request": the answer comes back by a private subject
    that the server makes for it, about 60 us dearer.
    """

    kind: Literal["message", "request"]
    subject: str
    source: str
    target: str
    arrives: str = ""  # a request's name in the target


def _message(subject: str, source: str, target: str) -> Crossing:
    return Crossing("message", subject, source, target)


def _request(subject: str, source: str, target: str, arrives: str = "") -> Crossing:
    return Crossing("request", subject, source, target, arrives)


_ALWAYS = (
    _message("rpc.matcher.*.*", GATEWAYS, PLATFORM),
    _message("mat.*.*", PLATFORM, GATEWAYS),
    _request(subjects.DIRECTORY_REQUEST, GATEWAYS, PLATFORM),
    _request(subjects.MANIFEST_REQUEST, GATEWAYS, PLATFORM),
    _request("rpc.billing.*.balance", GATEWAYS, PLATFORM),
    _request("rpc.billing.*.dispute", GATEWAYS, PLATFORM),
    _request("sealed.*.*.*", GATEWAYS, PLATFORM),
    _request(f"{READ_SEALED}.sealed.*.*.*", GATEWAYS, PLATFORM),
    _request("rpc.gateway.keys.*", OPERATORS, GATEWAYS),
    _request("rpc.billing.*.*", OPERATORS, PLATFORM),
    _request(subjects.attestation("platform", "*"), OPERATORS, PLATFORM),
    *(_request(subject, OPERATORS, PLATFORM) for subject in LOOK),
    _request(subjects.attestation("*", "*"), LOBBY, PLATFORM, subjects.from_lobby("*", "*")),
)


def _of_berth(name: str) -> tuple[Crossing, ...]:
    """The same for all: whose words they carry is in the permissions of the one who lives there."""
    return (
        _message(subjects.run_job("*"), GATEWAYS, name),
        _message(subjects.cancel_job("*"), GATEWAYS, name),
        _message(subjects.cancel_job("*"), PLATFORM, name),
        _message(subjects.acks("*"), PLATFORM, name),
        _message("tok.*.*.*.*", name, GATEWAYS),
        _message(subjects.HEARTBEATS, name, PLATFORM),
        _message(subjects.HEARTBEATS, name, OPERATORS),
        _request(subjects.submit_result("*"), name, PLATFORM),
        _request(subjects.attestation("*", "*"), name, PLATFORM),
        _request(subjects.books("*", "*"), name, PLATFORM),
        _request("sealed.*.*.*", name, PLATFORM),
        _request(f"{READ_SEALED}.sealed.*.*.*", name, PLATFORM),
    )


def berth(number: int) -> str:
    """The account's name of the berth with this number, counted from 1."""
    if not 1 <= number <= MAX_BERTHS:
        raise ValueError("there is no berth of this number")
    return f"BERTH_{number:04d}"


def berths(count: int) -> tuple[str, ...]:
    """The first `count` berths' names."""
    return tuple(map(berth, range(1, count + 1)))


def crossings(count: int) -> tuple[Crossing, ...]:
    """Every crossing of a network with this number of berths."""
    return (*_ALWAYS, *(crossing for name in berths(count) for crossing in _of_berth(name)))


def accounts_config(table: Iterable[Crossing]) -> dict[str, dict[str, Any]]:
    """Each account's exports and imports as nats-server reads them; exports name who may import."""
    exports: dict[str, dict[tuple[str, str], list[str]]] = {}
    imports: dict[str, list[dict[str, Any]]] = {}
    for crossing in table:
        # A message is exported by whom it comes from, a request by whom it goes to.
        if crossing.kind == "message":
            key, exporter, importer = "stream", crossing.source, crossing.target
        else:
            key, exporter, importer = "service", crossing.target, crossing.source
        arrives = crossing.arrives or crossing.subject
        exports.setdefault(exporter, {}).setdefault((key, arrives), []).append(importer)
        taken: dict[str, Any] = {key: {"account": exporter, "subject": arrives}}
        if crossing.arrives:
            taken["to"] = crossing.subject
        imports.setdefault(importer, []).append(taken)
    return {
        account: {
            "exports": [
                {key: subject, "accounts": importers}
                for (key, subject), importers in exports.get(account, {}).items()
            ],
            "imports": imports.get(account, []),
        }
        for account in {**exports, **imports}
    }
