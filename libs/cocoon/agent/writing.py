"""Write `provider.toml`, each line with a comment that explains it; what is left out is a default.

`parse_config(config_text(config, folder), folder) == config` for every configuration.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from cocoon.agent.config import SERVER_FIELDS, AgentConfig, ModelConfig
from cocoon.kernel.errors import ConfigurationError

_HEAD: Final = """\
# A Cocoon provider. Relative paths are relative to this file's folder. After a change:
# `./cocoon provider reload` (or SIGHUP) for [[models]]; the other sections need a restart.
"""
_NETWORK: Final = {
    "gateway": "the network's HTTP door; the agent itself talks to the bus only",
    "bus": "the network's message bus: nats:// tls:// ws:// wss://, tried in turn",
    "trust_file": "the network's roots, which its word is checked against",
    "policy_file": "the network's signed policy; left out: policy.json beside the trust file",
    "ca_file": "certificate authority of the bus; left out: this machine's own",
}
_AGENT: Final = {
    "seed_file": "the agent's identity key; whoever has it is this provider",
    "data_dir": "answers until the network has them, and what the agent says of itself",
    "environment": '"prod", or "dev" for a network of class dev',
    "region": "where the machine is, free text; a client may ask for it",
}
_TEE: Final = {
    "kind": '"tdx"; "none": the open tier; "simulated": development only',
    "dev_authority_file": "DEV ONLY: the authority of the simulated TEE",
    "dev_platform_file": "DEV ONLY: the simulated machine",
}
_MODEL: Final = {
    "name": "what clients ask for",
    "kind": '"chat" or "embeddings"',
    "folder": "the model's files, hashed before anything is served",
    "manifest_file": "made by `./cocoon model add`; left out: described from the files",
    "engine": '"embedded" in the agent, "openai" for any such server, "triton"',
    "url": "the engine's address: on this machine, or over TLS",
    "served_as": "the server's own name of the model; left out: name",
    "api_key_file": "the server's key, in a file of its own",
    "ca_file": "what the server's certificate is checked against",
    "client_cert_file": "the agent's own certificate, for a server that asks for one",
    "client_key_file": "the key that belongs to it, in a file of its own",
    "metrics_url": "where the server tells its load",
    "context_tokens": "tokens of prompt and answer together",
    "capabilities": "what the server can beyond plain sampling",
    "quantisation": "as the server runs it; clients may ask for it",
    "read_timeout_s": "seconds without a word after which the engine has failed",
    "concurrency": "jobs that the engine works on at once",
    "max_waiting": "more jobs taken, which wait here so that the engine is never idle",
    "warm": "true: the engine is ready from the start; false: from its first job on",
    "unload_after_s": "an idle engine that is not warm is unloaded after so many seconds",
    "enabled": "false: not offered",
}
_PRICE: Final = {
    "input": "nanoTON per million tokens of prompt (1 TON = 1000000000 nanoTON)",
    "cached_input": "of a prompt's tokens that the engine had cached",
    "output": "of the answer",
}
_ALWAYS: Final = frozenset({
    "environment", "kind", "engine", "concurrency", "max_waiting", "warm", "enabled",
    "context_tokens", "capabilities", "quantisation",
})  # fmt: skip


def config_text(config: AgentConfig, folder: Path) -> str:
    """The file's text, for a file in `folder` (absolute)."""
    blocks = [_HEAD.rstrip()]
    for title, section, comments in (
        ("[network]", config.network, _NETWORK),
        ("[agent]", config.agent, _AGENT),
        ("[tee]", config.tee, _TEE),
    ):
        blocks.append(_block(title, section, comments, comments, folder))
    for model in config.models:
        embedded = model.engine == "embedded"
        names = [name for name in _MODEL if not (embedded and name in SERVER_FIELDS)]
        blocks.append(_block("[[models]]", model, names, _MODEL, folder))
        blocks.append(_block("[models.price]", model.price, _PRICE, _PRICE, folder))
    return "\n\n".join(blocks) + "\n"


def write_config(config: AgentConfig, path: Path) -> None:
    """Replace the file, whole or not at all. Raises ConfigurationError if it cannot be written."""
    path = path.absolute()
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(config_text(config, path.parent))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written ({error.strerror})") from None


def _block(
    title: str, section: BaseModel, names: Iterable[str], comments: dict[str, str], folder: Path
) -> str:
    return "\n".join([title, *_lines(section, names, comments, folder)])


def _lines(
    section: BaseModel, names: Iterable[str], comments: dict[str, str], folder: Path
) -> Iterator[str]:
    plain = type(section).model_fields
    for name in names:
        value = getattr(section, name)
        told = value is not None and (value != plain[name].default or name in _ALWAYS)
        if told:
            yield f"{name} = {_value(value, folder)}  # {comments[name]}"


def _value(value: Any, folder: Path) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return repr(value)
        case Path():
            near = value.is_relative_to(folder)
            return _text(str(value.relative_to(folder) if near else value))
        case str():
            return _text(value)
        case frozenset():
            return f"[{', '.join(map(_text, sorted(value)))}]"
        case tuple():
            return f"[{', '.join(_value(one, folder) for one in value)}]"
        case _:
            raise TypeError(f"no setting is a {type(value).__name__}")


def _text(value: str) -> str:
    """A basic string: JSON's escapes are TOML's, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


assert ModelConfig.model_fields.keys() == _MODEL.keys() | {"price"}, "a setting lacks its comment"  # noqa: S101
