"""The arms: every way to the same zero-work engine, started once and measured in turn."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from benchmarks import installed
from benchmarks.caller import Spec
from benchmarks.processes import (
    ROOT,
    Groups,
    cpu_s,
    machine_busy_s,
    network_groups,
    process,
    wait_for,
)
from benchmarks.zero_work_engine import MODEL
from cocoon.devnet.folder import DataFolder
from cocoon.devnet.ports import free_port

ENGINE, SIDECAR, SDK = "engine", "Cocoon, sidecar", "Cocoon, SDK"
LITELLM, LITELLM_TWO, PORTKEY = "LiteLLM", "LiteLLM, 2 workers", "Portkey"
VOLATILE = "Cocoon, volatile"
SETTLE_S = 0.4  # what follows an answer (payment, books) belongs to its job
CALLER_TIMEOUT_S = 120
PROVIDER_CONCURRENCY = 256  # more than any load: places are not what is measured


@dataclass(frozen=True)
class Arm:
    """One way to the engine. `groups`: its processes, for the CPU that a job costs."""

    name: str
    url: str
    key: str
    groups: Groups
    headers: dict[str, str] = field(default_factory=dict)
    trust: str = ""  # the SDK's arm: its caller is its client

    @property
    def in_process(self) -> bool:
        return bool(self.trust)

    def spec(self, **load: object) -> Spec:
        return Spec(self.url, self.key, self.headers, self.trust, **load)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Run:
    """One load on one arm."""

    seconds: float
    done: int
    words: int
    events: int
    first_ms: Sequence[float]
    whole_ms: Sequence[float]
    cpu_s: Mapping[str, float]  # the arm's, by group; the SDK's client is among them
    caller_cpu_s: float
    engine_cpu_s: float
    others_cpu_s: float  # of the machine's other programs: what disturbed the run

    @property
    def rate(self) -> float:
        return self.done / self.seconds

    @property
    def arm_cpu_s(self) -> float:
        return sum(self.cpu_s.values())


class Arms:
    """What runs, by name, and the reasons for what does not."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack, self._folder = stack, folder
        self.by_name: dict[str, Arm] = {}
        self.left_out: list[str] = []
        folder.mkdir(exist_ok=True)
        port = free_port()
        self.engine_url = f"http://127.0.0.1:{port}/v1"
        command = [sys.executable, "-m", "benchmarks.zero_work_engine", str(port)]
        self._engine = self._start(command)
        wait_for(port)
        self._add(Arm(ENGINE, self.engine_url, "none", {}))

    def __getitem__(self, name: str) -> Arm:
        return self.by_name[name]

    def has(self, *names: str) -> list[Arm]:
        return [self.by_name[name] for name in names if name in self.by_name]

    def start_proxies(self) -> None:
        """LiteLLM with one worker and with two, and Portkey; what cannot run is left out."""
        for name, workers in ((LITELLM, 1), (LITELLM_TWO, 2)):
            command = partial(installed.litellm_command, self._folder, self.engine_url, workers)
            self._start_proxy(name, "sk-bench", {}, command)
        headers = installed.portkey_headers(self.engine_url)
        self._start_proxy(
            PORTKEY, "none", headers, partial(installed.portkey_command, self._folder)
        )

    def _start_proxy(
        self, name: str, key: str, headers: dict[str, str], command: Callable[[int], list[str]]
    ) -> None:
        port = free_port()
        try:
            started = self._start(command(port), installed.LITELLM_ENVIRONMENT)
            wait_for(port)
            groups = {name: frozenset({started.pid})}
            arm = Arm(name, f"http://127.0.0.1:{port}/v1", key, groups, headers)
            run(arm, self._engine.pid, mode="closed", seconds=1.0, at_once=8)
        except installed.NotInstalled as error:
            self.left_out.append(str(error))
        except RuntimeError as error:
            self.left_out.append(f"{name} does not answer: {error}")
        else:
            self._add(arm)

    def start_network(self, *, volatile: bool = False) -> None:
        """A whole network before the engine; `volatile`: benchmarks.volatile's."""
        data = self._folder / f"network-{'volatile' if volatile else 'durable'}"
        module = "benchmarks.volatile" if volatile else "cocoon.cli"
        ready, folder, groups = start_network(self._stack, data, self.engine_url, module=module)
        if volatile:
            self._add(Arm(VOLATILE, ready["sidecar"], "any", groups))
            return
        self._add(Arm(SIDECAR, ready["sidecar"], "any", groups))
        without = {name: pids for name, pids in groups.items() if name != "sidecar"}
        self._add(Arm(SDK, ready["gateway"], ready["api_key"], without, trust=str(folder.trust)))

    def run(self, name: str, **load: object) -> Run:
        return run(self.by_name[name], self._engine.pid, **load)

    def _add(self, arm: Arm) -> None:
        self.by_name[arm.name] = arm

    def _start(
        self, command: list[str], env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        return self._stack.enter_context(process(command, env=env))


def start_network(
    stack: ExitStack, data: Path, engine: str, *, module: str = "cocoon.cli",
    options: Sequence[str] = (),
) -> tuple[dict[str, str], DataFolder, Groups]:  # fmt: skip
    """`cocoon up`, afresh, before the engine: its ready line, its folder, its processes."""
    command = [
        sys.executable, "-m", module, "up", "--json", "--fresh", "--data", str(data),
        "--gateway-port", "0", "--sidecar-port", "0", "--backend", engine, "--model", MODEL,
        "--concurrency", str(PROVIDER_CONCURRENCY), *options,
    ]  # fmt: skip
    started = stack.enter_context(process(command))
    assert started.stdout is not None
    line = started.stdout.readline()
    if not line:
        raise RuntimeError(f"the network did not start; {data}/logs says why")
    folder = DataFolder(data)
    return json.loads(line), folder, network_groups(folder.read_processes(), started.pid)


def run(arm: Arm, engine_pid: int, **load: object) -> Run:
    """One load in a caller of its own. Raises RuntimeError with what the caller said."""
    spec = arm.spec(**load)
    groups: dict[str, frozenset[int]] = {**arm.groups, "the engine": frozenset({engine_pid})}
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.caller"], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as caller:  # fmt: skip
        assert caller.stdin is not None
        assert caller.stdout is not None
        caller.stdin.write(json.dumps(asdict(spec)) + "\n")
        caller.stdin.flush()
        caller.stdout.readline()
        time.sleep(SETTLE_S)
        before, busy_s = cpu_s(groups), machine_busy_s()
        try:
            told, errors = caller.communicate("go\n", timeout=CALLER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            caller.kill()
            raise RuntimeError(f"no end within {CALLER_TIMEOUT_S} s") from None
    if caller.returncode:
        raise RuntimeError(errors.strip().splitlines()[-1] if errors.strip() else "no answer")
    figures = json.loads(told)
    if not figures["done"]:
        raise RuntimeError("nothing was answered within the time")
    time.sleep(SETTLE_S)
    busy_s = machine_busy_s() - busy_s
    used = {name: total - before[name] for name, total in cpu_s(groups).items()}
    caller_cpu_s = figures.pop("cpu_s")
    engine_cpu_s = used.pop("the engine")
    others_s = max(0.0, busy_s - sum(used.values()) - engine_cpu_s - caller_cpu_s)
    if arm.in_process:
        used["client"] = caller_cpu_s
    return Run(
        **figures, cpu_s=used, caller_cpu_s=caller_cpu_s, engine_cpu_s=engine_cpu_s,
        others_cpu_s=others_s,
    )  # fmt: skip
