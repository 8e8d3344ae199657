"""What can be seen from outside of an engine's server: its address, its logging, its writing down.

Each finding says what was seen and what to do. Nothing is changed at the server, and no prompt is
sent to it but the probes of `start`. What cannot be seen is said so: a server that answers nothing
about its logging may still log.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from cocoon.kernel.errors import CocoonError, ConfigurationError
from services.provider.backends.making import EngineSettings
from services.provider.backends.openai_server import (
    BROKEN,
    LOOPBACK,
    check_url,
    tls_context,
    whole_body,
)

ASK_TIMEOUT_S: Final = 5.0
PROC: Final = Path("/proc")
MAX_PROCESSES: Final = 65_536
MAX_COMMAND_BYTES: Final = 64 * 1024


class Level(StrEnum):
    OK = "ok"
    UNKNOWN = "unknown"  # it cannot be seen from here
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `remedy` is empty where nothing is to be done."""

    name: str
    level: Level
    says: str
    remedy: str = ""


async def probe(settings: EngineSettings, *, proc: Path = PROC) -> list[Finding]:
    """Everything that can be seen of this engine's hop and its server's logging."""
    if settings.engine == "embedded" or settings.url is None:
        return [Finding("hop", Level.OK, "the engine runs in the agent's own process")]
    found = [hop(settings)]
    if found[0].level is Level.WRONG:
        return found
    parts = urlsplit(settings.url)
    near = parts.hostname in LOOPBACK
    commands = await asyncio.to_thread(_listeners, parts.port, proc) if near else ()
    if settings.engine == "triton":
        found += await _triton(settings, commands)
    else:
        found += [_of_command(commands, near=near), await _version(settings)]
    return found


def hop(settings: EngineSettings) -> Finding:
    """Whether the way to the server is private."""
    from services.provider.backends.triton import check_address

    url = settings.url or ""
    try:
        if settings.engine == "triton":
            _, tls = check_address(url)
        else:
            tls = check_url(url).startswith("https:")
        proves = settings.client_cert is not None
        if proves and not tls:
            raise ConfigurationError("a client certificate is shown over TLS only")
    except CocoonError as error:
        return Finding(
            "hop", Level.WRONG, error.message,
            "put the server on this machine's loopback, or behind TLS",
        )  # fmt: skip
    if not tls:
        return Finding("hop", Level.OK, f"{url} is on this machine's loopback")
    says = f"{url} is reached over TLS" + (
        ", and the agent shows its certificate" if proves else ""
    )
    if urlsplit(url).hostname in LOOPBACK or proves:
        return Finding("hop", Level.OK, says)
    return Finding(
        "hop", Level.UNKNOWN,
        f"{says}; who else may ask that server cannot be seen from here",
        "let the server ask for a client certificate (client_cert_file, client_key_file)",
    )  # fmt: skip


# ---- what a command line says ----

_OFF: Final[dict[str, tuple[str, ...]]] = {
    "vllm": ("--no-enable-log-requests", "--disable-log-requests")
}
_ON: Final[dict[str, tuple[str, ...]]] = {
    "vllm": ("--enable-log-requests", "--enable-log-outputs", "--enable-log-deltas"),
    "sglang": ("--log-requests",),
    "llama": ("-v", "--verbose", "--log-verbose", "-lv", "--verbosity", "--log-verbosity"),
    "ollama": (),
}  # fmt: skip
# environment variables that raise a log, and their values that do not
_ON_BY_NAME: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "vllm": {"VLLM_LOGGING_LEVEL": ("", "INFO", "WARNING", "ERROR")},
    "sglang": {},
    "llama": {"LLAMA_ARG_LOG_VERBOSITY": ("", "0")},
    "ollama": {"OLLAMA_DEBUG": ("", "0", "false")},
}  # fmt: skip
_NAMES: Final = frozenset(name for names in _ON_BY_NAME.values() for name in names)


def logging_of(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Finding:
    """What a server's command line says of writing prompts down. Pure.

    vLLM logs requests where it is told to, and older versions unless they are told not to; SGLang
    with --log-requests; llama.cpp's server and Ollama when they are to say more than usual.
    """
    family = _family(command)
    name = f"request logging of {family or 'the server'}"
    if family is None:
        return Finding(
            name, Level.UNKNOWN,
            "what listens there is no server whose options are known here",
            "look in its manual how requests are kept out of its log, and set that",
        )  # fmt: skip
    options = {part.partition("=")[0] for part in command}
    on = sorted(options & set(_ON[family]))
    for variable, quiet in _ON_BY_NAME[family].items():
        if (environment or {}).get(variable, "") not in quiet:
            on.append(variable)
    if on:
        return Finding(
            name, Level.WRONG, f"it runs with {', '.join(on)}, which can write prompts to its log",
            f"start it without {', '.join(on)}",
        )  # fmt: skip
    if family == "vllm" and not options & set(_OFF[family]):
        return Finding(
            name, Level.UNKNOWN,
            "its command line says nothing of it, and older versions of vLLM log requests then",
            "start it with --no-enable-log-requests (older versions: --disable-log-requests)",
        )  # fmt: skip
    return Finding(name, Level.OK, "its command line asks for no log of requests")


def _family(command: Sequence[str]) -> str | None:
    """By the program's name, or that of the module or script that Python runs."""
    words = [word for word in command[:2] if not word.startswith("-")]
    if command[1:2] == ["-m"]:
        words += command[2:3]
    names = " ".join(word.rpartition("/")[2].lower() for word in words)
    return next(
        (family for family in ("vllm", "sglang", "ollama", "llama") if family in names), None
    )


def _of_command(commands: Sequence[tuple[list[str], dict[str, str]]], *, near: bool) -> Finding:
    if not commands:
        where = (
            "no process that listens there can be seen by this user"
            if near
            else ("the server runs elsewhere")
        )
        return Finding(
            "request logging", Level.UNKNOWN, f"{where}, so its options cannot be looked at",
            "make sure that it is started without a log of requests (vLLM: "
            "--no-enable-log-requests; SGLang: without --log-requests; llama.cpp: without -v)",
        )  # fmt: skip
    order = (Level.WRONG, Level.UNKNOWN, Level.OK)
    return min((logging_of(*one) for one in commands), key=lambda found: order.index(found.level))


def _listeners(port: int | None, proc: Path) -> list[tuple[list[str], dict[str, str]]]:
    """Command lines of the processes that listen on a port, as far as this user may see them."""
    sockets = {
        parts[9]
        for table in ("net/tcp", "net/tcp6")
        for line in _lines(proc / table)
        if len(parts := line.split()) > 9
        and parts[3] == "0A"
        and int(parts[1].rpartition(":")[2], 16) == port
    }
    found = []
    for number, folder in enumerate(proc.iterdir()):
        if number > MAX_PROCESSES:
            break
        if folder.name.isdigit() and sockets & _sockets(folder):
            command = [part.decode("utf-8", "replace") for part in _parts(folder / "cmdline")]
            told = (part.decode("utf-8", "replace") for part in _parts(folder / "environ"))
            pairs = (one.partition("=") for one in told)
            found.append((command, {name: said for name, _, said in pairs if name in _NAMES}))
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()[1:]
    except OSError:
        return []


def _parts(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            return [part for part in file.read(MAX_COMMAND_BYTES).split(b"\0") if part]
    except OSError:
        return []


def _sockets(folder: Path) -> set[str]:
    try:
        names = [os.readlink(link) for link in (folder / "fd").iterdir()]
    except OSError:
        return set()
    return {name[8:-1] for name in names if name.startswith("socket:[")}


# ---- what a server answers ----


async def _version(settings: EngineSettings) -> Finding:
    """Who the server says it is, where it says so: vLLM at /version, llama.cpp at /props."""
    base = check_url(settings.url or "")
    for path, family in (("/version", "vLLM"), ("/props", "llama.cpp")):
        told = await _json(settings, base + path)
        if told is not None:
            version = str(told.get("version") or told.get("build_info") or "")[:40]
            shown = "".join(filter(str.isprintable, version))
            return Finding("server", Level.OK, f"it answers as {family} {shown}".rstrip())
    return Finding("server", Level.UNKNOWN, "it does not say which program it is")


async def _triton(
    settings: EngineSettings, commands: Sequence[tuple[list[str], dict[str, str]]]
) -> list[Finding]:
    """Triton's log and trace settings, over the gRPC door that the agent uses."""
    from tritonclient.grpc.aio import InferenceServerClient

    from services.provider.backends.triton import check_address
    from services.provider.backends.triton_stream import BROKEN as BROKEN_CALL

    target, tls = check_address(settings.url or "")
    pair = settings.client_cert
    headers = {"authorization": f"Bearer {key}"} if (key := settings.api_key()) else None
    client = InferenceServerClient(
        target, ssl=tls, root_certificates=str(settings.ca_file) if settings.ca_file else None,
        certificate_chain=str(pair[0]) if pair else None,
        private_key=str(pair[1]) if pair else None,
    )  # fmt: skip
    limits = {"headers": headers, "client_timeout": ASK_TIMEOUT_S, "as_json": True}
    log: dict[str, Any] | None = None
    trace: dict[str, Any] | None = None
    try:
        log = _settings(await client.get_log_settings(**limits))
    except BROKEN_CALL:
        log = None
    try:
        trace = _settings(await client.get_trace_settings(**limits))
    except BROKEN_CALL:
        trace = None
    await client.close()
    return [log_settings(log, commands), trace_settings(trace, commands)]


def _settings(answer: Mapping[str, Any]) -> dict[str, Any]:
    return dict(answer.get("settings") or {})


def log_settings(
    told: Mapping[str, Any] | None, commands: Sequence[tuple[list[str], dict[str, str]]] = ()
) -> Finding:
    """What Triton's log settings say. Pure. None: that door is shut, which is as it should be."""
    name = "log of the Triton server"
    verbose = _value(told or {}, "log_verbose_level") or _option(commands, "--log-verbose")
    if str(verbose or "0") not in ("0", "False", "false"):
        return Finding(
            name, Level.WRONG, f"its verbose level is {str(verbose)[:8]}: tensors may be written",
            "start it with --log-verbose 0",
        )  # fmt: skip
    if told is None and not commands:
        return Finding(
            name, Level.UNKNOWN, "it does not tell its log settings, and its process is not seen",
            "start it with --log-verbose 0, its default",
        )  # fmt: skip
    return Finding(name, Level.OK, "it writes no tensors to its log")


def trace_settings(
    told: Mapping[str, Any] | None, commands: Sequence[tuple[list[str], dict[str, str]]] = ()
) -> Finding:
    """What Triton's trace settings say. Pure. Only the level TENSORS writes content down."""
    name = "traces of the Triton server"
    levels = _values(told or {}, "trace_level")
    options = str(_option(commands, "--trace-config") or "") + str(
        _option(commands, "--trace-level") or ""
    )
    if "TENSORS" in {level.upper() for level in levels} or "TENSORS" in options.upper():
        return Finding(
            name, Level.WRONG, "its trace level is TENSORS: prompts and answers are written down",
            "start it without --trace-config level=TENSORS",
        )  # fmt: skip
    if told is None and not commands:
        return Finding(
            name, Level.UNKNOWN, "it does not tell its trace settings, and its process is not seen",
            "shut that door to everybody: --grpc-restricted-protocol logging,trace:KEY=VALUE",
        )  # fmt: skip
    return Finding(name, Level.OK, "it traces no tensors")


def _value(told: Mapping[str, Any], name: str) -> Any:
    """A log setting: {"boolParam": ..} or {"uint32Param": ..}, or plain in other versions."""
    value = told.get(name)
    if isinstance(value, Mapping):
        return next(iter(value.values()), None)
    return value


def _values(told: Mapping[str, Any], name: str) -> list[str]:
    """A trace setting: {"value": [..]}, or plain."""
    value = told.get(name)
    if isinstance(value, Mapping):
        value = value.get("value")
    return [str(item) for item in value] if isinstance(value, list) else [str(value or "")]


def _option(commands: Sequence[tuple[list[str], dict[str, str]]], name: str) -> str | None:
    for command, _ in commands:
        for at, part in enumerate(command):
            key, equals, value = part.partition("=")
            if key == name:
                return value if equals else (command[at + 1] if at + 1 < len(command) else "")
    return None


async def _json(settings: EngineSettings, url: str) -> dict[str, Any] | None:
    headers = {"Authorization": f"Bearer {key}"} if (key := settings.api_key()) else {}
    tls = tls_context(settings.ca_file, settings.client_cert)
    timeout = aiohttp.ClientTimeout(total=ASK_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, trust_env=False, headers=headers) as http,
            http.get(url, allow_redirects=False, ssl=True if tls is None else tls) as answer,
        ):
            if answer.status != 200:
                return None
            value = json.loads(await whole_body(answer))
    except (*BROKEN, CocoonError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
