"""`python -m services.provider`."""

from services.provider.main import main

main()
