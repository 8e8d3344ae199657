"""The doctor's checks of this machine: TEE, GPU, files and their modes, disk, core dumps.

Each is a function of paths and texts, so that a test can show it every state.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cocoon.agent.config import LOOPBACK, AgentConfig, ModelConfig
from services.provider.findings import Finding, fail, ok, warn

TSM_REPORTS: Final = Path("/sys/kernel/config/tsm/report")
SGX: Final = (Path("/dev/sgx_enclave"), Path("/dev/sgx_provision"))
SNP_GUEST: Final = Path("/dev/sev-guest")
CORE_PATTERN: Final = Path("/proc/sys/kernel/core_pattern")
PROC: Final = Path("/proc")
DISK_FAIL_BYTES, DISK_WARN_BYTES = 256 * 1024 * 1024, 2 * 1024 * 1024 * 1024
SMI_S: Final = 10.0
_LISTENS: Final = "0A"


def tee(config: AgentConfig, reports: Path = TSM_REPORTS) -> Finding:
    """Whether this machine can prove what `[tee] kind` says."""
    kind = config.tee.kind
    if kind == "tdx":
        if reports.is_dir():
            return ok("tee", f"{reports} is there: this is a guest that can ask for TDX quotes")
        has = "AMD SEV-SNP" if SNP_GUEST.exists() else "SGX, which is not TDX" if any(
            path.exists() for path in SGX
        ) else "no TEE"  # fmt: skip
        return fail(
            "tee", f'kind = "tdx", but {reports} is not there; the machine shows {has}',
            "run the agent in a TDX guest (Linux 6.7 or newer, configfs mounted), or set "
            '[tee] kind = "none" for the open tier',
        )  # fmt: skip
    if kind == "simulated":
        lacking = [
            str(path) for path in (config.tee.dev_authority_file, config.tee.dev_platform_file)
            if path is not None and not path.is_file()
        ]  # fmt: skip
        if lacking:
            return fail(
                "tee", f"the simulated TEE lacks {' and '.join(lacking)}",
                "start the network with `./cocoon up`, or make the provider anew: "
                "`./cocoon provider init`",
            )  # fmt: skip
        return warn(
            "tee", "simulated: DEV ONLY, it proves nothing",
            "on a real network use a TDX guest, or the open tier",
        )  # fmt: skip
    return warn(
        "tee", "none: the open tier, in which you could read what you are sent",
        "clients get it only where they ask for it; a TDX guest gets more jobs",
    )  # fmt: skip


def gpu(config: AgentConfig, program: str = "nvidia-smi") -> Finding:
    """What nvidia-smi says; a server on another machine, or the embedded engine, needs none."""
    servers = [model for model in config.enabled if model.engine != "embedded"]
    place = shutil.which(program)
    if place is None:
        if any(is_local(model) for model in servers):
            return warn(
                "gpu", f"there is no {program}; the server here may run on the CPU, or on another "
                "maker's GPU", "install NVIDIA's driver if this machine has such a GPU",
            )  # fmt: skip
        return ok("gpu", "none seen, and none is needed for what is served")
    try:
        done = subprocess.run(
            [place, "--query-gpu=name,driver_version,memory.total,memory.used",
             "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=SMI_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return fail("gpu", f"{program} does not answer", "reload the driver, or reboot")
    if done.returncode != 0 or not done.stdout.strip():
        return fail(
            "gpu", f"{program} ends with code {done.returncode}: driver and kernel do not fit",
            "reinstall the driver for this kernel, then reboot",
        )  # fmt: skip
    return ok("gpu", "; ".join(_gpus(done.stdout)))


def _gpus(text: str) -> Iterator[str]:
    for line in text.strip().splitlines()[:16]:
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4:
            yield f"{parts[0]}, driver {parts[1]}, {parts[3]} of {parts[2]} MiB in use"


def secret_files(config: AgentConfig) -> Finding:
    """Keys that only their owner reads."""
    of_models = (file for m in config.models for file in (m.api_key_file, m.client_key_file))
    named = [config.agent.seed_file, *(file for file in of_models if file is not None)]
    if config.tee.dev_platform_file is not None:
        named.append(config.tee.dev_platform_file)
    for path in named:
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError as error:
            return fail(
                "permissions", f"{path} cannot be read ({error.strerror})",
                "put the file there; `./cocoon provider init` makes the identity key",
            )  # fmt: skip
        if mode & 0o077:
            return fail(
                "permissions", f"{path} has mode {mode:o}: others may read it", f"chmod 600 {path}"
            )
        if not os.access(path, os.R_OK):
            return fail("permissions", f"{path} is another user's", f"chown it to {os.getuid()}")
    return ok("permissions", f"{len(named)} secret files, none of them readable by others")


def data_folder(folder: Path) -> Finding:
    """Where answers wait for the network: it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = folder / ".doctor"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        return fail(
            "data folder", f"{folder} cannot be written ({error.strerror})",
            "give it to the agent's user, or name another in [agent] data_dir",
        )  # fmt: skip
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o077:
        return warn(
            "data folder", f"{folder} has mode {mode:o}: others see sizes and times of answers",
            f"chmod 700 {folder}",
        )  # fmt: skip
    return ok("data folder", f"{folder} can be written, by its owner only")


def disk(folder: Path, free_bytes: int | None = None) -> Finding:
    """Room for answers that wait for the network. `free_bytes` None: what the disk says."""
    free = shutil.disk_usage(folder).free if free_bytes is None else free_bytes
    told = f"{free // 2**20:,} MiB free for answers that wait for the network"
    if free < DISK_FAIL_BYTES:
        return fail("disk", told, "free some space: a full disk takes no more jobs")
    if free < DISK_WARN_BYTES:
        return warn("disk", told, "2 GiB hold a day without the network; free some space")
    return ok("disk", told)


def is_local(model: ModelConfig) -> bool:
    return model.url is not None and urlsplit(model.url).hostname in LOOPBACK


def core_dumps(model: ModelConfig, proc: Path = PROC, pattern_file: Path = CORE_PATTERN) -> Finding:
    """Whether a crash would write prompts to disk. The agent forbids its own dumps at its start."""
    name = f"core dumps of {model.name}"
    if model.engine == "embedded":
        return ok(name, "the engine runs in the agent, which allows none")
    if not is_local(model):
        return warn(
            name, "the server runs on another machine, which cannot be looked at from here",
            "set LimitCORE=0 (or ulimit -c 0) for it there",
        )  # fmt: skip
    port = urlsplit(model.url or "").port or (443 if (model.url or "").startswith("https") else 80)
    pid = listener(port, proc)
    if pid is None:
        return warn(
            name, f"the process that listens on port {port} is another user's or is not there",
            "start it with ulimit -c 0, or LimitCORE=0 in its unit",
        )  # fmt: skip
    limit = _core_limit(proc / str(pid) / "limits")
    try:
        piped = pattern_file.read_text().startswith("|")
    except OSError:
        piped = False
    if piped:
        return warn(
            name, "the kernel hands dumps to a program, which a limit of 0 does not stop",
            "sysctl -w kernel.core_pattern=core, and ulimit -c 0 for the server",
        )  # fmt: skip
    if limit == "0":
        return ok(name, f"process {pid} may write none")
    return fail(
        name, f"process {pid} may write them (limit {limit}): a crash would leave prompts on disk",
        "restart the server with ulimit -c 0, or LimitCORE=0 in its unit",
    )  # fmt: skip


def _core_limit(limits: Path) -> str:
    try:
        lines = limits.read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split()[4] for line in lines if line.startswith("Max core file")), "unknown")


def listener(port: int, proc: Path = PROC) -> int | None:
    """The process of ours that listens on a port of this machine."""
    inodes = set(_inodes(port, proc))
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            for link in (folder / "fd").iterdir():
                if str(link.readlink()).removeprefix("socket:[").rstrip("]") in inodes:
                    return int(folder.name)
        except OSError:
            continue  # another user's, or gone
    return None


def _inodes(port: int, proc: Path) -> Iterator[str]:
    for table in ("tcp", "tcp6"):
        try:
            rows = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()
            if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9]
