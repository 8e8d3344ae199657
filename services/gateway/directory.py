"""The directory of providers as attestation gives it: cached for a second, one fetch at a time.

The gateway passes it on and vouches for nothing: clients verify everything in it.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cocoon.bus.requests import ask
from cocoon.contracts import subjects
from cocoon.contracts.messages import DirectoryRequest
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import Unavailable

if TYPE_CHECKING:
    from nats.aio.client import Client

MAX_CACHED: Final = 64
MAX_FETCHES: Final = 32
MAX_PAGES: Final = 64
_PRICES: Final = (
    "input_nanoton_per_mtok", "cached_input_nanoton_per_mtok", "output_nanoton_per_mtok",
)  # fmt: skip


class Listing(NamedTuple):
    """A directory, as it is sent and parsed."""

    body: bytes
    value: dict[str, Any]


class Directory:
    """Listings by model name; None is the whole network."""

    def __init__(self, nc: Client, clock: Clock, ttl_s: float, timeout_s: float) -> None:
        self._nc, self._clock = nc, clock
        self._ttl_s, self._timeout_s = ttl_s, timeout_s
        self._cache: OrderedDict[str | None, tuple[float, Listing]] = OrderedDict()
        self._fetches: dict[str | None, asyncio.Task[Listing]] = {}

    async def listing(self, model: str | None) -> Listing:
        """The directory of a model, at most a TTL old.

        Raises what attestation answered or Unavailable.
        """
        cached = self._cache.get(model)
        if cached is not None and cached[0] > self._clock.monotonic_s():
            return cached[1]
        task = self._fetches.get(model)
        if task is None:
            if len(self._fetches) >= MAX_FETCHES:
                raise Unavailable("the directory is asked too often; try again", retry_after_s=1)
            task = asyncio.create_task(self._fetch(model))
            self._fetches[model] = task
            task.add_done_callback(lambda done: self._done(model, done))
        return await asyncio.shield(task)

    async def network(self) -> dict[str, Any]:
        """The signed policy, which names its network, and the log's position."""
        whole = (await self.listing(None)).value
        policy = whole.get("policy") or {}
        return {
            "network_id": (policy.get("policy") or {}).get("network_id"),
            "policy": policy,
            "log": whole.get("log"),
        }

    async def models(self) -> dict[str, Any]:
        """OpenAI's list object of the offered models, with their tier, context and prices."""
        found: dict[str, dict[str, Any]] = {}
        for entry in (await self.listing(None)).value["providers"]:
            offer = entry["offer"]
            model = found.setdefault(
                offer["name"],
                {
                    "model_ids": {}, "tiers": set(), "providers": 0, "context_tokens": 0,
                    "prices": {}, "manifests": {},
                },
            )  # fmt: skip
            model["tiers"].add(str(entry["tier"]))
            model["providers"] += 1
            ids = model["model_ids"]
            ids[offer["model_id"]] = ids.get(offer["model_id"], 0) + 1
            model["manifests"][offer["model_id"]] = entry.get("manifest") or {}
            model["context_tokens"] = max(model["context_tokens"], int(offer["context_tokens"]))
            for price in _PRICES:
                known = model["prices"].get(price)
                if known is None or int(offer[price]) < int(known):
                    model["prices"][price] = str(offer[price])
        return {
            "object": "list",
            "data": [_model_object(name, found[name]) for name in sorted(found)],
        }

    async def close(self) -> None:
        running = list(self._fetches.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _fetch(self, model: str | None) -> Listing:
        """All pages as one listing, bounded in pages and so in bytes."""
        value: dict[str, Any] = {}
        after = ""
        for _ in range(MAX_PAGES):
            body = DirectoryRequest(model=model, after=after)
            page = json.loads(
                await ask(self._nc, subjects.DIRECTORY_REQUEST, body, self._timeout_s)
            )
            entries = [*value.get("providers", []), *page.pop("providers")]
            after = page.pop("next", "")
            value = {**page, "providers": entries}
            if not after:
                break
        return Listing(json.dumps(value, separators=(",", ":")).encode(), value)

    def _done(self, model: str | None, task: asyncio.Task[Listing]) -> None:
        self._fetches.pop(model, None)
        if task.cancelled() or task.exception() is not None:
            return  # whoever waits is told; a failure is not remembered
        self._cache[model] = (self._clock.monotonic_s() + self._ttl_s, task.result())
        self._cache.move_to_end(model)
        if len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)


def _model_object(name: str, model: dict[str, Any]) -> dict[str, Any]:
    tiers, ids = sorted(model["tiers"]), model["model_ids"]
    model_id = max(ids, key=lambda one: (ids[one], one))  # as clients choose among them
    manifest = model["manifests"][model_id]
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "cocoon",
        "cocoon": {
            "model_id": model_id,
            "model_ids": dict(sorted(ids.items())),
            "tier": tiers[0] if len(tiers) == 1 else ",".join(tiers),
            "providers": model["providers"],
            "kind": manifest.get("kind"),  # None: nobody has published its manifest
            "quantisation": manifest.get("quantisation"),
            "context_tokens": model["context_tokens"],
            "prices": model["prices"],
        },
    }
