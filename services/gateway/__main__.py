"""`python -m services.gateway`."""

from cocoon.kernel.lean import without

with without("aiohttp", "rich"):  # the bus is reached by TCP here, never by WebSockets
    from services.gateway.main import main

main()
