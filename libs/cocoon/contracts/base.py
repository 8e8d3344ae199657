"""The strict frozen base of every contract, and its money and hex field types."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from cocoon.kernel import canonical
from cocoon.kernel.money import MAX_NANOTON


class Contract(BaseModel):
    """Frozen, strict about unknown fields, and silent about values in its error texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Put the fields in order, so that pydantic writes canonical JSON by itself.

        A mapping's keys it would leave as they come, and more: only types that are known to have
        one form are taken here (see MappingContract).
        """
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.__pydantic_fields__.items():
            if not issubclass(cls, MappingContract) and not _is_canonical(field.annotation):
                raise TypeError(f"{cls.__name__}.{name} has no canonical form of its own")
        ordered = dict(sorted(cls.__pydantic_fields__.items()))
        if list(ordered) != list(cls.__pydantic_fields__):
            cls.__pydantic_fields__ = ordered
            cls.model_rebuild(force=True)

    def to_canonical(self) -> bytes:
        """The canonical JSON bytes of this value: fields are sorted, bounded, and none a float."""
        return self.__pydantic_serializer__.to_json(self)


class MappingContract(Contract):
    """A contract whose fields hold mappings: canonical JSON sorts their keys."""

    def to_canonical(self) -> bytes:
        """The canonical JSON bytes of this value. Raises ValueError for what has no such form."""
        return canonical.dumps(self.model_dump(mode="json"))


def _is_canonical(kind: Any) -> bool:
    """Whether pydantic writes every value of this type as canonical JSON does."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return True
    if origin is Annotated:
        return _is_canonical(parts[0])
    if origin is not None:
        known = origin in (tuple, list, Union, UnionType)
        return known and all(_is_canonical(part) for part in parts if part is not ...)
    return isinstance(kind, type) and issubclass(kind, int | str | bytes | NoneType | Contract)


DIGITS = r"^(0|[1-9][0-9]{0,18})$"


class _Amount:
    """Strict: an int, or its decimal digits without sign, space or leading zeros. No Python runs
    for it: a log holds several amounts per event.
    """

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        digits = core_schema.chain_schema(
            [
                core_schema.str_schema(pattern=DIGITS, strict=True),
                core_schema.int_schema(ge=0, le=MAX_NANOTON),
            ]
        )
        number = core_schema.int_schema(ge=0, le=MAX_NANOTON, strict=True)
        return core_schema.union_schema(
            [digits, number],
            mode="left_to_right",
            serialization=core_schema.to_string_ser_schema(when_used="json"),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        if handler.mode == "serialization":
            return {"type": "string", "pattern": DIGITS}
        return {"type": "integer", "minimum": 0, "maximum": MAX_NANOTON}


# Amounts are ints in Python and decimal strings in JSON: JSON readers lose integers past 2**53.
Nanoton = Annotated[int, _Amount()]
Hex16 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]  # 16 bytes
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # 32 bytes
Count = Annotated[int, Field(ge=0, le=2**32 - 1)]
TimeMs = Annotated[int, Field(ge=0, le=2**53)]  # Unix time or a duration, milliseconds
Region = Annotated[str, Field(pattern=r"^([a-z0-9-]{1,32})?$")]  # "": it tells none
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")]
