"""The network's signed rules: which hardware, images, models and suites are taken.

Canonical JSON signed k of n with Ed25519. Its hash is in every sealed request's header, so a
client and an enclave under different rules fail loudly. A field that is not known is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey
from pydantic import Field, ValidationError

from cocoon.contracts.base import Contract, Count, Hex32, Name
from cocoon.contracts.matching import OpenTierLimits
from cocoon.kernel import canonical

MAX_POLICY_BYTES = 512 * 1024
_SIGNED_AS = b"cai/1 policy\0"
_ZEROS_48 = "00" * 48

Hex8 = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Hex48 = Annotated[str, Field(pattern=r"^[0-9a-f]{96}$")]
Ppid = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
NetworkClass = Literal["prod", "dev"]
# UpToDate is always taken and Revoked never, so neither can be listed.
TcbStatus = Literal[
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
]
_Grace = Annotated[int, Field(ge=0, le=366 * 86_400)]


class TdxRules(Contract):
    """Which TDX platforms are taken. An out-of-date one needs its status and a grace."""

    allowed_statuses: tuple[TcbStatus, ...] = ()
    platform_grace_s: _Grace = 0
    qe_grace_s: _Grace = 0
    min_evaluation_number: Count = 0
    refused_advisories: tuple[Name, ...] = ()
    allow_dynamic_platform: bool = False
    allow_cached_keys: bool = False
    allow_smt: bool = False
    td_attributes: tuple[Hex8, ...] = ("0000001000000000",)  # SEPT_VE_DISABLE and nothing else
    xfam: tuple[Hex8, ...] = ("e702060000000000",)


class GpuRules(Contract):
    """Which GPU evidence is asked for."""

    required: bool = False


class TdxImage(Contract):
    """One released image on one machine shape; every register must be equal."""

    name: Name
    mr_td: Hex48
    rtmr0: Hex48
    rtmr1: Hex48
    rtmr2: Hex48
    rtmr3: Hex48
    mr_config_id: Hex48 = _ZEROS_48
    mr_owner: Hex48 = _ZEROS_48
    mr_owner_config: Hex48 = _ZEROS_48


class Bans(Contract):
    ppids: tuple[Ppid, ...] = ()
    evidence_ids: tuple[Hex32, ...] = ()


class OpenTierRules(OpenTierLimits):
    """Whether providers without a TEE are taken, and how far; the limits are of one of them."""

    allowed: bool
    max_providers: Annotated[int, Field(ge=1, le=10_000)]  # that stand at once


class Policy(Contract):
    """The unsigned document. `previous_hash` is the policy hash it replaces."""

    format: Literal[1] = 1
    network_id: Name
    network_class: NetworkClass
    version: Annotated[int, Field(ge=1, le=2**32 - 1)]
    previous_hash: Hex32 | None = None
    anchors: tuple[Hex32, ...]  # SHA-256 of the vendor roots' DER; they must be in the trust file
    tdx: TdxRules = TdxRules()
    gpu: GpuRules = GpuRules()
    images: tuple[TdxImage, ...] = ()
    models: tuple[Hex32, ...] | None = None  # None: any model
    facility_ppids: tuple[Ppid, ...] = ()
    bans: Bans = Bans()
    suites: tuple[Annotated[int, Field(ge=1, le=255)], ...] = (1,)
    max_evidence_age_s: Annotated[int, Field(ge=60, le=30 * 86_400)] = 7200
    # left out where there is none, so that policies from before keep their bytes and hashes
    open_tier: Annotated[OpenTierRules | None, Field(exclude_if=lambda rules: rules is None)] = None

    @property
    def open_rules(self) -> OpenTierRules | None:
        """The open tier's rules; None where providers without a TEE are not taken."""
        return self.open_tier if self.open_tier is not None and self.open_tier.allowed else None


class PolicySignature(Contract):
    public_key: Hex32
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class SignedPolicy(Contract):
    """The policy and its signatures, as it travels and as it is stored."""

    policy: Policy
    signatures: Annotated[tuple[PolicySignature, ...], Field(max_length=32)] = ()


def policy_hash(policy: Policy) -> bytes:
    """SHA-256 of the canonical unsigned document (32 bytes)."""
    return hashlib.sha256(policy.to_canonical()).digest()


def sign(policy: Policy, seeds: Iterable[bytes]) -> SignedPolicy:
    """Sign with each 32-byte Ed25519 seed."""
    message = _SIGNED_AS + policy.to_canonical()
    keys = [SigningKey(seed) for seed in seeds]
    return SignedPolicy(
        policy=policy,
        signatures=tuple(
            PolicySignature(
                public_key=bytes(key.verify_key).hex(), signature=key.sign(message).signature.hex()
            )
            for key in keys
        ),
    )


def verify(signed: SignedPolicy, signers: Sequence[bytes], threshold: int) -> bool:
    """Whether at least `threshold` different keys of `signers` (32 bytes each) signed it."""
    if threshold < 1:
        return False
    message = _SIGNED_AS + signed.policy.to_canonical()
    allowed = {key.hex() for key in signers}
    good: set[str] = set()  # keys, so that one signature given twice counts once
    for item in signed.signatures:
        if item.public_key not in allowed:
            continue
        try:
            VerifyKey(bytes.fromhex(item.public_key)).verify(message, bytes.fromhex(item.signature))
        except BadSignatureError:
            continue
        good.add(item.public_key)
    return len(good) >= threshold


def parse_policy(data: bytes) -> SignedPolicy:
    """Parse a signed policy's JSON. Raises ValueError that says what is wrong, never its values.

    Parsing does not verify: call `verify` with the trust file's signers.
    """
    if len(data) > MAX_POLICY_BYTES:
        raise ValueError("the policy is larger than 512 KiB")
    try:
        return SignedPolicy.model_validate(canonical.loads_object(data, strict=False))
    except ValidationError as error:
        raise ValueError(
            f"the policy does not have the expected form at {wrong_place(error)!r}"
        ) from None


def wrong_place(error: ValidationError) -> str:
    """Where a document is wrong: the field's path, cut, for the last name may be the document's."""
    return ".".join(str(part) for part in error.errors(include_input=False)[0]["loc"])[:100]
