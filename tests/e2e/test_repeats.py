"""Nobody pays twice: Idempotency-Key, the SDK's own retries, lines that break in the middle."""

from __future__ import annotations

import concurrent.futures
import re
import uuid

import httpx
import openai
import pytest

from cocoon.client import NetworkOptions
from tests.support.asking import ENDLESS, ask, get, jobs_requested, quiet_balance, wait_ended
from tests.support.cutting_proxy import cutting
from tests.support.network import LiveNetwork
from tests.support.ways import Way, way

WARM = {**ENDLESS, "max_tokens": 80}  # a second run would hardly say the same


def keyed() -> dict[str, dict[str, str]]:
    return {"extra_headers": {"Idempotency-Key": str(uuid.uuid4())}}


@pytest.mark.parametrize("stream", [False, True])
def test_the_same_key_twice_is_one_job_and_the_same_bytes(
    network: LiveNetwork, client: Way, stream: bool
) -> None:
    jobs, key = jobs_requested(network), keyed()
    _, first = client.raw(**WARM, stream=stream, **key)
    _, again = client.raw(**WARM, stream=stream, **key)
    assert first == again
    assert jobs_requested(network) == jobs + 1
    with pytest.raises(openai.ConflictError) as caught:
        client.raw(**WARM | {"max_tokens": 81}, stream=stream, **key)
    assert (caught.value.status_code, caught.value.code) == (409, "idempotency_mismatch")
    assert jobs_requested(network) == jobs + 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_same_key_at_the_same_time_is_one_job_and_the_same_bytes(
    network: LiveNetwork, sidecar: Way, options: NetworkOptions, stream: bool
) -> None:
    jobs = jobs_requested(network)
    with way("sync in-process", "", options) as inside:
        for client in (sidecar, inside):
            key = keyed()
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                bodies = list(
                    pool.map(lambda _: client.raw(**WARM, stream=stream, **key)[1], range(4))  # noqa: B023
                )
            assert len(set(bodies)) == 1
    assert jobs_requested(network) == jobs + 2


def test_two_clients_with_one_key_never_make_two_jobs(
    network: LiveNetwork, options: NetworkOptions
) -> None:
    """Another client cannot have the same sealed bytes, so it is told, and pays nothing.

    That is of clients without a state directory: one that has a secret of its own has keys of
    its own, too.
    """
    assert options.state_dir is None
    jobs, key = jobs_requested(network), keyed()
    with way("sync in-process", "", options) as first:
        first.complete(**WARM, **key)
    with way("sync in-process", "", options) as other, pytest.raises(openai.ConflictError):
        other.complete(**WARM, **key)
    assert jobs_requested(network) == jobs + 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("cuts", [[0], [0, 0], [40, 300]])
def test_the_sdks_own_retry_gets_the_same_job(
    network: LiveNetwork, cuts: list[int | None], stream: bool
) -> None:
    """The line between the SDK and the sidecar breaks before the answer, or in its first bytes."""
    if stream and cuts[-1]:
        cuts = [40, 60]  # the SDK does not try again once a stream has begun
    jobs, before = jobs_requested(network), quiet_balance(network)
    with cutting(network.sidecar, "/v1") as proxy:
        proxy.cuts.extend(cuts)
        with openai.OpenAI(base_url=proxy.url, api_key="any", max_retries=3) as client:
            if stream:
                chunks = list(client.chat.completions.create(**WARM, stream=True))
                answer_id, text = chunks[0].id, _text(chunks)
            else:
                whole = client.chat.completions.create(**WARM)
                answer_id, text = whole.id, whole.choices[0].message.content or ""
        assert (proxy.broken, proxy.requests) == (len(cuts), len(cuts) + 1)
    assert len(text) > 20
    assert jobs_requested(network) == jobs + 1
    job = wait_ended(network, answer_id.removeprefix("chatcmpl-"))
    assert before - quiet_balance(network) == int(job["price_nanoton"])


def _text(chunks: list[openai.types.chat.ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@pytest.mark.parametrize("name", ["sync in-process", "async in-process"])
@pytest.mark.parametrize("cuts", [[0], [1, 900, 2500], [1500, 0]])
def test_a_line_to_the_gateway_that_breaks_in_a_whole_answer_is_continued(
    network: LiveNetwork, options: NetworkOptions, name: str, cuts: list[int | None]
) -> None:
    jobs, before = jobs_requested(network), quiet_balance(network)
    with cutting(network.gateway) as proxy:
        through = NetworkOptions(proxy.url, options.trust, api_key=options.api_key)
        with way(name, "", through) as client:
            client.complete(**ask("Reverse: cocoon"))  # it knows the directory
            proxy.cuts.extend(cuts)
            answer = client.complete(**WARM)
        assert proxy.broken == len([cut for cut in cuts if cut is not None])
    assert jobs_requested(network) == jobs + 2
    job = wait_ended(network, answer.id.removeprefix("chatcmpl-"))
    assert before - quiet_balance(network) == int(job["price_nanoton"]) + 6400


@pytest.mark.parametrize("name", ["sync in-process", "async in-process"])
@pytest.mark.parametrize("cut", [0, 1500])
def test_a_line_to_the_gateway_that_breaks_in_a_stream_is_never_a_second_job(
    network: LiveNetwork, options: NetworkOptions, name: str, cut: int
) -> None:
    """A broken line looks like a client that left, so the gateway cancels: the client gets the
    whole answer if it was made by then, or else an error that says what was charged.
    """
    with cutting(network.gateway) as proxy:
        through = NetworkOptions(proxy.url, options.trust, api_key=options.api_key)
        with way(name, "", through) as client:
            client.complete(**ask("Reverse: cocoon"))
            jobs, before = jobs_requested(network), quiet_balance(network)
            proxy.cuts.append(cut)
            try:
                _, body = client.raw(**WARM, stream=True)
                end = body.split(b"\n\n")[-2].decode()
            except openai.ConflictError as error:
                end = error.response.text
        assert proxy.broken == 1
    assert jobs_requested(network) == jobs + 1
    paid = before - quiet_balance(network)
    told = re.search(r"cancelled; (\d+) nanoTON were charged", end)
    assert end == "data: [DONE]" or (told is not None and int(told[1]) == paid), end


def test_a_settled_response_is_read_again_in_parts(network: LiveNetwork, sidecar: Way) -> None:
    answer = sidecar.complete(**WARM)
    job_id = answer.id.removeprefix("chatcmpl-")
    job = wait_ended(network, job_id)
    whole = get(network, f"/v1/jobs/{job_id}/response")
    assert (whole.status_code, len(whole.content)) == (200, job["result"]["response_bytes"])
    part = httpx.get(
        f"{network.gateway}/v1/jobs/{job_id}/response", trust_env=False,
        headers={"Authorization": f"Bearer {network.api_key}", "Range": "bytes=100-"},
    )  # fmt: skip
    assert (part.status_code, part.content) == (206, whole.content[100:])
    assert b"choices" not in whole.content
