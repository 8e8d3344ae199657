"""Which NATS account an identity lives in, and which subjects cross between accounts. Pure.

A reply subject is a name that the asker chooses, and the server does not ask whether he may publish
there. Inside his own account he can therefore name anything; across a crossing the server puts a
private reply of its own in its place. So every provider has an account of its own, gateways and
operators have one each, and what is not in this table does not cross.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from cocoon.contracts import subjects

PLATFORM = "PLATFORM"  # matcher, billing, attestation, infra; the only one with JetStream
GATEWAYS, OPERATORS = "GATEWAYS", "OPERATORS"
NAMED = (PLATFORM, GATEWAYS, OPERATORS)  # every other account is a provider's

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
    """A subject that goes from one account into another under the same name.

    "message": one way, and costs nothing. "request": the answer comes back by a private subject
    that the server makes for it, about 60 us dearer.
    """

    kind: Literal["message", "request"]
    subject: str
    source: str
    target: str


def _message(subject: str, source: str, target: str) -> Crossing:
    return Crossing("message", subject, source, target)


def _request(subject: str, source: str, target: str) -> Crossing:
    return Crossing("request", subject, source, target)


_ALWAYS = (
    _message("rpc.matcher.*.*", GATEWAYS, PLATFORM),
    _message("mat.*.*", PLATFORM, GATEWAYS),
    _request(subjects.DIRECTORY_REQUEST, GATEWAYS, PLATFORM),
    _request("rpc.billing.*.balance", GATEWAYS, PLATFORM),
    _request("rpc.billing.*.dispute", GATEWAYS, PLATFORM),
    _request("sealed.*.*.*", GATEWAYS, PLATFORM),
    _request(f"{READ_SEALED}.sealed.*.*.*", GATEWAYS, PLATFORM),
    _request("rpc.gateway.keys.*", OPERATORS, GATEWAYS),
    _request("rpc.billing.*.*", OPERATORS, PLATFORM),
    _request(subjects.attestation("platform", "*"), OPERATORS, PLATFORM),
    *(_request(subject, OPERATORS, PLATFORM) for subject in LOOK),
)


def _of_provider(provider: str) -> tuple[Crossing, ...]:
    return (
        _request(subjects.run_job(provider), GATEWAYS, provider),
        _message(subjects.cancel_job(provider), GATEWAYS, provider),
        _message(subjects.cancel_job(provider), PLATFORM, provider),
        _message(subjects.acks(provider), PLATFORM, provider),
        _message(f"tok.*.{provider}.*.*", provider, GATEWAYS),
        _message(subjects.heartbeat(provider), provider, PLATFORM),
        _message(subjects.heartbeat(provider), provider, OPERATORS),
        _request(subjects.submit_result(provider), provider, PLATFORM),
        _request(subjects.attestation(provider, "*"), provider, PLATFORM),
        _request(f"sealed.{provider}.*.*", provider, PLATFORM),
        _request(f"{READ_SEALED}.sealed.{provider}.*.*", provider, PLATFORM),
    )


def crossings(providers: Iterable[str]) -> tuple[Crossing, ...]:
    """Every crossing of a network with these providers; a provider's account has its id's name."""
    return (
        *_ALWAYS,
        *(crossing for provider in providers for crossing in _of_provider(provider)),
    )


def account_config(account: str, table: Iterable[Crossing]) -> dict[str, Any]:
    """The account's exports and imports as nats-server reads them; exports name who may import."""
    exports: dict[tuple[str, str], list[str]] = {}
    imports: list[dict[str, dict[str, str]]] = []
    for crossing in table:
        # A message is exported by whom it comes from, a request by whom it goes to.
        if crossing.kind == "message":
            key, exporter, importer = "stream", crossing.source, crossing.target
        else:
            key, exporter, importer = "service", crossing.target, crossing.source
        if exporter == account:
            exports.setdefault((key, crossing.subject), []).append(importer)
        if importer == account:
            imports.append({key: {"account": exporter, "subject": crossing.subject}})
    return {
        "exports": [
            {key: subject, "accounts": importers} for (key, subject), importers in exports.items()
        ],
        "imports": imports,
    }
