"""`python -m services.billing`."""

from cocoon.kernel.lean import without

with without("aiohttp", "rich"):  # the bus is reached by TCP here, never by WebSockets
    from services.billing.main import main

main()
