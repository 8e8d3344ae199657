"""`cocoon status`: what runs, how far each part has read, who provides, what the books hold."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cocoon.cli.session import Data, Json, as_operator, data_hint, folder_of
from cocoon.kernel.money import format_ton

if TYPE_CHECKING:
    from nats.aio.client import Client

    from cocoon.devnet.folder import DataFolder, RunningNetwork


def status(data: Data = None, as_json: Json = False) -> None:
    """Show the network's services, log, providers and the first account's balance."""
    found = as_operator(data, _collect)
    hint = data_hint(folder_of(data))
    if as_json:
        print(json.dumps(found))
        return
    print(
        f"network {found['network_id']}   gateway {found['gateway']}   sidecar {found['sidecar']}"
    )
    print()
    for name, state in found["services"].items():
        print(f"  {name:12} {'up' if state else 'DOWN'}")
    print()
    for shard, head in found["streams"].items():
        print(f"  log shard {shard}: {head} events relayed")
    print()
    for provider in found["providers"]:
        running, most = provider["running"], provider["concurrency"]
        print(
            f"  {provider['provider_id']}  {', '.join(provider['models'])}"
            f"  {running} of {most} jobs  {_profile(provider)}"
        )
    if not found["providers"]:
        print("  no provider is listed yet")
    for row in found["parked"]:
        print(
            f"\n  PARKED {row['stream']} on shard {row['shard']}: {row['reason']} at position"
            f" {row['position']}; {row['events']} of its events wait, nobody is paid for it;"
            f" mend its cause, then: ./cocoon unpark {row['shard']} {row['stream']}{hint}"
        )
    for name, one in found["honesty"].items():
        if one["dishonest"] or one["disputes"]:
            word = "revoked by canaries; " if one["dishonest"] else ""
            print(
                f"  {name}: {word}{one['differed']} of {one['canaries']} canaries differed, "
                f"{one['disputes']} disputes of clients"
            )
    money = found["account"]
    if money:
        print(
            f"\n  account {money['account_id']}: {format_ton(int(money['available_nanoton']))} TON "
            f"free, {format_ton(int(money['held_nanoton']))} TON held"
        )


def _profile(provider: dict[str, Any]) -> str:
    """Tier, quantisations and region, as far as they are told."""
    told = {one for one in provider["quantisations"].values() if one}
    parts = [provider["tier"], *sorted(told), *([provider["region"]] if provider["region"] else ())]
    return ", ".join(parts)


async def _collect(nc: Client, running: RunningNetwork, folder: DataFolder) -> dict[str, Any]:
    from cocoon.devnet.overview import collect

    return await collect(nc, running, folder)
