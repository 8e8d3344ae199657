"""`cocoon up` from a person's first start to a kill -9 and a folder on a full disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.asking import ask, jobs_requested, quiet_balance, wait_ended
from tests.support.network import ROOT, LiveNetwork


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder that the unprivileged Postgres may walk to; pytest's own are closed."""
    folder = Path(tempfile.mkdtemp(prefix="cocoon-up-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def say(network: LiveNetwork) -> str:
    answer = httpx.post(
        f"{network.sidecar}/chat/completions", json=ask("Reverse: cocoon"), timeout=30,
        trust_env=False,
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "noococ"
    job: str = answer.headers["x-cocoon-job-id"]
    wait_ended(network, job)
    return job


def processes(network: LiveNetwork) -> dict[str, int]:
    found: dict[str, int] = json.loads(network.folder.processes.read_text())
    assert set(found) >= {
        "attestation", "billing", "matcher", "gateway", "provider", "sidecar", "postgres", "nats",
    }  # fmt: skip
    assert all(psutil.pid_exists(pid) for pid in found.values())
    return found


def of_folder(folder: Path) -> list[str]:
    """Every process whose command line or environment names the folder, ours left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            told = [*process.cmdline(), *process.environ().values()]
            if any(str(folder) in part for part in told):
                found.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
        except psutil.Error:
            continue
    return found


def wait_gone(folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while found := of_folder(folder):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def refused(*arguments: str) -> str:
    """What `cocoon up` says when it does not start: one sentence on stderr, nothing else."""
    done = LiveNetwork(Path("/nonexistent")).command("up", *arguments)
    place = done.index("--data")
    ran = subprocess.run(
        done[:place] + done[place + 2 :], cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "Traceback" not in ran.stderr
    sentence, *more = [line for line in ran.stderr.splitlines() if not line.startswith("[")]
    assert more == [], ran.stderr
    assert sentence.startswith("cocoon: ")
    return sentence.removeprefix("cocoon: ")


def test_a_network_lives_through_stops_kills_and_a_fresh_start(home: Path) -> None:
    data = home / "life"
    network = LiveNetwork(data)
    network.start()
    try:
        _first_life(network)
        assert network.stop() == 0
        assert of_folder(data) == []
        assert not network.folder.running.exists()
        _second_life(network)
        _killed(network)
        _third_life(network)
        assert network.stop() == 0
        wait_gone(data, 1)
    finally:
        network.stop()
        for line in of_folder(data):
            os.kill(int(line.split()[0]), signal.SIGKILL)


def _first_life(network: LiveNetwork) -> None:
    processes(network)
    say(network)
    sentence = refused("--data", str(network.data))
    assert sentence.startswith(f"a network already runs from {network.data} (process ")
    assert str(network.process.pid) in sentence if network.process else False
    port = str(httpx.URL(network.gateway).port)
    other = network.data.with_name("other")
    for option in ("--gateway-port", "--sidecar-port"):
        sentence = refused("--data", str(other), option, port)
        assert sentence.startswith(f"port {port} for the ")
        assert option in sentence
    network.first = (network.api_key, quiet_balance(network), jobs_requested(network))  # type: ignore[attr-defined]
    network.first_bus = network.running.nats_url  # type: ignore[attr-defined]


def _second_life(network: LiveNetwork) -> None:
    """The key, the money and the log go on, and providers find the bus where it was."""
    key, money, jobs = network.first  # type: ignore[attr-defined]
    network.start()
    assert network.running.nats_url == network.first_bus  # type: ignore[attr-defined]
    assert network.api_key == key
    assert quiet_balance(network) == money
    say(network)
    assert jobs_requested(network) == jobs + 1
    assert quiet_balance(network) == money - 6400
    assert network.cli("replay", "--verify").returncode == 0


def _killed(network: LiveNetwork) -> None:
    """kill -9 of `up`: everything follows it; a server that does not is found by the next start."""
    pids = processes(network)
    assert network.process is not None
    network.process.kill()
    network.process.wait(10)
    deadline = time.monotonic() + 40
    while any(map(_alive, pids.values())):
        assert time.monotonic() < deadline, "a process outlives its supervisor"
        time.sleep(0.1)
    assert network.cli("status").stderr.startswith(f"cocoon: no network runs from {network.data}")
    left = _leftover(network)
    network.folder.write_processes({**pids, "nats": left.pid})
    done = network.cli("status")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"cocoon: the last network here was killed; nats (pid {left.pid}) still runs: "
        f"./cocoon up --data {network.data} ends it\n"
    )
    if network.process.stdout:
        network.process.stdout.close()
    network.process = None
    said = network.output.stat().st_size
    network.start()
    told = network.output.read_text()[said:]
    assert told == ("cocoon: the last network here was killed; ended what it left running: nats\n")
    assert left.wait(10) == -signal.SIGTERM
    again = processes(network)
    assert not set(again.values()) & set(pids.values())
    say(network)
    assert network.cli("replay", "--verify").returncode == 0
    assert network.stop() == 0
    assert of_folder(network.data) == []


def _leftover(network: LiveNetwork) -> subprocess.Popen[bytes]:
    """A process that looks like a server of this folder which its supervisor left behind."""
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)",
                             f"{network.data}/nats/nats.conf"])  # fmt: skip


def _third_life(network: LiveNetwork) -> None:
    """--fresh forgets everything; stdout is one line."""
    key, _, _ = network.first  # type: ignore[attr-defined]
    network.start("--fresh")
    assert network.api_key != key
    assert quiet_balance(network) == 10_000_000_000
    assert jobs_requested(network) == 0
    say(network)
    process = network.process
    assert process is not None
    assert process.stdout is not None
    process.send_signal(signal.SIGINT)
    assert process.stdout.read() == ""


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_folder_that_cannot_be_made_gets_a_sentence(home: Path) -> None:
    file = home / "file"
    file.write_text("mine")
    for place in (file, file / "below", Path("/proc/cocoon")):
        sentence = refused("--data", str(place))
        assert sentence.startswith(f"the data folder {place} cannot be made or written (")
        assert sentence.endswith("name another one with --data DIR")
    assert file.read_text() == "mine"


def test_fresh_never_clears_a_folder_that_no_network_made(home: Path) -> None:
    mine = home / "documents"
    (mine / "letters").mkdir(parents=True)
    (mine / "letters" / "one.txt").write_text("dear")
    sentence = refused("--data", str(mine), "--fresh")
    assert "is not a network's folder, so nothing in it was changed" in sentence
    assert [path.name for path in mine.iterdir()] == ["letters"]
    assert (mine / "letters" / "one.txt").read_text() == "dear"


def test_a_disk_without_room_gets_a_sentence(home: Path) -> None:
    small = home / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "cocoon-test", str(small)],
        capture_output=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        sentence = refused("--data", str(small / "data"))
        assert sentence.startswith(f"the disk of {small / 'data'} has 1")
        assert "name another --data DIR" in sentence
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_start_that_is_interrupted_leaves_nothing(home: Path) -> None:
    data = home / "interrupted"
    command = LiveNetwork(data).command("up", "--gateway-port", "0", "--sidecar-port", "0")
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while "starting attestation" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert of_folder(data) == []


@pytest.mark.usefixtures("hearing_hangups")
def test_a_closed_terminal_and_a_reader_that_left_stop_everything_in_order(home: Path) -> None:
    data = home / "hangup"
    network = LiveNetwork(data)
    network.start()
    process = network.process
    assert process is not None
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    network.stop()
    assert of_folder(data) == []
    reading, writing = os.pipe()
    os.close(reading)  # as of `up 2>&1 | head`
    try:
        command = network.command("up", "--gateway-port", "0", "--sidecar-port", "0")
        for stdout_only in (True, False):
            stderr = subprocess.PIPE if stdout_only else writing
            done = subprocess.run(
                command, cwd=ROOT, stdout=writing, stderr=stderr, timeout=90, check=False
            )
            assert done.returncode == 130
            if stdout_only:
                assert b"Error" not in done.stderr
            assert of_folder(data) == []
    finally:
        os.close(writing)


def test_under_nohup_a_closed_terminal_changes_nothing(home: Path) -> None:
    data = home / "nohup"
    network = LiveNetwork(data)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        network.start()
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        assert network.process is not None
        network.process.send_signal(signal.SIGHUP)
        say(network)
    finally:
        assert network.stop() == 0


def test_an_unusable_backend_address_gets_a_sentence() -> None:
    assert "is not a backend's address" in refused("--backend", "vllm:8000")


def test_a_backend_that_is_not_there_gets_one_plain_sentence_of_this_start(home: Path) -> None:
    data = home / "backend"
    with socket.socket() as bound:  # nobody accepts there
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        log = data / "logs" / "provider.log"
        for _ in range(2):
            sentence = refused("--data", str(data), "--backend", url, "--model", "foo",
                               "--gateway-port", "0", "--sidecar-port", "0")  # fmt: skip
            assert sentence == (
                f"provider did not start: the engine's server {url} does not answer "
                f"(connection refused); start it first (log: {log})"
            )


def test_a_port_outside_the_range_is_a_wrong_call() -> None:
    done = subprocess.run(
        LiveNetwork(Path("/nonexistent")).command("up", "--gateway-port", "70000"), cwd=ROOT,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (64, "")
    assert not Path("/nonexistent").exists()


def test_a_taken_port_is_known_even_if_nobody_accepts_there(home: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = str(bound.getsockname()[1])
        sentence = refused("--data", str(home / "bound"), "--gateway-port", port)
    assert port in sentence
