"""`python -m cocoon.cli`."""

from cocoon.cli.app import main

main()
