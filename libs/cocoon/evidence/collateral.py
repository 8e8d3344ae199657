"""Intel's collateral as it travels, and the floors that keep it from being rolled back.

`tcb_info` and `qe_identity` stay byte for byte as Intel signed them; nothing here trusts them.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated

from pydantic import Field, ValidationError

from cocoon.contracts.base import Contract, Count, MappingContract

MAX_COLLATERAL_BYTES = 256 * 1024
_PEM = re.compile(
    r"-----BEGIN CERTIFICATE-----\r?\n([A-Za-z0-9+/=\r\n]{1,16384})-----END CERTIFICATE-----\s{0,4}"
)
_Text = Annotated[str, Field(min_length=1, max_length=MAX_COLLATERAL_BYTES)]
_Hex = Annotated[str, Field(pattern=r"^(?:[0-9a-fA-F]{2})+$", max_length=MAX_COLLATERAL_BYTES)]
_Signature = Annotated[str, Field(pattern=r"^[0-9a-fA-F]{128}$")]
_Fmspc = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]


class Collateral(Contract):
    """The nine parts that Intel's provisioning service publishes for one FMSPC."""

    pck_crl_issuer_chain: _Text
    root_ca_crl: _Hex
    pck_crl: _Hex
    tcb_info_issuer_chain: _Text
    tcb_info: _Text
    tcb_info_signature: _Signature
    qe_identity_issuer_chain: _Text
    qe_identity: _Text
    qe_identity_signature: _Signature
    # Intel's service adds it; unused, because only the chain inside the quote is taken.
    pck_certificate_chain: str | None = None


def parse_collateral(text: str) -> Collateral:
    """Parse collateral JSON of at most 256 KiB. Raises ValueError for anything else."""
    if len(text) > MAX_COLLATERAL_BYTES:
        raise ValueError("the collateral is larger than 256 KiB")
    try:
        return Collateral.model_validate_json(text)
    except ValidationError:
        raise ValueError("the collateral lacks a part or holds an unknown one") from None


def chain_der(pem_chain: str) -> list[bytes]:
    """The DER certificates of a PEM chain that holds nothing else. ValueError otherwise.

    Strict on purpose: two parsers must not see two different first certificates.
    """
    result: list[bytes] = []
    position = 0
    while position < len(pem_chain):
        block = _PEM.match(pem_chain, position)
        if block is None:
            raise ValueError("the chain holds something other than certificates")
        try:
            result.append(base64.b64decode(re.sub(r"[\r\n]", "", block[1]), validate=True))
        except binascii.Error:
            raise ValueError("a certificate in the chain is not base64") from None
        position = block.end()
    return result


class CollateralFloor(Contract):
    """The greatest numbers seen in authentic collateral of one FMSPC."""

    evaluation_number: Count = 0
    root_crl_number: Count = 0
    pck_crl_number: Count = 0


class CollateralFloors(MappingContract):
    """Floors per FMSPC (12 hex digits). The caller persists them; they only rise."""

    by_fmspc: dict[_Fmspc, CollateralFloor] = Field(default_factory=dict)

    def of(self, fmspc: str) -> CollateralFloor:
        return self.by_fmspc.get(fmspc, CollateralFloor())

    def raised(self, fmspc: str, seen: CollateralFloor) -> CollateralFloors:
        """These floors, with `fmspc`'s raised to `seen` where that is greater."""
        known = self.of(fmspc)
        floor = CollateralFloor(
            evaluation_number=max(known.evaluation_number, seen.evaluation_number),
            root_crl_number=max(known.root_crl_number, seen.root_crl_number),
            pck_crl_number=max(known.pck_crl_number, seen.pck_crl_number),
        )
        if floor == known:
            return self
        return CollateralFloors(by_fmspc={**self.by_fmspc, fmspc: floor})


NO_FLOORS = CollateralFloors()
