"""What `./cocoon provider` says when the agent, the disk or an option does not do as it should."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from nacl.signing import SigningKey

from cocoon.agent import AgentConfig, ModelConfig, ModelPrice, write_config
from cocoon.agent.config import Agent, Network
from cocoon.agent.door import AgentDoor, open_door
from cocoon.agent.market import Prices
from cocoon.cli import provider_status
from cocoon.cli.provider_earnings import _save
from cocoon.cli.provider_engines import Engine
from cocoon.cli.provider_init import write
from cocoon.cli.provider_network import NetworkFacts
from cocoon.cli.provider_run import run
from cocoon.cli.provider_why import _lost_lines
from cocoon.devnet.authority import DevAuthority, dev_trust
from cocoon.evidence.trust import trust_document
from cocoon.kernel.errors import CocoonError
from cocoon.telemetry.observe import Extra, serve_observe

PRICES = Prices(1, 1, 1)
TOKEN = secrets.token_hex(8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A provider's file."""
    path = tmp_path / "provider.toml"
    write_config(
        AgentConfig(
            network=Network(bus=("nats://127.0.0.1:1",), trust_file=tmp_path / "trust.json"),
            agent=Agent(seed_file=tmp_path / "seed", data_dir=tmp_path / "data"),
            models=(ModelConfig(name="m", price=ModelPrice(input=1, cached_input=1, output=1)),),
        ),
        path,
    )
    return path


async def behind_a_door(
    file: Path, command: Any, *, status: Mapping[str, Any] | None = None, token: str = TOKEN,
    reload: tuple[int, Mapping[str, Any]] = (200, {}),
) -> str | None:  # fmt: skip
    """Run a command against an agent's door that answers so. Returns its refusal."""

    async def act() -> tuple[int, Mapping[str, Any]]:
        return reload

    pages = {"/status": lambda: status or {}}
    extra = Extra(pages if status else {}, {"/reload": act, "/drain": act}, TOKEN)
    port, close = await serve_observe("127.0.0.1", 0, dict, extra=extra)
    data = file.parent / "data"
    data.mkdir()
    open_door(data, AgentDoor(os.getpid(), f"http://127.0.0.1:{port}", 0), token)
    try:
        await asyncio.to_thread(command, file)
    except CocoonError as error:
        return error.message
    finally:
        await close()
    return None


async def test_a_refused_reload_says_why(file: Path) -> None:
    refused = {"ok": False, "message": "[agent] has changed", "at_ms": 1}
    said = await behind_a_door(file, provider_status.reload, reload=(422, refused))
    assert said is not None
    assert "[agent] has changed" in said


async def test_a_reload_that_goes_on_is_not_said_to_be_done(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    goes_on = {"ok": None, "message": "the reload goes on"}
    assert await behind_a_door(file, provider_status.reload, reload=(202, goes_on)) is None
    assert capsys.readouterr().out == (
        "the reload goes on; `./cocoon provider status --json` shows its end in last_reload\n"
    )


async def test_a_reload_says_what_came_of_it(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = {"ok": True, "message": "2 models are offered, 1 of them new", "at_ms": 1}
    assert await behind_a_door(file, provider_status.reload, reload=(200, done)) is None
    assert capsys.readouterr().out == "2 models are offered, 1 of them new\n"


async def test_another_agent_s_token_is_a_sentence(file: Path) -> None:
    said = await behind_a_door(file, provider_status.reload, token="another")
    assert said is not None
    assert "control.token" in said


async def test_a_drain_that_does_not_end_is_not_said_to_be_done(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_status, "DRAIN_WITHIN_S", 0.6)
    for status in ({"running": 3}, None):  # as one that hangs
        said = await behind_a_door(
            file, provider_status.drain, status=status, reload=(202, {"draining": True})
        )
        assert (
            said == "the agent has not ended its jobs in time; `./cocoon provider status` shows it"
        )
        assert "drained" not in capsys.readouterr().out
        for path in (file.parent / "data").iterdir():
            path.unlink()
        (file.parent / "data").rmdir()


@pytest.mark.parametrize(
    ("engine", "region", "says"),
    [
        (Engine("m", "embedded"), "EU West", "region"),
        (Engine("m", "openai", "http://10.0.0.1:8000/v1"), None, "in the clear"),
        (Engine("my model", "openai", "http://127.0.0.1:8000/v1"), None, "name has spaces"),
    ],
)
def test_init_writes_nothing_for_an_answer_that_the_file_cannot_hold(
    tmp_path: Path, engine: Engine, region: str | None, says: str
) -> None:
    authority = DevAuthority.create(0)
    signer = bytes(SigningKey.generate().verify_key)
    trust = trust_document(dev_trust(authority, "dev-test", signer, bytes(32)))
    facts = NetworkFacts("http://127.0.0.1:1", ("nats://127.0.0.1:1",), trust, b"{}")
    place = tmp_path / "provider"
    with pytest.raises(CocoonError) as refused:
        write(place, facts, engine, PRICES, region)
    assert says in refused.value.message
    assert not place.exists()


def test_a_data_folder_that_cannot_be_made_is_a_sentence(file: Path) -> None:
    (file.parent / "data").write_text("")
    with pytest.raises(CocoonError, match="data cannot be made"):
        run(file)


def test_a_receipt_that_cannot_be_written_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Said:
        job_id, model_id, price_nanoton = b"\1" * 16, b"\2" * 32, 7

    monkeypatch.setattr("cocoon.sealing.receipt.verify_receipt", lambda *_: Said)
    row = {
        "job_id": "01" * 16, "epoch": 1, "price_nanoton": 7, "model_id": "02" * 32,
        "receipt": "00", "signing_key": "00",
    }  # fmt: skip
    with pytest.raises(CocoonError, match="cannot be written"):
        _save(row, tmp_path / "gone")


def test_why_does_not_say_that_it_saw_all_when_it_did_not() -> None:
    (line,) = _lost_lines({"lost": [], "told": "", "more": True}, None, 24)
    assert (
        line == "none went elsewhere in the part of 24 hours that was looked at; give fewer --hours"
    )
    one = {"at_ms": 0, "job_id": "0", "told": "x", "reason": "price", "margin_bps": None}
    for lost, more, ends in (
        ([one] * 30, False, "  (the newest; --json has them all)"),
        ([one] * 30, True, "  (the newest; what lies further back was not looked at)"),
        ([one], False, "  1970-01-01 00:00:00  0  x"),
        ([one], True, "  (the newest; what lies further back was not looked at)"),
    ):
        assert _lost_lines({"lost": lost, "told": "", "more": more}, None, 24)[-1] == ends
