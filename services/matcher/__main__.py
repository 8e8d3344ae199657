"""`python -m services.matcher`."""

from cocoon.kernel.lean import without

with without("aiohttp", "rich"):  # the bus is reached by TCP here, never by WebSockets
    from services.matcher.main import main

main()
