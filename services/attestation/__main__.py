"""`python -m services.attestation`."""

from services.attestation.main import main

main()
