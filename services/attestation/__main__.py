"""`python -m services.attestation`."""

from cocoon.kernel.lean import without

with without("aiohttp", "rich"):  # the bus is reached by TCP here, never by WebSockets
    from services.attestation.main import main

main()
