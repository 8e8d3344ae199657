"""What counts can be true: the bytes that carry an answer bound the tokens that it shows.

Rule 1, stated in docs/honesty.md. A bound holds for every padding profile, because it is that of
unpadded records (P3): padding only makes the same answer larger.
"""

from __future__ import annotations

from typing import Final, Literal

from cocoon.contracts.commands import OpenDispute
from cocoon.contracts.events import DisputeOpened, EventData
from cocoon.kernel.errors import BadRequest
from cocoon.sealing.envelope import FIXED_BYTES, SLOT_BYTES
from cocoon.sealing.padding import COUNT_STEP, RECORD_HEADER_BYTES
from cocoon.sealing.prefix import PREFIX_BYTES
from cocoon.sealing.receipt import RECEIPT_BYTES, Receipt
from cocoon.sealing.records import FRAME_LENGTH_BYTES, STREAM_HEADER_BYTES, STREAM_TAG_BYTES

RULE: Final = 1
FRAME_BYTES: Final = FRAME_LENGTH_BYTES + STREAM_TAG_BYTES + RECORD_HEADER_BYTES  # 24
# the head, the stream's header, a data record's and the usage record's frames, the receipt's
LEAST_ANSWER_BYTES: Final = (
    PREFIX_BYTES + STREAM_HEADER_BYTES + 2 * FRAME_BYTES + FRAME_BYTES + RECEIPT_BYTES
)
LEAST_REQUEST_BYTES: Final = FIXED_BYTES + SLOT_BYTES + STREAM_HEADER_BYTES + FRAME_BYTES
UNSHOWN_TOKENS: Final = 64  # an end mark, special tokens, a stop sequence: billed, shown by no byte
# a byte of text is a token at most; NFKC, which some tokenizers do first, makes 33 bytes of 3
INPUT_TOKENS_PER_BYTE: Final = 11
TEMPLATE_TOKENS: Final = 1024  # what a chat template may add
ROUNDED_TOKENS: Final = COUNT_STEP - 1  # P0 and P1 round a count up

# the client's own count, with the model's tokenizer
OUTPUT_SLACK_BPS: Final = 1000  # the same text, tokenized again, may take fewer tokens
INPUT_SLACK_BPS: Final = 200
INPUT_SLACK_TOKENS: Final = 256
INPUT_SLACK_PER_MESSAGE: Final = 8
_WHOLE_BPS: Final = 10_000
Kind = Literal["input_tokens", "output_tokens"]


def most_shown_tokens(response_bytes: int) -> int:
    """Tokens that a sealed response of this size can show: a byte of text each, at most."""
    return max(0, response_bytes - LEAST_ANSWER_BYTES)


def most_input_tokens(envelope_bytes: int) -> int:
    """Tokens that a sealed request of this size can hold, its chat template's included."""
    text = max(0, envelope_bytes - LEAST_REQUEST_BYTES)
    return INPUT_TOKENS_PER_BYTE * text + TEMPLATE_TOKENS + ROUNDED_TOKENS


def impossible_counts(receipt: Receipt, *, envelope_bytes: int, response_bytes: int) -> bool:
    """Whether a receipt claims more than its ciphertext can carry.

    Tokens declared as reasoning are shown nowhere and are bounded by the header only.
    """
    shown = receipt.output_tokens - receipt.reasoning_tokens
    if shown > most_shown_tokens(response_bytes) + UNSHOWN_TOKENS + ROUNDED_TOKENS:
        return True
    return receipt.input_tokens > most_input_tokens(envelope_bytes)


def hidden_tokens(output_tokens: int, reasoning_tokens: int, shown_bytes: int) -> int:
    """The reasoning count that an enclave declares: what neither text nor the allowance covers is
    hidden, whatever its engine calls it. Never less than the engine says.
    """
    return max(reasoning_tokens, output_tokens - shown_bytes - UNSHOWN_TOKENS)


def overcounted(
    *,
    claimed_input: int,
    claimed_output: int,
    claimed_reasoning: int,
    own_input: int,
    own_output: int,
    by_tokenizer: bool,
    messages: int,
) -> Kind | None:
    """Which claimed count is beyond a client's own, None while both may be right.

    `own_*`: tokens by the model's tokenizer, else UTF-8 bytes. A claim below is nobody's loss.
    """
    shown = claimed_output - claimed_reasoning
    most = own_output + UNSHOWN_TOKENS + ROUNDED_TOKENS
    if by_tokenizer:
        most += own_output * OUTPUT_SLACK_BPS // _WHOLE_BPS
    if shown > most:
        return "output_tokens"
    if by_tokenizer:
        allowed = (
            own_input
            + own_input * INPUT_SLACK_BPS // _WHOLE_BPS
            + INPUT_SLACK_PER_MESSAGE * messages
            + INPUT_SLACK_TOKENS
            + ROUNDED_TOKENS
        )
    else:
        allowed = INPUT_TOKENS_PER_BYTE * own_input + TEMPLATE_TOKENS + ROUNDED_TOKENS
    return "input_tokens" if claimed_input > allowed else None


def decide_open_dispute(command: OpenDispute) -> tuple[EventData, ...]:
    """DisputeOpened, once a job. Raises BadRequest where the claim is not above the client's count
    at all: nothing is in dispute.
    """
    shown = command.claimed_output_tokens - command.claimed_reasoning_tokens
    surplus = {
        "output_tokens": shown - command.own_output_tokens,
        "input_tokens": command.claimed_input_tokens - command.own_input_tokens,
    }[command.kind]
    if surplus <= 0:
        raise BadRequest(
            "the receipt claims no more tokens than were counted; nothing is in dispute",
            code="no_dispute",
        )
    return (DisputeOpened(**command.model_dump()),)
