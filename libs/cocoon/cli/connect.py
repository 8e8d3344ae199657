"""`cocoon connect`: the sidecar, an OpenAI endpoint on loopback that seals and verifies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cocoon.kernel.errors import ConfigurationError

if TYPE_CHECKING:
    from pydantic import ValidationError

_OPTIONS = {
    "gateway_url": "--gateway",
    "trust_file": "--trust",
    "listen_port": "--port",
    "state_dir": "--state",
    "local_key": "--local-key",
    "tiers": "--tiers",
    "api_key": "--key",
    "api_key_file": "--key",
    "provider": "--provider",
}
_GRACE_S = 0.5  # a person who presses Ctrl-C waits for no answer
_STREAM_PADDINGS = ("P1", "P2", "P3")


def connect(
    gateway: Annotated[str, typer.Option(metavar="URL", help="The network's gateway.")],
    trust: Annotated[
        Path, typer.Option(metavar="FILE", help="Your trust file: roots and policy signers.")
    ],
    key: Annotated[
        str | None,
        typer.Option(
            metavar="K",
            help="Your API key, or @FILE to read it from a file. Needed, unless every program that "
            "calls sends its own key.",
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
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help='What requests without a `provider` of their own ask of theirs: '
            '\'{"regions": ["eu-west"], "quantisations": ["int8"]}\' (docs/matching.md).',
        ),
    ] = None,
    padding: Annotated[
        str, typer.Option(help="Padding of streams: P1 (fixed cadence), P2 (batched), P3 (none).")
    ] = "P2",
    tiers: Annotated[
        str | None, typer.Option(
            metavar="T,...",
            help="The tiers of providers to use, of facility, attested, simulated and open; no "
            "request gets another. Without it: those with a TEE, and open where a request asks "
            "for it. open: no TEE, and the machine's owner can read prompts.",
        ),
    ] = None,
    state: Annotated[
        Path | None, typer.Option(
            metavar="DIR",
            help="Remembers across restarts what must never go backwards (the policy's version, "
            "the numbers of the collateral) and what was sealed under an Idempotency-Key.",
        ),
    ] = None,
) -> None:  # fmt: skip
    """Serve the OpenAI API on loopback: every prompt leaves this machine sealed."""
    from pydantic import ValidationError

    from cocoon.client.network import check_options
    from cocoon.client.serve import run_sidecar
    from cocoon.client.settings import SidecarSettings
    from cocoon.evidence.trust import load_trust
    from cocoon.telemetry.logs import configure_logs

    if padding not in _STREAM_PADDINGS:
        raise ConfigurationError(f"--padding is one of {', '.join(_STREAM_PADDINGS)}")
    values: dict[str, object] = {
        "gateway_url": gateway, "trust_file": trust, "listen_port": port,
        "stream_padding": padding, "state_dir": state, "local_key": local_key,
    }  # fmt: skip
    if tiers is not None:
        values["tiers"] = [word.strip() for word in tiers.split(",")]
    if provider is not None:
        values["provider"] = _wishes(provider)
    if key is not None and key.startswith("@"):
        values["api_key_file"] = Path(key[1:])
    elif key is not None:
        values["api_key"] = key
    try:
        settings = SidecarSettings(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigurationError(_wrong(error)) from None
    options = settings.network_options()
    check_options(options)  # all of it before a port is bound: a wrong one is a sentence
    load_trust(settings.trust_file)
    configure_logs("sidecar", settings.log_level)
    _look_at(gateway, options.api_key)

    def on_ready(base_url: str) -> None:
        print(f"OpenAI endpoint: {base_url}   (Ctrl-C stops it)", file=sys.stderr, flush=True)

    run_sidecar(settings, on_ready, grace_s=_GRACE_S)
    print("stopped", file=sys.stderr, flush=True)


def _wishes(text: str) -> object:
    import json

    try:
        return json.loads(text)
    except ValueError:
        raise ConfigurationError('--provider is a JSON object such as {"sort": "price"}') from None


def _look_at(gateway: str, api_key: str | None) -> None:
    """Ask the gateway once, so that a wrong key or address is a sentence before anybody waits.

    Raises ConfigurationError for a key that it does not know. One that is away may still come.
    """
    import httpx

    base = gateway.rstrip("/").removesuffix("/v1")
    path, headers = ("/v1/network", {}) if api_key is None else (
        "/v1/balance", {"Authorization": f"Bearer {api_key}"}
    )  # fmt: skip
    try:
        answer = httpx.get(base + path, headers=headers, timeout=5, trust_env=False)
    except httpx.HTTPError:
        print(
            f"The gateway {base} does not answer; requests are refused until it does.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return
    if answer.status_code == 401:
        raise ConfigurationError(
            f"the gateway {base} does not know this key; `./cocoon keys create` makes one"
        )


def _wrong(error: ValidationError) -> str:
    """Each wrong option by its name, and what it may be. Never the value: it may be a key."""
    return "; ".join(
        f"{_OPTIONS.get(str(e['loc'][0]), str(e['loc'][0]))}"
        f"{''.join(f' {n}' for n in e['loc'][1:] if isinstance(n, str))} cannot be this: {e['msg']}"
        for e in error.errors(include_input=False)
    )
