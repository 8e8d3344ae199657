"""The embedded engine behind Triton's Python backend: one response per piece of an answer.

Runs in the backend's own process with the checkout's code. It writes no text of a request anywhere:
errors are codes, metrics are counts.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[5]
sys.path[:0] = [str(ROOT), str(ROOT / "libs")]

import numpy as np  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402

from cocoon.chat import COMPLETIONS, ENDPOINT, TokenLogprob, parse_request  # noqa: E402
from cocoon.kernel.clock import SystemRandomness  # noqa: E402
from cocoon.kernel.errors import BadRequest, CocoonError, RateLimited  # noqa: E402
from cocoon.telemetry.metrics import REGISTRY  # noqa: E402
from services.provider.backends.base import Ended, Output, Piece, Started  # noqa: E402
from services.provider.backends.onnx import OnnxBackend  # noqa: E402

ORPHAN_S: Final = 0.5  # how often it is seen whether the server still lives
SWEEP_S: Final = 0.02  # how often cancelled requests are looked for; asking costs a round trip
START_TIMEOUT_S, STOP_TIMEOUT_S = 60.0, 10.0
_STEPS: Final = "cocoon_engine_step_seconds_count"
STOP: Final = '{"stop_request"'  # how a request begins that stops another, by its id
STOPPED: Final = "stopped"  # asked for in the stream, not cut
_FINAL: Final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """Triton's contract: initialize, execute, finalize. The engine lives on a loop of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        _close_shared_memory()
        told = json.loads(args["model_config"])["parameters"]
        context, queue = (int(told[k]["string_value"]) for k in ("context_tokens", "queue_limit"))
        folder = ROOT / "models" / args["model_name"]
        self._engine = OnnxBackend(folder, queue_limit=queue, randomness=SystemRandomness())
        if self._engine.context_tokens != context:
            raise pb_utils.TritonModelException("context_tokens is not what the model's files say")
        self._live: dict[Any, asyncio.Task[None]] = {}
        self._gauges = _Gauges(args["model_name"])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="answers", daemon=True)
        self._thread.start()
        self._do(self._engine.start(), START_TIMEOUT_S)
        self._do(self._begin_sweeping(), START_TIMEOUT_S)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            self._loop.call_soon_threadsafe(self._begin, request, request.get_response_sender())

    def finalize(self) -> None:
        self._do(self._end(), STOP_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_TIMEOUT_S)
        del self._gauges  # later, the backend that they speak to is gone

    def _do(self, work: Any, timeout_s: float) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    # ---- on the loop ----

    def _begin(self, request: Any, sender: Any) -> None:
        work = self._answer(request, sender)
        self._live[sender] = self._loop.create_task(work, name=request.request_id())

    async def _answer(self, request: Any, sender: Any) -> None:
        try:
            text = _text(request, "request")
            if text.startswith(STOP):
                self._stop(json.loads(text)["stop_request"])
                return
            endpoint = COMPLETIONS if "prompt" in json.loads(text) else ENDPOINT
            asked = parse_request(endpoint, text.encode())
            outputs = self._engine.generate(
                asked,
                max_input_tokens=_number(request, "max_input_tokens"),
                max_output_tokens=_number(request, "max_output_tokens"),
            )
            try:
                async for output in outputs:
                    sender.send(_response(output))
            finally:
                await outputs.aclose()
            self._gauges.ended("complete")
        except asyncio.CancelledError as error:
            self._gauges.ended("stopped" if STOPPED in error.args else "cancelled")
        except Exception as error:  # noqa: BLE001 - the server writes texts of errors to its log
            self._gauges.ended("failed")
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(_code(error))))
        finally:
            self._live.pop(sender, None)
            sender.send(flags=_FINAL)

    def _stop(self, name: str) -> None:
        """An agent that leaves says so in its stream; only its own knows the request's id."""
        for task in self._live.values():
            if task.get_name() == name:
                task.cancel(STOPPED)

    async def _begin_sweeping(self) -> None:
        self._sweeper = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        while True:
            self._cancel_left()
            self._gauges.show(len(self._live))
            await asyncio.sleep(SWEEP_S)

    def _cancel_left(self) -> None:
        """A function of its own, so that no sleeping frame holds on to a sender."""
        for sender, task in list(self._live.items()):
            if sender.is_cancelled():
                task.cancel()

    async def _end(self) -> None:
        tasks = [self._sweeper, *self._live.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._engine.close()


def _end_with(server_pid: int) -> None:
    """A killed server leaves its models' processes behind; this one ends itself."""
    while os.getppid() == server_pid:
        time.sleep(ORPHAN_S)
    os._exit(1)


def _close_shared_memory() -> None:
    """Triton passes requests to this process in memory that it makes readable for everybody."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        parts = [part for line in maps for part in line.split()]
    shared = {part for part in parts if part.startswith("/dev/shm/")}  # noqa: S108 - the kernel's
    if not shared:
        raise pb_utils.TritonModelException("the backend's shared memory was not found")
    for path in shared:
        os.chmod(path, 0o600)


class _Gauges:
    """What the server's metrics say of the engine. Only changes cross the process's border."""

    def __init__(self, model: str) -> None:
        family, gauge = pb_utils.MetricFamily, pb_utils.MetricFamily.GAUGE
        counter = pb_utils.MetricFamily.COUNTER
        self._families = [
            family(name="cocoon_engine_running", description="Answers in the making.", kind=gauge),
            family(name="cocoon_engine_steps", description="Steps of the engine.", kind=counter),
            family(name="cocoon_engine_answers", description="Ended answers.", kind=counter),
        ]
        labels = {"model": model}
        self._running, self._steps = (f.Metric(labels=labels) for f in self._families[:2])
        self._ended = {
            outcome: self._families[2].Metric(labels={**labels, "outcome": outcome})
            for outcome in ("complete", "stopped", "cancelled", "failed")
        }
        self._shown, self._counted = 0, 0.0

    def show(self, running: int) -> None:
        if running != self._shown:
            self._running.set(running)
            self._shown = running
        steps = REGISTRY.get_sample_value(_STEPS) or 0.0
        if steps > self._counted:
            self._steps.increment(steps - self._counted)
            self._counted = steps

    def ended(self, outcome: str) -> None:
        self._ended[outcome].increment(1)


def _text(request: Any, name: str) -> str:
    value: bytes = pb_utils.get_input_tensor_by_name(request, name).as_numpy()[0]
    return value.decode("utf-8")


def _number(request: Any, name: str) -> int:
    return int(pb_utils.get_input_tensor_by_name(request, name).as_numpy()[0])


def _code(error: Exception) -> str:
    """An error as `cocoon-error:<family>:<code>:<param>`; never its text."""
    family = "engine"
    if isinstance(error, BadRequest):
        family = "request"
    elif isinstance(error, RateLimited):
        family = "busy"
    code = error.code if isinstance(error, CocoonError) else "engine_failed"
    param = (error.param if isinstance(error, CocoonError) else None) or ""
    return f"cocoon-error:{family}:{code}:{param}"


def _response(output: Output) -> Any:
    text, tokens, logprobs, reason, usage = "", 0, "", "", (0, 0, 0, 0)
    match output:
        case Started(prompt_tokens):
            usage = (prompt_tokens or 0, 0, 0, 0)
        case Piece():
            text, tokens = output.text, output.tokens
            if output.logprobs:
                logprobs = json.dumps([_logprob(item) for item in output.logprobs])
        case Ended():
            told = output.usage
            reason = output.reason
            usage = (told.prompt, told.completion, told.cached, told.reasoning)
    return pb_utils.InferenceResponse(
        [
            _texts("text", text),
            pb_utils.Tensor("tokens", np.array([tokens], np.int32)),
            _texts("logprobs", logprobs),
            _texts("finish_reason", reason),
            pb_utils.Tensor("usage", np.array(usage, np.int32)),
        ]
    )


def _texts(name: str, text: str) -> Any:
    return pb_utils.Tensor(name, np.array([text.encode()], dtype=np.object_))


def _logprob(item: TokenLogprob) -> list[Any]:
    """[bytes in hex, log probability, the likeliest rivals in the same form]."""
    return [item.raw.hex(), item.logprob, [_logprob(rival) for rival in item.top]]
