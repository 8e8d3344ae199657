"""Five processes with the same file names in each: gateway, matcher, provider, billing,
attestation.
"""
