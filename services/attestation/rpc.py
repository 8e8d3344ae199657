"""The door: subjects to handlers, errors to Replies. One span and one bounded worker a request."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from pydantic import ValidationError

from cocoon.contracts import subjects
from cocoon.contracts.base import Contract
from cocoon.contracts.messages import H_TRACEPARENT, ErrorBody, Heartbeat, Reply
from cocoon.kernel import canonical
from cocoon.kernel.errors import BadRequest, CocoonError, Fatal, Forbidden, Unavailable
from cocoon.telemetry.logs import get_logger
from cocoon.telemetry.tracing import inject, span
from services.attestation.handlers import TOO_OFTEN, Attestation

if TYPE_CHECKING:
    from faststream.nats import NatsBroker
    from faststream.nats.message import NatsMessage

log = get_logger("services.attestation.rpc")
WORKERS = 16  # requests of one verb that are handled at once; the rest wait in the subscription
PLATFORM = "platform"
_PROVIDER = re.compile(r"prov_[0-9a-f]{32}\Z")

Handler = Callable[[str, bytes, str], Awaitable[dict[str, object] | Contract | bytes]]


def wire(broker: NatsBroker, service: Attestation) -> None:
    """Subscribe every verb and the heartbeats."""
    verbs: dict[str, dict[str, Handler]] = {
        "*": {
            "enrol": service.do_enrol,
            "challenge": service.do_challenge,
            "submit_evidence": service.do_submit_evidence,
            "publish_offer": service.do_publish_offer,
            "publish_profile": service.do_publish_profile,
            "publish_bundle": service.do_publish_bundle,
            "publish_manifest": service.do_publish_manifest,
            "standing": service.do_standing,
        },
        PLATFORM: {
            "directory": service.do_directory,
            "manifest": service.manifests.do_manifest,
            "policy": service.do_policy,
            "ban": service.do_ban,
            "canary": service.do_canary,
        },
    }
    lobby: dict[str, Handler] = dict.fromkeys(verbs["*"], service.do_refuse_from_lobby)
    lobby["enrol"] = service.do_enrol_from_lobby
    lobby["standing"] = service.do_standing_from_lobby  # whoever is not let in may ask why
    for verb, handler in lobby.items():
        subscribe = broker.subscriber(
            subjects.from_lobby("*", verb), max_workers=WORKERS, decoder=_undecoded
        )
        subscribe(_door(service, verb, handler))
    for who, handlers in verbs.items():
        for verb, handler in handlers.items():
            subscribe = broker.subscriber(
                subjects.attestation(who, verb), max_workers=WORKERS, decoder=_undecoded
            )
            subscribe(_door(service, verb, handler))

    @broker.subscriber(subjects.HEARTBEATS, decoder=_undecoded)
    async def on_heartbeat(message: NatsMessage) -> None:
        try:
            beat = Heartbeat.model_validate_json(message.raw_message.data)
        except ValidationError:
            return
        if message.raw_message.subject == subjects.heartbeat(beat.provider_id):
            service.on_heartbeat(beat)


async def _undecoded(message: NatsMessage) -> NatsMessage:
    return message


def _door(
    service: Attestation, verb: str, handler: Handler
) -> Callable[[NatsMessage], Awaitable[bytes]]:
    async def on_request(message: NatsMessage) -> bytes:
        raw = message.raw_message
        parent = (raw.headers or {}).get(H_TRACEPARENT, "")
        reply = await answer(service, verb, handler, raw.subject, raw.data, parent)
        return reply.model_dump_json().encode()

    return on_request


async def answer(
    service: Attestation, verb: str, handler: Handler, subject: str, body: bytes, parent: str
) -> Reply:
    """Run one request. Never raises; an invariant that broke also stops the service."""
    who = subject.split(".")[2]
    provider = who if _PROVIDER.match(who) else None
    with span(f"attestation.{verb}", parent, {"provider_id": provider or "none"}):
        try:
            if who != PLATFORM and provider is None:
                raise Forbidden("this subject does not name a provider", code="identity_mismatch")
            done = await handler(who, body, inject() or parent)
            return Reply(ok=True, data=_text(done))
        except ValidationError:
            return _refused(BadRequest("the request does not have the form that this verb takes"))
        except Fatal as error:
            service.stop(error)
            return _refused(Unavailable("attestation is stopping; try again", retry_after_s=2))
        except CocoonError as error:
            if error.code == TOO_OFTEN:  # who asks for ever writes neither logs nor memory
                return _refused(error)
            log.info("request_refused", verb=verb, provider_id=provider, code=error.code)
            if provider is not None:
                service.on_refusal(provider, verb, error)
            return _refused(error)
        except Exception:  # a provider waits for an answer, whatever broke
            log.exception("request_failed", verb=verb, provider_id=provider)
            return _refused(CocoonError("attestation failed on its side; try again shortly"))


def _text(done: dict[str, object] | Contract | bytes) -> str:
    if isinstance(done, bytes):
        return done.decode()
    data = done.to_canonical() if isinstance(done, Contract) else canonical.dumps(done)
    return data.decode()


def _refused(error: CocoonError) -> Reply:
    body = ErrorBody(
        status=error.http_status,
        code=error.code,
        message=error.message[:1000],
        retry_after_s=error.retry_after_s,
    )
    return Reply(ok=False, error=body)
