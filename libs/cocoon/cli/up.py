"""`cocoon up`: the whole network on this machine, in processes, until Ctrl-C."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shlex
import signal
import sys
import time
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from cocoon.cli.session import Data, data_hint, folder_of
from cocoon.kernel.errors import CocoonError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cocoon.devnet.folder import DataFolder, RunningNetwork
    from cocoon.devnet.network import Options

MODEL = "skills-1"
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last: its terminal was closed


class Engine(StrEnum):
    EMBEDDED = "embedded"
    TRITON = "triton"


def up(
    data: Data = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget the network in the folder and start anew.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON line when ready, and nothing else.")
    ] = False,
    gateway_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="The gateway's port; 0 takes any.")
    ] = None,
    sidecar_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="The sidecar's port; 0 takes any.")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Serve an OpenAI-compatible server (vLLM, SGLang, llama.cpp, Ollama) instead of "
            "the built-in model.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The backend's model to offer (default: skills-1).")
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(
            help="What runs the built-in model: `embedded`, in the provider's own process, or "
            "`triton`, a Triton Inference Server (Linux on x86-64; installed at first use)."
        ),
    ] = Engine.EMBEDDED,
    embeddings: Annotated[
        bool,
        typer.Option(
            "--embeddings",
            help="One provider more, which serves embeddings with all-minilm-l6-v2 (built at first "
            "use, 84 MB to fetch).",
        ),
    ] = False,
    providers: Annotated[int, typer.Option(min=1, max=8, help="How many providers to run.")] = 1,
    open_providers: Annotated[
        int,
        typer.Option(
            "--open",
            min=0,
            max=8,
            help="How many more providers to run without a TEE. They are labelled `open`, and no "
            "request gets one that does not ask for it.",
        ),
    ] = 0,
    shards: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=8,
            help="How many account shards a new network gets (default: 1); each has its own log "
            "and matcher. It cannot be changed afterwards.",
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1, max=4096, help="How many jobs each provider runs at once (default: 64)."
        ),
    ] = None,
    key_epoch: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            min=12,
            max=200,
            help="For trials: seconds after which providers change their keys. Without it they do "
            "so every ten minutes, as in production.",
        ),
    ] = None,
    entry: Annotated[
        str | None,
        typer.Option(
            metavar="HOST[:PORT]",
            help="Let providers elsewhere in, by this name or address of this machine: WebSocket "
            "over TLS on PORT (default: 8643), plain TLS on the next one. Without it all stays "
            "on this machine.",
        ),
    ] = None,
    otlp: Annotated[
        str | None, typer.Option(metavar="URL", help="Send traces to this OTLP/HTTP collector.")
    ] = None,
) -> None:
    """Start the whole network on this machine and keep it running until Ctrl-C."""
    from cocoon.devnet import minilm
    from cocoon.devnet.doors import EntryAddress
    from cocoon.devnet.leftovers import end_leftovers
    from cocoon.devnet.network import Options, check_backend
    from cocoon.telemetry.logs import configure_logs

    say = _Progress(as_json)
    triton = engine is Engine.TRITON
    if backend is not None:
        check_backend(backend)
        if triton:
            raise ConfigurationError("give --engine triton or --backend URL, not both")
    elif model is not None:
        raise ConfigurationError(
            "--model chooses among a backend's models; name the backend too, with --backend URL"
        )
    if triton:
        _install_triton(say)
    if embeddings:
        minilm.install(say)
    folder = folder_of(data)
    folder.check_ours()
    configure_logs("cocoon", "error")
    with folder.lock():
        left = end_leftovers(folder)
        if left:
            with suppress(OSError):
                print(
                    f"cocoon: the last network here was killed; ended what it left running: "
                    f"{', '.join(left)}",
                    file=sys.stderr,
                )
        if fresh:
            _start_afresh(folder, say)
        folder.prepare()
        options = Options(
            gateway_port, sidecar_port, backend, model, otlp, providers, key_epoch, triton,
            shards, concurrency, open_providers, embeddings,
            EntryAddress.parse(entry) if entry else None,
        )  # fmt: skip
        code = asyncio.run(_run(folder, options, as_json, say))
    raise typer.Exit(code)


def _start_afresh(folder: DataFolder, say: Callable[[str], None]) -> None:
    removed, left = folder.clear()
    if removed:
        say(f"starting afresh in {folder.root}: removed {', '.join(removed)}")
    if left:
        say(f"left alone, for no network made it: {', '.join(left)}")


def _install_triton(say: Callable[[str], None]) -> None:
    from cocoon.devnet.triton_server import install

    try:
        install(say)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"there is no Triton server here: {error.message}. Drop --engine triton: the embedded "
            "engine runs the same model instead"
        ) from None


class _Progress:
    """Lines with the time since the start, on stderr. `on_lost` is called if nobody reads them."""

    def __init__(self, quiet: bool) -> None:
        self._began_s, self._quiet = time.monotonic(), quiet
        self.on_lost: Callable[[], None] = lambda: None

    def __call__(self, text: str) -> None:
        if self._quiet:
            return
        try:
            print(f"[{time.monotonic() - self._began_s:5.1f} s] {text}", file=sys.stderr)
        except OSError:  # the terminal or the pipe is closed: what follows must run all the same
            self.on_lost()


async def _run(folder: DataFolder, options: Options, as_json: bool, say: _Progress) -> int:
    from cocoon.devnet.network import Network

    stop = asyncio.Event()
    say.on_lost = stop.set
    for name in _ENDING:
        if name is not signal.SIGHUP or signal.getsignal(name) is not signal.SIG_IGN:  # nohup
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
    network = Network(folder, options, say)
    starting = asyncio.create_task(network.start())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return 130
        running = starting.result()
        try:
            _announce(folder, running, as_json, options)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            _let_go_of_stdout()  # whoever started it has gone: as Ctrl-C
            return 130
        await network.watch(stop)
        return 0
    except CocoonError as error:
        with suppress(OSError):
            print(f"cocoon: {error.message}", file=sys.stderr)
        return 1
    finally:
        stopping.cancel()
        say("stopping")
        await network.stop()
        again = f"./cocoon up{data_hint(folder)}"
        say(f"stopped; `{again}` goes on from here, `{again} --fresh` starts anew")


def _let_go_of_stdout() -> None:
    """Nobody reads it any more: Python must not try to write the rest when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _announce(folder: DataFolder, running: RunningNetwork, as_json: bool, options: Options) -> None:
    key = folder.api_key.read_text(encoding="utf-8").strip()
    if as_json:
        line = {"gateway": running.gateway_url, "sidecar": running.sidecar_url, "api_key": key}
        print(json.dumps(line), flush=True)
        return
    model = options.model_name or MODEL
    body = json.dumps(
        {"model": model, "messages": [{"role": "user", "content": "Reverse: cocoon"}]}
    )
    print(
        f"""
The network is up.

  gateway   {running.gateway_url}   (ciphertext only)
  sidecar   {running.sidecar_url}   (your OpenAI endpoint; it seals and checks for you)
  API key   {key}
  trust     {folder.trust}   (DEV ONLY: a simulated TEE)

Try it, from another terminal:

  curl -s {running.sidecar_url}/chat/completions -H 'Content-Type: application/json' \\
    -d {shlex.quote(body)}

  {shlex.quote(sys.executable)} -c "{_python(running.sidecar_url, model)}"

  ./cocoon status{data_hint(folder)}
{_entry_told(folder, running)}
Ctrl-C stops everything.""",
        flush=True,
    )


def _entry_told(folder: DataFolder, running: RunningNetwork) -> str:
    if not running.entry_urls:
        return ""
    return f"""
Providers elsewhere come in at {" or ".join(running.entry_urls)};
what they need to trust is {folder.bus_ca}, which GET {running.gateway_url}/v1/network tells too.
"""


def _python(url: str, model: str) -> str:
    """A streamed answer through the stock client, as one line to paste between double quotes."""
    # a sign that a shell or Python takes for more than text is written as its number
    name = re.sub(r"[^\w./:@+-]", lambda sign: f"\\U{ord(sign[0]):08x}", model)
    question = "[dict(role='user', content='Count from 1 to 20')]"
    return (
        f"import openai; c = openai.OpenAI(base_url='{url}', api_key='any'); "
        "[print(e.choices[0].delta.content or '', end='', flush=True) "
        f"for e in c.chat.completions.create(model='{name}', messages={question}, stream=True)]; "
        "print()"
    )
