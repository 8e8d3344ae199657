# ruff: noqa: E501 - a wrong file is a line
"""provider.toml: what it takes, in which words it refuses, and that it is written as it is read."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoon.agent import AgentConfig, config_text, parse_config, read_config, write_config
from cocoon.agent.config import Agent, ModelConfig, ModelPrice, Network, Tee
from cocoon.kernel.errors import ConfigurationError

FOLDER = Path("/srv/cocoon")
WHOLE = """
[network]
gateway = "https://gateway.example"
bus = ["wss://bus.example:443", "wss://bus2.example:443"]
trust_file = "trust.json"
[agent]
seed_file = "identity.seed"
data_dir = "data"
region = "eu-west"
[[models]]
name = "skills-1"
concurrency = 4
max_waiting = 2
[models.price]
input = 1
cached_input = 2
output = 3
[[models]]
name = "large"
engine = "openai"
url = "http://127.0.0.1:8000/v1"
served_as = "org/large"
context_tokens = 8192
capabilities = ["seed", "logprobs"]
warm = false
unload_after_s = 60
[models.price]
input = 4
cached_input = 5
output = 6
"""


def test_a_file_is_read_whole_and_its_paths_are_relative_to_it() -> None:
    config = parse_config(WHOLE, FOLDER)
    assert config.network.trust_file == FOLDER / "trust.json"
    assert config.agent.data_dir == FOLDER / "data"
    assert config.tee.kind == "tdx"
    skills, large = config.models
    assert (skills.places, skills.engine, skills.warm, skills.price.all) == (
        6, "embedded", True, (1, 2, 3),
    )  # fmt: skip
    assert (large.served_as, large.capabilities) == ("org/large", {"seed", "logprobs"})


@pytest.mark.parametrize(
    ("change", "to", "says"),
    [
        ('trust_file = "trust.json"', "", "network.trust_file is missing; add it."),
        ("max_waiting = 2", "max_waitin = 2", "models[0].max_waitin is not a setting of this file; is it max_waiting?"),
        ("concurrency = 4", "concurrency = 0", "models[0].concurrency: input should be greater than or equal to 1"),
        ("concurrency = 4", "concurrency = 4.0", "models[0].concurrency: input should be a valid integer"),
        ("input = 1", "input = -1", "models[0].price.input: input should be greater than or equal to 0"),
        ("input = 1", "inptu = 1", "models[0].price.inptu is not a setting of this file; is it input?"),
        ('"large"', '"skills-1"', "models: skills-1 is there twice"),
        ('gateway = "https://', 'gateway = "http://', "network.gateway is not an address that begins with https://"),
        ('"wss://bus', '"http://bus', "network.bus[0] is not an address that begins with nats://"),
        ('"wss://bus', '"tls://bus', "network.bus mixes kinds of addresses"),
        ('"wss://bus.example:443", "wss://', '"ws://bus.example:443", "ws://', "network.bus: a plain line to another machine"),
        ('"wss://bus.example:443", "wss://', '"nats://bus.example:443", "nats://', "network.bus: a plain line to another machine"),
        ("http://127.0.0.1:8000/v1", "http://10.0.0.1/v1", "models[1] has a url that is not an address"),
        ("http://127.0.0.1:8000/v1", "http://user@127.0.0.1/v1", "models[1] has a url that is not an address"),
        ('url = "http://127.0.0.1:8000/v1"', "", 'models[1] has engine = "openai" and lacks url'),
        ('engine = "openai"', "", "models[1] has url, which is for the engines"),
        ("warm = false", "warm = true", "models[1] has unload_after_s, which is for warm = false"),
        ("warm = false", "warm = 0", "models[1].warm: input should be a valid boolean"),
        ('name = "large"', 'name = "large"\nfolder = "weights"', "models[1] has a folder for a server's model, which is hashed only against a manifest"),
        ("[[models]]", "[tee]\nkind = \"none\"\ndev_platform_file = 'p'\n[[models]]", "tee names dev_authority_file or dev_platform_file"),
        ("[[models]]", '[tee]\nkind = "simulated"\n[[models]]', 'tee is of kind = "simulated" and lacks dev_authority_file'),
        ("[[models]]", "[tee]\nkind = \"simulated\"\ndev_authority_file = 'a'\n[[models]]", "tee: a simulated TEE proves nothing in production"),
        ('region = "eu-west"', 'region = "EU West"', "agent.region: string should match pattern"),
        ("[[models]]", "[models", "is not TOML"),
        ('name = "skills-1"', 'name = "skills-1"\nenabled = 7', "models[0].enabled"),
        ('"org/large"', '" org"', "models[1].served_as is empty, or has spaces around it"),
        ('name = "skills-1"', 'name = " skills"', "models[0].name has spaces or characters beyond ASCII"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_what_to_do(change: str, to: str, says: str) -> None:
    assert change in WHOLE
    with pytest.raises(ConfigurationError) as refused:
        parse_config(WHOLE.replace(change, to, 1), FOLDER)
    assert says in refused.value.message


def test_all_wrong_fields_are_named_at_once_and_no_value_is_told() -> None:
    text = WHOLE.replace("concurrency = 4", 'concurrency = "s3cret"').replace("output = 6", "")
    with pytest.raises(ConfigurationError) as refused:
        parse_config(text, FOLDER)
    assert "models[0].concurrency" in refused.value.message
    assert "models[1].price.output is missing" in refused.value.message
    assert "s3cret" not in refused.value.message


def test_an_agent_without_an_enabled_model_is_refused() -> None:
    text = WHOLE.replace("[models.price]", "enabled = false\n[models.price]")
    with pytest.raises(ConfigurationError, match="none is enabled"):
        parse_config(text, FOLDER)


def test_a_file_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cocoon provider init"):
        read_config(tmp_path / "provider.toml")


def test_a_written_file_is_read_as_it_was_and_every_line_of_it_is_explained(
    tmp_path: Path,
) -> None:
    config = parse_config(WHOLE, tmp_path)
    path = tmp_path / "sub" / "provider.toml"
    write_config(config, path)
    assert read_config(path) == config
    settings = [line for line in path.read_text().splitlines() if " = " in line]
    assert settings
    assert all("  # " in line for line in settings)
    write_config(config, tmp_path / "provider.toml")
    near = tomllib.loads((tmp_path / "provider.toml").read_text())
    assert near["network"]["trust_file"] == "trust.json"  # the folder may move as a whole


# ---- every configuration ----

_name = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0x10FFFF, exclude_categories=["Cs"]),
    min_size=1, max_size=40,
).filter(lambda text: text.isprintable() and text == text.strip())  # fmt: skip
_word = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=40)
_path_part = st.text(
    st.characters(min_codepoint=1, max_codepoint=0x2FFF, exclude_characters="/"),
    min_size=1, max_size=12,
).filter(lambda part: part not in (".", ".."))  # fmt: skip
_path = st.builds(
    lambda root, parts: Path(root).joinpath(*parts),
    st.sampled_from(["/", "/srv/cocoon", "/srv/cocoonelse"]),
    st.lists(_path_part, min_size=1, max_size=3),
)
_maybe_path = st.none() | _path
_price = st.integers(0, 10**15)
_prices = st.builds(ModelPrice, input=_price, cached_input=_price, output=_price)
_shared = {
    "kind": st.sampled_from(["chat", "embeddings"]),
    "manifest_file": _path,
    "folder": _maybe_path,
    "concurrency": st.integers(1, 4096),
    "max_waiting": st.integers(0, 4096),
    "price": _prices,
}
_life = st.sampled_from([{"warm": True}, {"warm": False}, {"warm": False, "unload_after_s": 10}])
_embedded = st.builds(
    lambda life, **fields: {**fields, **life}, _life, **_shared, engine=st.just("embedded")
)
_servers = {
    "served_as": st.none() | _name,
    "api_key_file": _maybe_path,
    "ca_file": _maybe_path,
    "metrics_url": st.sampled_from([None, "http://localhost:8002/metrics"]),
    "context_tokens": st.integers(16, 10_000_000),
    "capabilities": st.frozensets(st.sampled_from(["logprobs", "seed", "json_object"])),
    "quantisation": _word,
    "read_timeout_s": st.floats(0, 86_400, exclude_min=True),
}
_server = st.builds(
    lambda life, where, **fields: {**fields, **life, "engine": where[0], "url": where[1]},
    _life,
    st.sampled_from([
        ("openai", "https://engine.example/v1"), ("openai", "http://[::1]:8000"),
        ("triton", "grpc://127.0.0.1:8001"), ("triton", "grpcs://engine.example:8001"),
    ]),
    **_shared, **_servers,
)  # fmt: skip
_models = st.builds(
    lambda all_fields, names: tuple(
        ModelConfig(name=name, enabled=at == 0 or len(name) % 2 == 0, **fields)
        for at, (fields, name) in enumerate(zip(all_fields, names, strict=False))
    ),
    st.lists(_embedded | _server, min_size=1, max_size=3),
    st.lists(_word, min_size=3, max_size=3, unique=True),
)
_network = st.builds(
    Network,
    gateway=st.sampled_from([None, "https://gateway.example", "http://localhost:8641"]),
    bus=st.lists(
        st.sampled_from(["wss://h:4222", "wss://h", "wss://[::1]:80", "wss://bus.example:443"]),
        min_size=1, max_size=3,
    ).map(tuple),
    trust_file=_path, policy_file=_maybe_path, ca_file=_maybe_path,
)  # fmt: skip
_agent = st.builds(
    Agent,
    seed_file=_path, data_dir=_path, environment=st.just("dev"),
    region=st.none() | st.from_regex(r"[a-z0-9-]{1,32}", fullmatch=True),
)  # fmt: skip
_tee = st.sampled_from([Tee(), Tee(kind="none")]) | st.builds(
    Tee, kind=st.just("simulated"), dev_authority_file=_path, dev_platform_file=_maybe_path
)
_configs = st.builds(AgentConfig, network=_network, agent=_agent, tee=_tee, models=_models)


@given(_configs)
def test_what_is_written_is_read_again_as_it_was(config: AgentConfig) -> None:
    assert parse_config(config_text(config, FOLDER), FOLDER) == config


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_config(text, FOLDER)
