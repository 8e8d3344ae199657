"""A dispute through a real gateway: to billing, of the key's own account, back as written."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from nats.aio.msg import Msg

from cocoon.contracts import subjects
from cocoon.contracts.events import DisputeOpened
from cocoon.contracts.messages import DisputeRequest, ErrorBody, Reply
from cocoon.eventlog.append import Appended
from tests.support.gateway_world import ACCOUNT, World, envelope, gateway_world
from tests.support.servers import Bus, Database

DISPUTE: dict[str, Any] = {
    "kind": "output_tokens", "counted_by": "bytes", "own_input_tokens": 3,
    "own_output_tokens": 4, "receipt": "ab" * 420,
}  # fmt: skip


class Billing:
    """Answers disputes as the real one does; keeps what it was asked."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.asked: list[DisputeRequest] = []
        self.refusal: ErrorBody | None = None

    async def heard(self, message: Msg) -> None:
        request = DisputeRequest.model_validate_json(message.data)
        self.asked.append(request)
        if self.refusal is not None:
            await message.respond(Reply(ok=False, error=self.refusal).to_canonical())
            return
        event = DisputeOpened(
            job_id=request.job_id, account_id=request.account_id, provider_id="prov_x", epoch=1,
            kind="output_tokens", counted_by="bytes", claimed_input_tokens=3,
            claimed_output_tokens=400, claimed_reasoning_tokens=0, own_input_tokens=3,
            own_output_tokens=4, receipt_hash="cd" * 32,
        )  # fmt: skip
        await message.respond(Reply(ok=True, data=event.to_canonical().decode()).to_canonical())


@pytest.fixture
async def world(bus: Bus, database: Database) -> AsyncIterator[World]:
    async with gateway_world(bus, database) as running:
        yield running


@pytest.fixture
async def billing(world: World) -> Billing:
    found = Billing(world)
    nc = await world.bus.connect("billing")
    await nc.subscribe(subjects.billing(1, "dispute"), cb=found.heard)
    await nc.flush()
    return found


async def send(world: World, job: str, body: Any = DISPUTE) -> httpx.Response:
    headers = world.headers()
    headers["content-type"] = "application/json"
    path = f"/v1/jobs/{job}/dispute"
    if isinstance(body, bytes):
        return await world.http.post(path, content=body, headers=headers)
    return await world.http.post(path, json=body, headers=headers)


async def test_a_dispute_reaches_billing_under_the_key_s_own_account(
    world: World, billing: Billing
) -> None:
    response = await send(world, "0f" * 16)
    assert response.status_code == 201
    told = response.json()
    assert told["id"] == "0f" * 16
    assert told["dispute"]["claimed_output_tokens"] == 400
    assert "account_id" not in told["dispute"]
    (asked,) = billing.asked
    assert (asked.job_id, asked.account_id) == ("0f" * 16, ACCOUNT)
    assert asked.dispute.model_dump() == DISPUTE


async def test_billing_s_refusal_is_the_answer(world: World, billing: Billing) -> None:
    billing.refusal = ErrorBody(status=403, code="wrong_receipt", message="not signed")
    response = await send(world, "0f" * 16)
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "wrong_receipt"


@pytest.mark.parametrize(
    ("body", "status"),
    [({}, 400), (b"{", 400), (b"x" * 4097, 413), ({**DISPUTE, "account_id": "acct_other"}, 400),
     ({**DISPUTE, "receipt": "ab"}, 400)],
)  # fmt: skip
async def test_what_is_no_dispute_goes_no_further(
    world: World, billing: Billing, body: Any, status: int
) -> None:
    assert (await send(world, "0f" * 16, body)).status_code == status
    assert billing.asked == []


async def test_only_a_post_with_a_key_disputes(world: World, billing: Billing) -> None:
    path = "/v1/jobs/" + "0f" * 16 + "/dispute"
    assert (await world.get(path)).status_code == 405
    assert (await world.http.post(path, json=DISPUTE)).status_code == 401
    assert (await send(world, "not-a-job")).status_code == 400  # as any plaintext is refused
    assert billing.asked == []


async def test_a_job_shows_its_dispute(world: World) -> None:
    job_id, sealed = envelope()
    assert (await world.post(sealed)).status_code == 200
    assert (await world.get(f"/v1/jobs/{job_id}")).json()["dispute"] is None
    event = DisputeOpened(
        job_id=job_id, account_id=ACCOUNT, provider_id=world.provider.id, epoch=1,
        kind="output_tokens", counted_by="tokenizer", claimed_input_tokens=3,
        claimed_output_tokens=400, claimed_reasoning_tokens=0, own_input_tokens=3,
        own_output_tokens=4, receipt_hash="cd" * 32,
    )  # fmt: skip
    await put_dispute(world, job_id, event)
    told = (await world.get(f"/v1/jobs/{job_id}")).json()["dispute"]
    assert (told["kind"], told["own_output_tokens"]) == ("output_tokens", 4)


async def put_dispute(world: World, job_id: str, event: DisputeOpened) -> None:
    from cocoon.contracts.commands import OpenDispute
    from services.billing import decide

    item = decide.dispute_item(OpenDispute(**event.model_dump()), (event,))
    assert isinstance(await world.billing.append(item), Appended)
