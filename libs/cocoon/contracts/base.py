"""The strict frozen base of every contract, and its money and hex field types."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from cocoon.kernel import canonical
from cocoon.kernel.money import MAX_NANOTON


class Contract(BaseModel):
    """Frozen, strict about unknown fields, and silent about values in its error texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    def to_canonical(self) -> bytes:
        """The canonical JSON bytes of this value."""
        return canonical.dumps(self.model_dump(mode="json"))


def _amount(value: Any) -> int:
    if isinstance(value, str):
        if not (value.isascii() and value.isdigit()) or (len(value) > 1 and value[0] == "0"):
            raise ValueError("an amount of nanoTON is a decimal string without leading zeros")
        return int(value)
    if type(value) is not int:
        raise ValueError("an amount of nanoTON is an integer")
    return value


# Amounts are ints in Python and decimal strings in JSON: JSON readers lose integers past 2**53.
Nanoton = Annotated[
    int,
    BeforeValidator(_amount),
    Field(ge=0, le=MAX_NANOTON),
    PlainSerializer(str, return_type=str, when_used="json"),
]
Hex16 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]  # 16 bytes
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # 32 bytes
Count = Annotated[int, Field(ge=0, le=2**32 - 1)]
TimeMs = Annotated[int, Field(ge=0, le=2**53)]  # Unix time or a duration, milliseconds
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")]
