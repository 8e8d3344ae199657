"""JSON logs on stderr, one object a line, through the redaction of this package.

`log.info("lease_expired", job_id=..., epoch=...)`: a fixed event name and listed fields. Other
libraries' records keep their level, logger and place, and lose their text.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

import structlog
from opentelemetry import trace

from cocoon.telemetry.redaction import FIELDS, clean_fields, error_fields, is_event_name

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
# These install handlers of their own, which would print their texts.
_NOISY = (
    "uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi", "faststream",
    "faststream.access", "faststream.access.nats", "nats", "nats.aio.client", "httpx", "httpcore",
    "asyncio", "opentelemetry",
)  # fmt: skip

_OURS = ("cocoon", "services")


@dataclass
class _State:
    """What one process has configured. `stream` None means the stderr of the moment."""

    service: str = "cocoon"
    level: int = 30
    stream: TextIO | None = None


_state = _State()
_write_lock = threading.Lock()


class _Writer:
    """The innermost logger: writes whole lines."""

    def msg(self, line: str) -> None:
        stream = _state.stream if _state.stream is not None else sys.stderr
        with _write_lock:
            try:
                stream.write(line + "\n")
                stream.flush()
            except (OSError, ValueError):
                return  # nobody reads our stderr any more; that must not stop the service


class Logger(structlog.BoundLoggerBase):
    """A logger with bound fields. Every method takes an event name and listed fields."""

    def bind(self, **fields: Any) -> Logger:
        return super().bind(**fields)

    def debug(self, event: str, **fields: Any) -> None:
        self._emit("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._emit("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._emit("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._emit("error", event, fields)

    def critical(self, event: str, **fields: Any) -> None:
        self._emit("critical", event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """Log at level error, with the exception that is being handled."""
        fields.setdefault("exc_info", sys.exc_info()[1])
        self._emit("error", event, fields)

    def _emit(self, level: str, event: str, fields: dict[str, Any]) -> None:
        if LEVELS[level] >= _state.level:
            self._proxy_to_logger("msg", event, **{**fields, "_level": level})


_EventDict = MutableMapping[str, Any]


def _redact(_logger: Any, _method: str, event_dict: _EventDict) -> _EventDict:
    level = event_dict.pop("_level")
    event = event_dict.pop("event")
    error = event_dict.pop("exc_info", None)
    if error is True:
        error = sys.exc_info()[1]
    line: dict[str, Any] = {
        "time": datetime.now(tz=UTC).isoformat(timespec="milliseconds"),
        "level": level,
        "service": _state.service,
        "event": event if is_event_name(event) else "unnamed_event",
        **clean_fields(event_dict),
    }
    if isinstance(error, BaseException):
        line["error"] = error_fields(error)
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        line["trace_id"] = format(context.trace_id, "032x")
    return line


_render = structlog.processors.JSONRenderer(sort_keys=False, ensure_ascii=True)


def get_logger(name: str) -> Logger:
    """A logger whose lines carry `logger: name`. Usable before `configure_logs` (from WARNING)."""
    logger: Logger = structlog.wrap_logger(
        _Writer(),
        processors=[_redact, _render],
        wrapper_class=Logger,
        context_class=dict,
        cache_logger_on_first_use=True,
    ).bind(logger=name)
    return logger


_log = get_logger("cocoon.telemetry")


class _LibraryHandler(logging.Handler):
    """Keeps a foreign record's level and place; its text may quote a payload and is dropped.

    A record of our own packages that was made with the standard library keeps a text that can be
    an event's name ("bus disconnected") and the `extra` fields that the allow-list takes.
    """

    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname.lower()
        event, fields = "library_record", {}
        if record.name.partition(".")[0] in _OURS:
            name = str(record.msg).replace(" ", "_")
            event = name if is_event_name(name) else event
            fields = {k: v for k, v in vars(record).items() if k in FIELDS and k != "module"}
        fields |= {"logger": record.name, "module": record.module, "line": record.lineno}
        fields["exc_info"] = record.exc_info[1] if record.exc_info else None
        _log._emit(level if level in LEVELS else "warning", event, fields)


def configure_logs(
    service: str, level: str = "info", stream: TextIO | None = None
) -> Callable[[], None]:
    """Log as `service` from `level` on, route the standard library's logging and every hook that
    would print an exception through the redaction. Returns what undoes it (for tests).

    Give uvicorn `log_config=None` and brokers `logger=None`, or they add handlers of their own.
    Raises KeyError for an unknown level.
    """
    root = logging.getLogger()
    saved = (_state.service, _state.level, _state.stream, root.handlers[:], root.level)
    hooks = (sys.excepthook, threading.excepthook, sys.unraisablehook)
    _state.service, _state.level, _state.stream = service, LEVELS[level.lower()], stream
    root.handlers[:] = [_LibraryHandler()]
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(_state.level)
    for name in _NOISY:
        noisy = logging.getLogger(name)
        noisy.handlers.clear()
        noisy.propagate = True
        noisy.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    logging.raiseExceptions = False
    sys.excepthook = _on_uncaught
    threading.excepthook = lambda args: _log.critical("thread_died", exc_info=args.exc_value)
    sys.unraisablehook = lambda args: _log.error("unraisable", exc_info=args.exc_value)

    def undo() -> None:
        _state.service, _state.level, _state.stream = saved[:3]
        root.handlers[:] = saved[3]
        root.setLevel(saved[4])
        logging.captureWarnings(False)
        logging.raiseExceptions = True
        sys.excepthook, threading.excepthook, sys.unraisablehook = hooks

    return undo


def _on_uncaught(
    _kind: type[BaseException], error: BaseException, _traceback: TracebackType | None
) -> None:
    if isinstance(error, KeyboardInterrupt):
        return
    _log.critical("uncaught", exc_info=error)
