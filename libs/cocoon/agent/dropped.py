"""Why the network dropped a provider, in words for the person who runs it, and what cures it."""

from __future__ import annotations

from typing import Final

from cocoon.evidence.codes import REJECTIONS

BARRED: Final = frozenset({"banned", "canary"})  # new evidence is refused until somebody else acts

_SENTENCES: Final = {
    "banned": "This provider or its machine is banned, by the network's operator or its policy. "
    "Ask the operator; the agent asks now and then, and comes back once the ban is lifted.",
    "canary": "Audit jobs found answers that are not the offered model's, or tokens that are not "
    "there. Serve the manifest's own files, then ask the operator to lift this; the agent comes "
    "back once it is lifted.",
    "expired": "Its evidence ran out before it was renewed. The agent sends new evidence by "
    "itself; if this repeats, check the clock and the line to the bus.",
    "evidence_missing": "The network no longer has its evidence. The agent sends it anew.",
    "not_attested": "No evidence of it stands. The agent sends new evidence by itself.",
    "open_tier_full": "The policy now takes fewer providers without a TEE. The agent asks again "
    "by itself; a place may become free, or run it on an Intel TDX machine.",
}


def sentence(reason: str) -> str:
    """What happened, and what to do."""
    known = _SENTENCES.get(reason)
    if known is not None:
        return known
    code = REJECTIONS.get(reason)
    if code is not None:
        return f"{code.sentence} {code.next_step} The agent sends new evidence now and then."
    return "The network took its word back. The agent sends new evidence by itself."
