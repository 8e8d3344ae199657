"""`python -m services.matcher`."""

from services.matcher.main import main

main()
