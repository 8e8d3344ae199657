"""Importing a library without the packages that it takes along for what we never ask of it.

A service that died is back as soon as its imports are done: nats-py's WebSockets and structlog's
coloured tracebacks cost a third of them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Let optional packages look absent while the block imports; those loaded before stay.

    Afterwards they can be imported as ever; what the block imported goes on without them.
    """
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # "there is none"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
