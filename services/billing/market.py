"""Pure: who offers what, folded from the network's shard. Bounded by who may enrol."""

from __future__ import annotations

from dataclasses import dataclass, field

from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.events import (
    AttestationRevoked,
    OfferedModel,
    OfferPublished,
    ProviderAttested,
)


@dataclass(slots=True)
class Market:
    """Each provider's newest offer, and the tier of its standing attestation."""

    offers: dict[str, dict[str, OfferedModel]] = field(default_factory=dict)  # by model id
    tiers: dict[str, str] = field(default_factory=dict)  # of the attested
    position: int = 0

    def apply(self, stored: StoredEvent) -> None:
        """Events seen again change nothing."""
        if stored.position <= self.position:
            return
        self.position = stored.position
        event = stored.decode()
        if isinstance(event, OfferPublished):
            self.offers[event.provider_id] = {one.model_id: one for one in event.models}
        elif isinstance(event, ProviderAttested):
            self.tiers[event.provider_id] = event.assurance
        elif isinstance(event, AttestationRevoked):
            self.tiers.pop(event.provider_id, None)

    def own_models(self, provider_id: str) -> frozenset[str]:
        return frozenset(self.offers.get(provider_id, ()))

    def name_of(self, model_id: str) -> str:
        """What an offer calls the model; empty if nobody offers it now."""
        offered = (models[model_id] for models in self.offers.values() if model_id in models)
        return next((one.name for one in offered), "")

    def resolve(self, model: str) -> str | None:
        """The model id of a name or an id: of several under one name, what most offer."""
        votes: dict[str, int] = {}
        for provider_id, models in self.offers.items():
            for one in models.values():
                if model in (one.name, one.model_id):
                    weight = 1_000_000 if provider_id in self.tiers else 1
                    votes[one.model_id] = votes.get(one.model_id, 0) + weight
        return max(votes, key=lambda one: (votes[one], one)) if votes else None

    def others(self, model_id: str, but: str) -> list[OfferedModel]:
        """The standing offers of everybody else for a model."""
        return [
            models[model_id]
            for provider_id, models in self.offers.items()
            if provider_id != but and provider_id in self.tiers and model_id in models
        ]
