"""A provider's one file, `provider.toml`: read, checked, written. It holds no secret, only paths.

Paths are absolute here; in the file they are relative to its folder where they lie below it.
Every refusal names the field and says what to do.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from cocoon.kernel.errors import ConfigurationError

MAX_FILE_BYTES: Final = 1024 * 1024
MAX_MODELS: Final = 64
LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
SERVER_FIELDS: Final = (
    "url", "served_as", "api_key_file", "ca_file", "client_cert_file", "client_key_file",
    "metrics_url", "context_tokens", "capabilities", "quantisation", "read_timeout_s",
)  # fmt: skip
_BUS_SCHEMES: Final = ("nats", "tls", "ws", "wss")

ModelKind = Literal["chat", "embeddings"]
EngineKind = Literal["embedded", "openai", "triton"]
TeeKind = Literal["tdx", "simulated", "none"]
Capability = Literal["logprobs", "logit_bias", "penalties", "seed", "json_object", "json_schema"]


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("is a relative path; give the path from / on")
    if "\0" in str(path):
        raise ValueError("holds a character that no path has; remove it")
    return Path(os.path.normpath(path))


def _plain(text: str) -> str:
    if not text.isprintable() or text != text.strip() or not text:
        raise ValueError("is empty, or has spaces around it or characters that do not print")
    return text


def _word(text: str) -> str:
    """What a manifest takes as a name."""
    if not all("\x21" <= sign <= "\x7e" for sign in text):
        raise ValueError("has spaces or characters beyond ASCII; use letters, digits and -._:/")
    return text


def _address(value: str, schemes: Sequence[str], near: Sequence[str] = ()) -> str:
    """One of `schemes`, or on loopback one of `near`; a host, no user."""
    try:
        parts = urlsplit(value)
        known = parts.scheme in schemes or (parts.scheme in near and parts.hostname in LOOPBACK)
        whole = bool(parts.hostname) and not parts.username and parts.port != 0
    except ValueError:
        known = whole = False
    if not (known and whole):
        begins = " or ".join(f"{scheme}://" for scheme in schemes)
        also = f" ({' or '.join(f'{one}://' for one in near)} on this machine)" if near else ""
        raise ValueError(f"is not an address that begins with {begins}{also} and names a host")
    return value


def _gateway(value: str) -> str:
    return _address(value, ("https",), ("http",))


def _bus(value: str) -> str:
    return _address(value, _BUS_SCHEMES)


def _is_plain(bus: str) -> bool:
    """Whether whoever sits between could speak as this provider: the key signs only a nonce."""
    parts = urlsplit(bus)
    return parts.scheme in ("nats", "ws") and parts.hostname not in LOOPBACK


Text = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_plain)]
Word = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_word)]
FilePath = Annotated[Path, AfterValidator(_absolute)]
Price = Annotated[int, Field(ge=0, le=10**15, strict=True)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, protected_namespaces=()
    )


class Network(_Section):
    """Where the network is, and what its word is checked against."""

    gateway: Annotated[str, AfterValidator(_gateway)] | None = None
    bus: Annotated[
        tuple[Annotated[str, AfterValidator(_bus)], ...], Field(min_length=1, max_length=16)
    ]
    trust_file: FilePath
    policy_file: FilePath | None = None
    ca_file: FilePath | None = None

    @field_validator("bus")
    @classmethod
    def _of_one_kind(cls, bus: tuple[str, ...]) -> tuple[str, ...]:
        if len({urlsplit(address).scheme for address in bus}) > 1:
            raise ValueError("mixes kinds of addresses; name several of one kind only")
        return bus


class Agent(_Section):
    """This agent: its key, its folder, its place."""

    seed_file: FilePath
    data_dir: FilePath
    environment: Literal["prod", "dev"] = "prod"
    region: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,32}$")] | None = None


class Tee(_Section):
    """What proves the machine."""

    kind: TeeKind = "tdx"
    dev_authority_file: FilePath | None = None
    dev_platform_file: FilePath | None = None

    @model_validator(mode="after")
    def _simulated_only(self) -> Tee:
        named = self.dev_authority_file is not None or self.dev_platform_file is not None
        if named and self.kind != "simulated":
            raise ValueError(
                'names dev_authority_file or dev_platform_file, which are for kind = "simulated" '
                "alone; remove them"
            )
        if self.kind == "simulated" and self.dev_authority_file is None:
            raise ValueError('is of kind = "simulated" and lacks dev_authority_file; add it')
        return self


class ModelPrice(_Section):
    """nanoTON per million tokens."""

    input: Price
    cached_input: Price
    output: Price

    @property
    def all(self) -> tuple[int, int, int]:
        return (self.input, self.cached_input, self.output)


class ModelConfig(_Section):
    """One model: its files, the engine that runs it, how much of it, for how much."""

    name: Word
    kind: ModelKind = "chat"
    folder: FilePath | None = None
    manifest_file: FilePath | None = None
    engine: EngineKind = "embedded"
    url: str | None = None
    served_as: Text | None = None
    api_key_file: FilePath | None = None
    ca_file: FilePath | None = None
    client_cert_file: FilePath | None = None
    client_key_file: FilePath | None = None
    metrics_url: str | None = None
    context_tokens: Annotated[int, Field(ge=16, le=10_000_000, strict=True)] = 4096
    capabilities: frozenset[Capability] = frozenset({"penalties", "seed"})
    quantisation: Word = "as-served"
    read_timeout_s: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = 120.0
    concurrency: Annotated[int, Field(ge=1, le=4096, strict=True)] = 16
    max_waiting: Annotated[int, Field(ge=0, le=4096, strict=True)] = 0
    warm: Annotated[bool, Field(strict=True)] = True
    unload_after_s: Annotated[int, Field(ge=10, le=604_800, strict=True)] | None = None
    enabled: Annotated[bool, Field(strict=True)] = True
    price: ModelPrice

    @property
    def places(self) -> int:
        """Jobs that it takes at once: those that run and those that wait for the engine."""
        return self.concurrency + self.max_waiting

    @model_validator(mode="after")
    def _fits_its_engine(self) -> ModelConfig:
        if self.engine == "embedded":
            plain = type(self).model_fields
            for name in SERVER_FIELDS:
                if getattr(self, name) != plain[name].default:
                    raise ValueError(
                        f'has {name}, which is for the engines "openai" and "triton"; remove it, '
                        "or set engine"
                    )
        else:
            self._check_server()
        if self.unload_after_s is not None and self.warm:
            raise ValueError("has unload_after_s, which is for warm = false; remove one of the two")
        return self

    def _check_server(self) -> None:
        if self.url is None:
            raise ValueError(f'has engine = "{self.engine}" and lacks url; add its address')
        schemes, near = (("grpcs",), ("grpc",)) if self.engine == "triton" else (
            ("https",), ("http",)
        )  # fmt: skip
        for name, value, far, local in (
            ("url", self.url, schemes, near),
            ("metrics_url", self.metrics_url, ("https",), ("http",)),
        ):
            if value is not None:
                try:
                    _address(value, far, local)
                except ValueError as error:
                    raise ValueError(
                        f"has a {name} that {error}: prompts travel there in the clear"
                    ) from None
        if (self.client_cert_file is None) != (self.client_key_file is None):
            raise ValueError("has one of client_cert_file and client_key_file; give both")
        if self.folder is not None and self.manifest_file is None:
            raise ValueError(
                "has a folder for a server's model, which is hashed only against a manifest; make "
                "one with `./cocoon model add` and set manifest_file, or leave folder out"
            )


class AgentConfig(_Section):
    """The whole file."""

    network: Network
    agent: Agent
    tee: Tee = Tee()
    models: Annotated[tuple[ModelConfig, ...], Field(min_length=1, max_length=MAX_MODELS)]

    @model_validator(mode="after")
    def _one_agent(self) -> AgentConfig:
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"models: {name} is there twice; give each entry a name of its own"
                )
        if not any(model.enabled for model in self.models):
            raise ValueError(
                "models: none is enabled; enable one, or end the agent: `./cocoon provider drain`"
            )
        if self.agent.environment == "prod" and self.tee.kind == "simulated":
            raise ValueError(
                "tee: a simulated TEE proves nothing in production; set kind, or environment"
            )
        if self.agent.environment == "prod" and any(map(_is_plain, self.network.bus)):
            raise ValueError(
                "network.bus: a plain line to another machine lets anybody on the way be this "
                "provider; write tls:// or wss://"
            )
        return self

    @property
    def enabled(self) -> tuple[ModelConfig, ...]:
        return tuple(model for model in self.models if model.enabled)


# ---- reading ----


def read_config(path: Path) -> AgentConfig:
    """Read and check the file. Raises ConfigurationError, a sentence for each wrong field."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error.strerror}); make one with `./cocoon provider init`"
        ) from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigurationError(f"{path} is larger than a configuration ever is")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} is not UTF-8 text; save it as that") from None
    return parse_config(text, path.absolute().parent, name=path.name)


def parse_config(text: str, folder: Path, *, name: str = "provider.toml") -> AgentConfig:
    """Check a file's text; `folder` (absolute) is what its relative paths are relative to."""
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigurationError(f"{name} is not TOML: {error}; mend that line") from None
    try:
        return AgentConfig.model_validate(_from_folder(document, folder))
    except ValidationError as error:
        said = "\n".join(f"  {sentence}" for sentence in sentences(error))
        raise ConfigurationError(f"{name} is not taken:\n{said}") from None


def _path_fields(section: type[BaseModel]) -> set[str]:
    return {
        name for name, field in section.model_fields.items() if _holds_path(field.annotation)
    }  # fmt: skip


def _holds_path(annotation: Any) -> bool:
    return annotation is Path or any(_holds_path(part) for part in get_args(annotation))


def _from_folder(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The document with its paths made absolute; what is not of the right shape stays."""

    def rooted(table: Any, kind: type[BaseModel]) -> Any:
        if not isinstance(table, dict):
            return table
        names = _path_fields(kind)
        return {
            key: str(folder / value) if key in names and isinstance(value, str) else value
            for key, value in table.items()
        }

    result = {
        key: rooted(table, _SECTIONS[key]) if key in _SECTIONS else table
        for key, table in document.items()
    }
    if isinstance(result.get("models"), list):
        result["models"] = [rooted(table, ModelConfig) for table in result["models"]]
    return result


_SECTIONS: Final[dict[str, type[BaseModel]]] = {"network": Network, "agent": Agent, "tee": Tee}


def sentences(error: ValidationError) -> list[str]:
    """What is wrong, a sentence for each field; no value is told."""
    return [_sentence(one["loc"], one["type"], one["msg"]) for one in error.errors()]


def _sentence(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    field = field.removeprefix(".")
    if kind == "missing":
        return f"{field} is missing; add it."
    if kind == "extra_forbidden":
        return f"{field} is not a setting of this file; {_nearest(loc)}."
    if kind == "value_error":
        text = message.removeprefix("Value error, ")
        return f"{field} {text}.".strip()
    return f"{field}: {message[:1].lower()}{message[1:]}; change it."


def _nearest(loc: tuple[int | str, ...]) -> str:
    sections: dict[str, type[BaseModel]] = {**_SECTIONS, "models": ModelConfig}
    kind = sections.get(str(loc[0]), AgentConfig) if len(loc) > 1 else AgentConfig
    if "price" in loc[:-1]:
        kind = ModelPrice
    close = difflib.get_close_matches(str(loc[-1]), list(kind.model_fields), n=1)
    return f"is it {close[0]}?  If not, remove it" if close else "remove it"
