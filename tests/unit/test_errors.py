"""The error tree: one family each, an HTTP shape on the class, OpenAI's object for clients."""

from __future__ import annotations

import inspect
import re

import pytest

from cocoon.kernel import errors
from cocoon.kernel.errors import CocoonError, Fatal, Rejected, Transient

CLASSES = [
    cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, CocoonError)
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_belongs_to_exactly_one_family(cls: type[CocoonError]) -> None:
    families = [family for family in (Rejected, Transient, Fatal) if issubclass(cls, family)]
    assert len(families) == (0 if cls is CocoonError else 1)


def test_the_drawing_names_every_class_with_its_status_and_type() -> None:
    drawn = {
        name: (status, openai_type)
        for name, status, openai_type in re.findall(
            r"[├└]── (\w+) +(\d{3}) +(\w+)", errors.__doc__ or ""
        )
    }
    for name, (status, openai_type) in drawn.items():
        cls = getattr(errors, name)
        assert (str(cls.http_status), cls.openai_type) == (status, openai_type), name
    undrawn = {cls.__name__ for cls in CLASSES} - set(drawn)
    assert undrawn == {
        "CocoonError", "Rejected", "Transient", "Fatal", "LogCorrupt", "ConfigurationError",
    }  # fmt: skip


def test_the_openai_object_has_the_four_fields_that_its_sdk_reads() -> None:
    error = errors.BadRequest("say what to do", code="bad_model", param="model")
    assert error.to_openai() == {
        "error": {
            "message": "say what to do", "type": "invalid_request_error", "param": "model",
            "code": "bad_model",
        }
    }  # fmt: skip
    assert str(error) == "say what to do"


@pytest.mark.parametrize(
    ("status", "cls"),
    [
        (400, errors.BadRequest),
        (401, errors.Unauthenticated),
        (402, errors.InsufficientFunds),
        (403, errors.Forbidden),
        (404, errors.NotFound),
        (409, errors.Conflict),
        (413, errors.TooLarge),
        (429, errors.RateLimited),
        (502, errors.EvidenceRejected),
        (503, errors.Unavailable),
        (504, errors.DeadlineExceeded),
        (500, errors.Unavailable),
        (418, errors.Unavailable),
    ],
)
def test_a_peers_status_becomes_the_trees_error(status: int, cls: type[CocoonError]) -> None:
    error = errors.error_for_status(status, "why", code="c", param="p", retry_after_s=3)
    assert type(error) is cls
    assert (error.message, error.code, error.param, error.retry_after_s) == ("why", "c", "p", 3)
