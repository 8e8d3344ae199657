"""Every code a verdict can carry, with the sentence and the remedy that a person reads.

A code that is not in this table cannot be made into a verdict, so each refusal says what to do.
"""

from __future__ import annotations

from typing import NamedTuple


class Code(NamedTuple):
    sentence: str
    next_step: str


_NEW_QUOTE = "Ask the provider to make new evidence; if it repeats, take the machine out of use."
_COLLATERAL = "Fetch fresh collateral for this FMSPC from Intel's service and verify again."
_UPDATE = "Update the machine's firmware, TDX module or quoting enclave, then make new evidence."
_SCOPE = "Offer the model from an Intel TDX machine, or wait for this network to support the kind."

REJECTIONS: dict[str, Code] = {
    # the quote itself
    "malformed": Code("The evidence is not in the expected form.", _NEW_QUOTE),
    "not_tdx": Code("The quote is not from a TDX virtual machine.", "Send a TDX quote."),
    "bad_signature": Code("The quote's signature does not cover these bytes.", _NEW_QUOTE),
    "qe_signature": Code("The quoting enclave's report is not signed by the platform.", _NEW_QUOTE),
    "qe_binding": Code("The attestation key is not the quoting enclave's.", _NEW_QUOTE),
    "qe_identity": Code("The quoting enclave is not one that Intel lists.", _UPDATE),
    "cert_chain": Code(
        "A certificate chain does not verify, or a certificate is used for another's role.",
        "Provision the platform again so that it gets a current PCK certificate.",
    ),
    "unknown_root": Code(
        "The evidence does not lead to a vendor root that this trust file and policy name.",
        "Check that the trust file is the network's; never add a root that a gateway offers.",
    ),
    "revoked": Code(
        "A certificate or the platform's TCB is revoked.", "Take the machine out of use."
    ),
    # collateral
    "crl_stale": Code("A revocation list is older than one already seen.", _COLLATERAL),
    "collateral_expired": Code("The collateral has expired.", _COLLATERAL),
    "collateral_not_yet_valid": Code(
        "The collateral is dated in the future.", "Check the clock, then fetch collateral again."
    ),
    "collateral_signature": Code("The collateral's signature does not verify.", _COLLATERAL),
    "collateral_malformed": Code("The collateral cannot be read.", _COLLATERAL),
    "collateral_wrong_type": Code("The collateral belongs to another kind of quote.", _COLLATERAL),
    "fmspc_mismatch": Code("The collateral is for another processor family.", _COLLATERAL),
    # the platform's level
    "tcb_status": Code("The platform's TCB status is not one that the policy takes.", _UPDATE),
    "tcb_grace": Code("The platform has been out of date for longer than the grace.", _UPDATE),
    "tcb_unsupported": Code("The platform is below every TCB level that Intel lists.", _UPDATE),
    "tcb_eval_number": Code(
        "The TCB evaluation number is below the policy's minimum or one already seen.", _COLLATERAL
    ),
    "tcb_mismatch": Code("The TDX module is not the one that the collateral lists.", _UPDATE),
    "advisory": Code("The platform is open to a security advisory that is refused.", _UPDATE),
    "policy_platform": Code(
        "The platform's configuration (dynamic, cached keys or SMT) is refused by the policy.",
        "Change the platform's configuration, or ask the network to change its policy.",
    ),
    "refused": Code(
        "The quote library refused for a reason that this version does not know.",
        "Update Cocoon; until then the evidence stays refused.",
    ),
    # the virtual machine
    "debug": Code(
        "The virtual machine can be debugged by its host.", "Start it without debug or profiling."
    ),
    "td_attributes": Code(
        "The virtual machine's attributes or features are not ones that the policy takes.",
        "Start it with the attributes that the policy lists.",
    ),
    "measurement": Code(
        "The virtual machine is not an image that the policy lists.",
        "Start a released image on a listed machine shape, or wait for a policy that lists it.",
    ),
    "event_digest": Code("An event's digest is not that of its payload.", _NEW_QUOTE),
    "rtmr_mismatch": Code("The event log does not replay to the quote's registers.", _NEW_QUOTE),
    # the provider
    "report_data_mismatch": Code(
        "The quote does not cover these claims, so the keys in them are not attested.", _NEW_QUOTE
    ),
    "nonce": Code(
        "The challenge in the claims was not made for this provider and checkpoint.",
        "Ask for a new challenge and make new evidence with it.",
    ),
    "claims_window": Code(
        "The claims are not valid at this time.", "Check the clock, then make new evidence."
    ),
    "too_old": Code("The evidence is older than the policy allows.", "Make new evidence."),
    "models_mismatch": Code(
        "The listed models are not those that the quote covers.", "List the attested models."
    ),
    "model_denied": Code(
        "A model is not on the policy's list.", "Serve a listed model, or ask for it to be listed."
    ),
    "gpu_missing": Code(
        "The policy or the claims ask for GPU evidence, and there is none.",
        "Send a report of every GPU that serves the offer.",
    ),
    "banned": Code("The machine or this evidence is banned by the policy.", "Use another machine."),
    # the open tier
    "open_tier": Code(
        "The policy takes no provider without a TEE.",
        "Offer the model from an Intel TDX machine, or wait for a policy that has an open tier.",
    ),
    "identity": Code(
        "The claims are not signed by the identity key that the provider id is made from.",
        "Make new evidence with the provider's own identity key.",
    ),
    # whose rules
    "policy_unsigned": Code(
        "The policy is not signed for this network by enough of its signers.",
        "Fetch the policy again; use the trust file that the network publishes.",
    ),
    "dev_anchor": Code(
        "A development root or policy is offered outside a development network.",
        "Use real hardware; DEV ONLY roots count only with a dev trust file and a dev policy.",
    ),
}

ERRORS: dict[str, Code] = {
    "collateral_missing": Code("There is no collateral to verify the quote with.", _COLLATERAL),
    "unsupported": Code("This kind of evidence cannot be verified yet.", _SCOPE),
    "key_missing": Code(
        "The trust file's root cannot be used.", "Replace the trust file with the network's."
    ),
    "clock": Code("The verification time is not a time.", "Set this machine's clock."),
}
