"""Pure verifiers of what a provider proves, its policy and its trust file.

The attestation service and every client run this same code, so neither has to be trusted.
"""
