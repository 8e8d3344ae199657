"""One provider's flood of results for jobs that nobody asked for; another's payment is not late."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from nacl.signing import SigningKey

from cocoon.bus import streams
from cocoon.bus.ingress import IngressWorker
from cocoon.bus.permissions import INGRESS_DURABLE
from cocoon.bus.publish import publish_durable
from cocoon.contracts import subjects
from cocoon.contracts.messages import ResultAck, SubmitResult, submission_bytes
from cocoon.kernel.errors import Unavailable
from services.billing.handlers import Ingress
from services.billing.results import JOB_NOT_COMMITTED
from tests.support.servers import Bus

WINDOW = 64  # max_ack_pending, smaller than deployed: a flood is sooner larger than it
FLOOD = 300


class OneJobIsKnown:
    """The log holds one job: billing settles it, and waits for all others."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id

    def is_live(self, result: SubmitResult) -> bool:
        return result.job_id == self._job_id

    async def on_submit_result(self, result: SubmitResult, _traceparent: str) -> ResultAck:
        if result.job_id != self._job_id:
            raise Unavailable("the job is not in the log yet", code=JOB_NOT_COMMITTED)
        return ResultAck(
            job_id=result.job_id, epoch=result.epoch, outcome="result_sealed", reason="none"
        )


def submission(provider_id: str, key: SigningKey, job_id: str) -> bytes:
    receipt, blob = "00" * 420, "0" * 64
    signed = submission_bytes(provider_id, job_id, 1, receipt, blob)
    return SubmitResult(
        provider_id=provider_id, job_id=job_id, epoch=1, receipt=receipt, blob_hash=blob,
        response_bytes=9, signature=key.sign(signed).signature.hex(),
    ).to_canonical()  # fmt: skip


@contextlib.asynccontextmanager
async def working(bus: Bus, job_id: str) -> AsyncIterator[None]:
    nc = await bus.connect("billing")
    ingress = Ingress(OneJobIsKnown(job_id), nc, wait_s=3600)  # type: ignore[arg-type]
    worker = IngressWorker(
        nc,
        subjects.INGRESS_STREAM,
        INGRESS_DURABLE,
        ingress.on_message,
        declare=streams.declare_ingress_consumer,
        workers=256,
    )
    task = asyncio.create_task(worker.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_flooding_provider_does_not_delay_anothers_settlement(bus: Bus) -> None:
    liar, honest = bus.providers
    key = SigningKey.generate()
    config = {**streams.ingress_durable(), "max_ack_pending": WINDOW}
    verb = f"CONSUMER.DURABLE.CREATE.INGRESS.{INGRESS_DURABLE}"
    body = {"stream_name": subjects.INGRESS_STREAM, "config": config}
    await streams.api(await bus.connect("infra"), verb, body)
    flooding = (await bus.connect(liar)).jetstream()
    forged = [submission(liar, key, f"{n:032x}") for n in range(FLOOD)]
    for at in range(0, FLOOD, 50):
        await asyncio.gather(*(
            publish_durable(
                flooding, subjects.submit_result(liar), one, stream=subjects.INGRESS_STREAM
            )
            for one in forged[at : at + 50]
        ))  # fmt: skip
    job_id = "a" * 32
    nc = await bus.connect(honest)
    acked = await nc.subscribe(subjects.acks(honest))
    await publish_durable(
        nc.jetstream(), subjects.submit_result(honest), submission(honest, key, job_id),
        stream=subjects.INGRESS_STREAM,
    )  # fmt: skip
    async with working(bus, job_id):
        # What may wait of the flood waits for an hour, see above: longer than this.
        message = await acked.next_msg(timeout=30)
    assert ResultAck.model_validate_json(message.data).outcome == "result_sealed"


async def test_a_provider_that_fills_its_part_of_the_queue_leaves_the_others_theirs(
    bus: Bus,
) -> None:
    infra = await bus.connect("infra")
    config = {**streams.ingress_config(), "max_msgs_per_subject": 3}
    await streams.api(infra, "STREAM.UPDATE.INGRESS", config)
    for provider, count in zip(bus.providers, (4, 1), strict=True):
        js = (await bus.connect(provider)).jetstream()
        for n in range(count):
            send = publish_durable(
                js, subjects.submit_result(provider), b"%d" % n, stream=subjects.INGRESS_STREAM
            )
            if n < 3:
                await send
                continue
            with pytest.raises(Unavailable):  # and the agent submits it again later
                await send


async def test_an_older_queue_is_given_its_bounds(bus: Bus) -> None:
    infra = await bus.connect("infra")
    config = streams.ingress_config()
    del config["discard_new_per_subject"]
    await streams.api(infra, "STREAM.UPDATE.INGRESS", {**config, "max_msgs_per_subject": -1})
    for _ in range(2):
        await streams.declare_streams(infra, (0, 1, 2))
    found = (await streams.api(infra, "STREAM.INFO.INGRESS"))["config"]
    assert found["max_msgs_per_subject"] == streams.INGRESS_MAX_OF_ONE
    assert found["discard_new_per_subject"] is True
