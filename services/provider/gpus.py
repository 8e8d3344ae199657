"""The machine's NVIDIA GPUs, by the driver's own tool, for `GET /status`. No tool: none."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from typing import Any, Final

_QUERY: Final = ("name", "driver_version", "memory.total", "memory.used", "utilization.gpu")
_NAMES: Final = ("name", "driver", "memory_mib", "memory_used_mib", "utilisation_percent")
TIMEOUT_S: Final = 5.0
MAX_GPUS: Final = 64


async def find_gpus(tool: str = "nvidia-smi") -> list[dict[str, Any]]:
    """One entry a GPU; empty without the tool, or if it fails or does not answer in time."""
    path = shutil.which(tool)
    if path is None:
        return []
    process = await asyncio.create_subprocess_exec(
        path, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(TIMEOUT_S):
            out, _ = await process.communicate()
    except TimeoutError:
        return []
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return read_gpus(out.decode("utf-8", "replace")) if process.returncode == 0 else []


def read_gpus(text: str) -> list[dict[str, Any]]:
    """The tool's lines. What it does not tell of a GPU (`[N/A]`) is None."""
    found = []
    for line in text.splitlines()[:MAX_GPUS]:
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == len(_NAMES):
            numbers = [int(part) if part.isdecimal() else None for part in parts[2:]]
            found.append(dict(zip(_NAMES, [*parts[:2], *numbers], strict=True)))
    return found
