"""Which manifests the network keeps, and which make room for another. Pure: manifests.py does it.

What somebody offers now is never dropped. Of the rest the one goes first that was offered last the
longest ago.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from cocoon.kernel.errors import RateLimited

RETRY_WHEN_FULL_S: Final = 3600


@dataclass(frozen=True, slots=True)
class Limits:
    """How many manifests, of one provider and in all, and their bytes together."""

    in_all: int
    per_provider: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Kept:
    """One manifest, without the document."""

    size_bytes: int
    kind: str
    quantisation: str
    published_by: str
    offered_ms: int


@dataclass(slots=True)
class Shelf:
    """The manifests in the table, by model id."""

    _kept: dict[str, Kept] = field(default_factory=dict)

    def __contains__(self, model_id: str) -> bool:
        return model_id in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, model_id: str) -> Kept | None:
        return self._kept.get(model_id)

    def load(self, kept: Mapping[str, Kept]) -> None:
        self._kept = dict(kept)

    def put(self, model_id: str, kept: Kept) -> None:
        self._kept[model_id] = kept

    def drop(self, model_ids: Iterable[str]) -> None:
        for model_id in model_ids:
            self._kept.pop(model_id, None)

    def offered(self, model_ids: Iterable[str], now_ms: int) -> None:
        """These are offered now."""
        for model_id in model_ids:
            if model_id in self._kept:
                self._kept[model_id] = replace(self._kept[model_id], offered_ms=now_ms)

    def lacking(self, model_ids: Iterable[str]) -> list[str]:
        """Those of which no manifest is kept."""
        return sorted(model_id for model_id in model_ids if model_id not in self._kept)

    def stale(self, before_ms: int, offered: Collection[str]) -> list[str]:
        """What nobody offers, and nobody has since then."""
        return [
            model_id
            for model_id, kept in self._kept.items()
            if kept.offered_ms < before_ms and model_id not in offered
        ]

    def make_room(
        self, provider_id: str, size_bytes: int, limits: Limits,
        offered: Callable[[], Collection[str]],
    ) -> list[str]:  # fmt: skip
        """What has to go before this provider's next one comes. Raises RateLimited."""
        own = sum(1 for kept in self._kept.values() if kept.published_by == provider_id)
        count, size = len(self._kept), sum(kept.size_bytes for kept in self._kept.values())
        gone: list[str] = []
        if (
            own < limits.per_provider
            and count < limits.in_all
            and size + size_bytes <= limits.size_bytes
        ):
            return gone
        wanted = offered()
        idle = [item for item in self._kept.items() if item[0] not in wanted]
        idle.sort(key=lambda item: (item[1].offered_ms, item[0]))
        if own >= limits.per_provider:
            mine = next((item for item in idle if item[1].published_by == provider_id), None)
            if mine is None:
                raise RateLimited(
                    f"the network keeps {limits.per_provider} manifests of one provider, and all "
                    "of this one's are offered; offer fewer models",
                    code="too_many_manifests",
                    retry_after_s=RETRY_WHEN_FULL_S,
                )
            idle.remove(mine)
            gone.append(mine[0])
            count, size = count - 1, size - mine[1].size_bytes
        for model_id, kept in idle:
            if count < limits.in_all and size + size_bytes <= limits.size_bytes:
                break
            gone.append(model_id)
            count, size = count - 1, size - kept.size_bytes
        if count >= limits.in_all or size + size_bytes > limits.size_bytes:
            raise RateLimited(
                "the network keeps no more manifests now, and all that it has are offered; the "
                "model is served all the same",
                code="too_many_manifests",
                retry_after_s=RETRY_WHEN_FULL_S,
            )
        return gone
