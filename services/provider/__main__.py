"""`python -m services.provider`."""

from cocoon.kernel.lean import without

with without("rich"):
    from services.provider.main import main

main()
