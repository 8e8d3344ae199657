"""`cocoon connect`: the sidecar, an OpenAI endpoint on loopback that seals and verifies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cocoon.kernel.errors import ConfigurationError


def connect(
    gateway: Annotated[str, typer.Option(metavar="URL", help="The network's gateway.")],
    trust: Annotated[
        Path, typer.Option(metavar="FILE", help="Your trust file: roots and policy signers.")
    ],
    key: Annotated[
        str | None,
        typer.Option(
            metavar="K", help="Your API key, or @FILE to read it from a file.",
            envvar="COCOON_API_KEY", show_envvar=True,
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0: any.")] = 8642,
    local_key: Annotated[
        str | None,
        typer.Option(
            help="What local programs must send as their API key (default: nothing is asked).",
            envvar="COCOON_LOCAL_KEY", show_envvar=True,
        ),
    ] = None,
    padding: Annotated[
        str, typer.Option(help="Padding of streams: P1 (fixed cadence), P2 (batched), P3 (none).")
    ] = "P2",
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keeps what must never go back.")
    ] = None,
) -> None:  # fmt: skip
    """Serve the OpenAI API on loopback: every prompt leaves this machine sealed."""
    from pydantic import ValidationError

    from cocoon.client.serve import run_sidecar
    from cocoon.client.settings import SidecarSettings
    from cocoon.telemetry.logs import configure_logs

    values: dict[str, object] = {
        "gateway_url": gateway, "trust_file": trust, "listen_port": port,
        "stream_padding": padding, "state_dir": state, "local_key": local_key,
    }  # fmt: skip
    if key is not None and key.startswith("@"):
        values["api_key_file"] = Path(key[1:])
    elif key is not None:
        values["api_key"] = key
    try:
        settings = SidecarSettings(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        names = ", ".join(str(part) for e in error.errors() for part in e["loc"])
        raise ConfigurationError(f"wrong option: {names}") from None
    configure_logs("sidecar", settings.log_level)

    def on_ready(base_url: str) -> None:
        print(f"OpenAI endpoint: {base_url}   (Ctrl-C stops it)", file=sys.stderr, flush=True)

    run_sidecar(settings, on_ready)
