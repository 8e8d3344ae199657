"""What an answer must show before it is believed: the match the gateway names and the receipt.

Pure. The opener has checked the signature, hashes and commitments; here money, counts and names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import msgspec
from pydantic import ValidationError

from cocoon.client.choice import Addressee
from cocoon.contracts.events import Quote
from cocoon.domain import pricing
from cocoon.kernel.errors import EvidenceRejected
from cocoon.sealing import Receipt, RequestHeader, Status, public_count

_FREE = (Status.REFUSED, Status.FAILED)


@dataclass(frozen=True, slots=True)
class Match:
    """What the gateway says about who answers, at what price. Believed only with the receipt."""

    job_id: str
    provider_id: str
    epoch: int
    quote: Quote
    quote_id: bytes
    evidence_id: str


def read_match(headers: Mapping[str, str], *, job_id: str, model_id: str) -> Match:
    """Read the `x-cocoon-*` headers of a job's answer.

    Raises EvidenceRejected(bad_match) when one is missing or names another job or model, or when
    the quote is not the one that its id names.
    """
    try:
        quote, quote_id = _quote(headers["x-cocoon-quote"])
        match = Match(
            job_id=headers["x-cocoon-job-id"],
            provider_id=headers["x-cocoon-provider"],
            epoch=int(headers["x-cocoon-epoch"]),
            quote=quote,
            quote_id=bytes.fromhex(headers["x-cocoon-quote-id"]),
            evidence_id=headers.get("x-cocoon-evidence-id", ""),
        )
    except (KeyError, ValueError, ValidationError):
        refuse_answer("bad_match", "the gateway does not say who answers, or at what price")
    if match.job_id != job_id or quote.model_id != model_id:
        refuse_answer("bad_match", "the gateway names another job or model")
    if match.quote_id.hex() != quote_id:
        refuse_answer("bad_quote", "the quote is not the one that its id names")
    return match


@lru_cache(maxsize=256)
def _quote(text: str) -> tuple[Quote, str]:
    """A quote and its id. A provider's quote comes with every answer, and seldom changes."""
    quote = Quote.model_validate_json(text)
    return quote, pricing.quote_id(quote)


def check_answer(
    receipt: Receipt,
    match: Match,
    *,
    header: RequestHeader,
    by_key_id: Mapping[bytes, Addressee],
    usage: bytes | None,
) -> Addressee:
    """Check a verified receipt against the match and the exact usage; return who answered.

    Raises EvidenceRejected with the fault's code.
    """
    addressee = by_key_id[receipt.key_id]  # the opener knows the key
    check_provider(addressee, match)
    if match.evidence_id and receipt.evidence_id.hex() != match.evidence_id:
        refuse_answer("wrong_evidence", "the receipt cites other evidence than the match")
    if receipt.epoch != match.epoch or receipt.quote_id != match.quote_id:
        refuse_answer("receipt_mismatch", "the receipt is of another epoch or quote")
    _check_price(receipt, match.quote)
    _check_usage(receipt, header, usage)
    return addressee


def check_provider(addressee: Addressee, match: Match) -> None:
    """Raises EvidenceRejected(wrong_provider) unless the gateway names who sealed the answer."""
    if addressee.provider_id != match.provider_id:
        refuse_answer("wrong_provider", "the gateway names another provider than its sealer")


def check_token_prices(match: Match, most: tuple[int | None, int | None]) -> None:
    """Raises EvidenceRejected(over_price) for a quote over what the caller allows per token."""
    asked = (match.quote.input_nanoton_per_mtok, match.quote.output_nanoton_per_mtok)
    for price, limit in zip(asked, most, strict=True):
        if limit is not None and price > limit:
            refuse_answer("over_price", "its quote asks more per token than the caller allows")


def _check_price(receipt: Receipt, quote: Quote) -> None:
    try:
        counts = pricing.TokenCounts(
            input=receipt.input_tokens,
            cached_input=receipt.cached_input_tokens,
            output=receipt.output_tokens,
            reasoning=receipt.reasoning_tokens,
        )
    except ValueError:
        refuse_answer("bad_counts", "the receipt's parts exceed their whole")
    owed = 0 if receipt.status in _FREE else pricing.price(quote, counts)
    if receipt.price_nanoton != owed:
        refuse_answer("wrong_price", "its price does not follow from its counts and quote")


def _check_usage(receipt: Receipt, header: RequestHeader, usage: bytes | None) -> None:
    """The exact counts, as the public ones show them. A job that failed may have none."""
    if usage is None:
        if receipt.status in (Status.COMPLETE, Status.LENGTH):
            refuse_answer("no_usage", "the answer came without its exact usage")
        return
    told = _usage_object(usage)
    profile = header.profile
    expected = (
        (receipt.input_tokens, _count(told, "prompt_tokens"), header.max_input_tokens),
        (receipt.output_tokens, _count(told, "completion_tokens"), header.max_output_tokens),
        (
            receipt.cached_input_tokens,
            _count(told, "prompt_tokens_details", "cached_tokens"),
            receipt.input_tokens,
        ),
        (
            receipt.reasoning_tokens,
            _count(told, "completion_tokens_details", "reasoning_tokens"),
            receipt.output_tokens,
        ),
    )
    for public, exact, bound in expected:
        if public != public_count(profile, exact, bound):
            refuse_answer("bad_counts", "the receipt's counts are not those of the exact usage")


def _usage_object(usage: bytes) -> dict[str, Any]:
    """Parse the sealed usage record. Raises EvidenceRejected(bad_answer)."""
    try:
        value = msgspec.json.decode(usage)
    except (ValueError, RecursionError):  # what msgspec raises is a ValueError
        value = None
    if not isinstance(value, dict):
        refuse_answer("bad_answer", "its usage is not a JSON object")
    return value


def _count(told: dict[str, Any], *path: str) -> int:
    """A count in the usage object; an absent or null part is zero."""
    value: Any = told
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    if value is None:
        return 0
    if type(value) is not int or value < 0:
        refuse_answer("bad_answer", "its usage holds something that is not a count")
    return int(value)


def refuse_answer(code: str, reason: str) -> NoReturn:
    """Raise EvidenceRejected for an answer that may not be shown."""
    raise EvidenceRejected(
        f"The answer was refused: {reason}. It was not shown; do not pay for it.", code=code
    )
