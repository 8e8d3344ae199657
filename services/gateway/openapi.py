"""docs/openapi.json: the gateway's public HTTP, and the sidecar's, which is OpenAI's.

Data and a generator; it serves nothing. `python -m services.gateway.openapi --write` or `--check`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from cocoon.contracts.events import Quote, ResultSealed
from cocoon.contracts.generate import run_pages
from cocoon.contracts.messages import Dispute
from cocoon.kernel import errors
from cocoon.models import ModelManifest

OPENAPI_PAGE = "docs/openapi.json"
SEALED = "application/vnd.cocoon.cai1"
_NANOTON = {"type": "string", "pattern": "^(0|[1-9][0-9]*)$", "description": "nanoTON"}
_HEX16 = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
_HEX32 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_TEXT: dict[str, Any] = {"type": "string"}
_MS = {"type": "integer", "description": "Unix time in milliseconds"}
_BYTES = {SEALED: {"schema": {"type": "string", "format": "binary"}}}
_MATCH_HEADERS = {
    f"x-cocoon-{name}": {"schema": schema, "description": text}
    for name, schema, text in (
        ("job-id", _HEX16, "The job's id, drawn by the client"),
        ("provider", _TEXT, "The provider that answers"),
        ("epoch", {"type": "integer"}, "The match's number within the job"),
        ("quote-id", _HEX32, "SHA-256 of the quote"),
        ("quote", _TEXT, "The price terms as canonical JSON"),
        ("evidence-id", _HEX32, "The attestation that the match cites"),
    )
}


def _object(properties: dict[str, Any], *optional: str) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def _list(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": _object(properties)}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _answer(description: str, content: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"description": description, "content": content, **more}


def _refusals(*classes: type[errors.CocoonError]) -> dict[str, Any]:
    """One answer per status of the error tree."""
    found: dict[str, list[str]] = {}
    for cls in classes:
        found.setdefault(str(cls.http_status), []).append(cls.__name__)
    answers = {}
    for status, names in found.items():
        more: dict[str, Any] = {}
        if status in ("429", "503"):
            more["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}
        answers[status] = _answer(" or ".join(names), _json("Error"), **more)
    return answers


_JOB_ID = {"name": "job_id", "in": "path", "required": True, "schema": _HEX16}
_USUAL = (errors.Unauthenticated, errors.RateLimited, errors.Unavailable)
_JOB_REFUSALS = (*_USUAL, errors.NotFound)
_SIDECAR = [{"url": "http://127.0.0.1:{port}", "variables": {"port": {"default": "8642"}}}]

SCHEMAS: dict[str, Any] = {
    "Error": _object(
        {
            "error": _object(
                {
                    "message": _TEXT,
                    "type": _TEXT,
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                }
            )
        }
    ),
    "Network": _object(
        {
            "network_id": {"type": ["string", "null"]},
            "policy": {"type": "object", "description": "The signed policy"},
            "log": {"type": ["object", "null"], "description": "Position and hash of shard 0"},
            "now_ms": _MS,
            "shards": {"type": "object"},
            "bus": {
                **_object(
                    {
                        "urls": {"type": "array", "items": _TEXT},
                        "ca_pem": {"type": ["string", "null"]},
                        "ca_sha256": {"type": ["string", "null"]},
                    }
                ),
                "description": "Where providers connect (docs/entry.md), and the authority behind "
                "the certificates there; null: a public one. `ca_sha256` is of its DER form",
            },
        }
    ),
    "Directory": _object(
        {
            "model": {"type": ["string", "null"]},
            "policy": {"type": "object"},
            "log": {"type": ["object", "null"]},
            "providers": {
                "type": "array",
                "description": "Evidence, signed key bundles, offer and load; verify locally",
                "items": {"type": "object"},
            },
        }
    ),
    "Models": _object(
        {
            "object": {"const": "list"},
            "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
        }
    ),
    "Model": _object(
        {
            "id": _TEXT,
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": _TEXT,
            "cocoon": _object(
                {
                    "model_id": {
                        **_HEX32,
                        "description": "SHA-256 of the manifest that most providers offer",
                    },
                    "model_ids": {
                        "type": "object",
                        "description": "Each manifest under this name and its number of providers",
                        "additionalProperties": {"type": "integer"},
                    },
                    "tier": _TEXT,
                    "providers": {"type": "integer"},
                    "kind": {
                        "enum": ["chat", "embeddings", None],
                        "description": "As the manifest of model_id says; null: not published",
                    },
                    "quantisation": {
                        "type": ["string", "null"],
                        "description": "As the manifest of model_id says; null: not published",
                    },
                    "context_tokens": {
                        "type": "integer",
                        "description": "Input and answer together, the largest that is offered",
                    },
                    "prices": {"type": "object", "additionalProperties": _NANOTON},
                }
            ),
        }
    ),
    "Balance": _object(
        {"account_id": _TEXT, "available_nanoton": _NANOTON, "held_nanoton": _NANOTON}
    ),
    "Job": _object(
        {
            "id": _HEX16,
            "object": {"const": "cocoon.job"},
            "status": _TEXT,
            "epoch": {"type": "integer"},
            "model_id": _HEX32,
            "req_hash": _HEX32,
            "max_price_nanoton": _NANOTON,
            "held_nanoton": _NANOTON,
            "price_nanoton": {**_NANOTON, "type": ["string", "null"]},
            "requested_ms": _MS,
            "changed_ms": _MS,
            "failure": {"type": ["string", "null"]},
            "provider_id": _TEXT,
            "quote_id": _HEX32,
            "quote": {"$ref": "#/components/schemas/Quote"},
            "evidence_id": _HEX32,
            "result": {"type": "object", "description": "ResultSealed without the ids"},
            "dispute": {"type": ["object", "null"],
                        "description": "DisputeOpened without the job and the account"},
        },
        "provider_id", "quote_id", "quote", "evidence_id", "result", "dispute",
    ),
    "DisputedJob": _object(
        {
            "id": _HEX16,
            "dispute": {"type": "object",
                        "description": "DisputeOpened without the job and the account"},
        }
    ),
    "Explanation": _object(
        {
            "id": _HEX16,
            "decisions": _list(
                {
                    "epoch": {"type": "integer", "description": "Of the match, or one not made"},
                    "decided_ms": _MS,
                    "policy": _TEXT,
                    "policy_hash": {"type": ["string", "null"], "description": "SHA-256"},
                    "seed": _HEX32,
                    "providers": _list(
                        {
                            "provider_id": _TEXT,
                            "tier": {"type": ["string", "null"],
                                     "description": "At the decision; null in old logs"},
                            "outcome": {"enum": ["won", "lost", "not_drawn", "passed_by",
                                                 "filtered"]},
                            "by": _TEXT,
                            "margin_permille": {"type": "integer"},
                            "told": _TEXT,
                        }
                    ),
                }
            ),
        }
    ),
}  # fmt: skip


def _sidecars(operation: str, what: str, *, streams: bool) -> dict[str, Any]:
    """A path of the sidecar, on the client's own machine."""
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": _TEXT}
    return {
        "servers": _SIDECAR,
        "post": {
            "operationId": operation,
            "summary": f"{what}, at the sidecar on the client's own machine",
            "description": "The sidecar seals the request. A gateway answers 400, code "
                           "plaintext_refused, without reading the body.",
            "requestBody": {"required": True, "content": {
                "application/json": {"schema": {"type": "object"}}}},
            "responses": {
                "200": _answer("OpenAI's answer" + (", or its events when stream is true"
                                                    if streams else ""), content),
                **_refusals(errors.BadRequest, errors.Unauthenticated, errors.InsufficientFunds,
                            errors.TooLarge, errors.EvidenceRejected, errors.RateLimited,
                            errors.Unavailable, errors.DeadlineExceeded),
            },
        },
    }  # fmt: skip


PATHS: dict[str, Any] = {
    "/v1/network": {
        "get": {
            "operationId": "network",
            "summary": "The signed policy, the log's position and the gateway's time",
            "security": [],
            "responses": {"200": _answer("The network", _json("Network")),
                          **_refusals(errors.Unavailable)},
        }
    },
    "/v1/directory": {
        "get": {
            "operationId": "directory",
            "summary": "A model's providers with the evidence that the client verifies itself",
            "security": [],
            "parameters": [
                {"name": "model", "in": "query", "required": True,
                 "schema": {"type": "string", "pattern": "^[\\x21-\\x7e]{1,128}$"}},
            ],
            "responses": {"200": _answer("The providers", _json("Directory")),
                          **_refusals(errors.BadRequest, errors.NotFound, errors.Unavailable)},
        }
    },
    "/v1/manifests/{model_id}": {
        "get": {
            "operationId": "manifest",
            "summary": "What exactly a model id names: the bytes whose SHA-256 it is. The "
                       "sidecar serves it too, and checks it",
            "security": [],
            "parameters": [{"name": "model_id", "in": "path", "required": True, "schema": _HEX32}],
            "responses": {"200": _answer("The manifest, for ever the same", _json("ModelManifest")),
                          **_refusals(errors.NotFound, errors.RateLimited, errors.Unavailable)},
        }
    },
    "/v1/models": {
        "get": {
            "operationId": "models",
            "summary": "OpenAI's list of the offered models; the sidecar serves it too",
            "responses": {"200": _answer("The models", _json("Models")), **_refusals(*_USUAL)},
        }
    },
    "/v1/balance": {
        "get": {
            "operationId": "balance",
            "summary": "What the account can spend and what its running jobs hold",
            "responses": {"200": _answer("The balance", _json("Balance")), **_refusals(*_USUAL)},
        }
    },
    "/v1/jobs": {
        "post": {
            "operationId": "runJob",
            "summary": "Run a sealed request; the answer begins after the match is committed",
            "parameters": [
                {"name": "Idempotency-Key", "in": "header",
                 "schema": {"type": "string", "pattern": "^[\\x21-\\x7e]{1,255}$"}},
                {"name": "traceparent", "in": "header", "schema": _TEXT},
                {"name": "X-Cocoon-Preferences", "in": "header", "schema": _TEXT,
                 "description": "What the client asks of its provider: JSON (docs/matching.md)"},
                {"name": "X-Cocoon-Affinity", "in": "header", "schema": _HEX16,
                 "description": "A blind key of the conversation's beginning"},
            ],
            "requestBody": {"required": True, "content": _BYTES,
                            "description": "A CAI/1 request envelope (docs/protocol.md)"},
            "responses": {
                "200": _answer("The CAI/1 response bytes, as they come", _BYTES,
                               headers=_MATCH_HEADERS),
                **_refusals(errors.BadRequest, errors.Unauthenticated, errors.InsufficientFunds,
                            errors.Forbidden, errors.Conflict, errors.TooLarge,
                            errors.RateLimited, errors.Unavailable, errors.DeadlineExceeded),
            },
        }
    },
    "/v1/jobs/{job_id}": {
        "parameters": [_JOB_ID],
        "get": {
            "operationId": "job",
            "summary": "A job of this account as the log tells it",
            "responses": {"200": _answer("The job", _json("Job")), **_refusals(*_JOB_REFUSALS)},
        },
        "delete": {
            "operationId": "cancelJob",
            "summary": "Stop a job; what was delivered is charged",
            "responses": {"202": _answer("The job, as it was when the cancel was sent",
                                         _json("Job")), **_refusals(*_JOB_REFUSALS)},
        },
    },
    "/v1/jobs/{job_id}/response": {
        "parameters": [_JOB_ID],
        "get": {
            "operationId": "jobResponse",
            "summary": "The sealed response of a settled job, kept for an hour",
            "parameters": [{"name": "Range", "in": "header",
                            "schema": {"type": "string", "pattern": "^bytes=[0-9]{1,12}-$"}}],
            "responses": {
                "200": _answer("All bytes", _BYTES, headers=_MATCH_HEADERS),
                "206": _answer("The bytes from an offset on", _BYTES, headers=_MATCH_HEADERS),
                **_refusals(errors.BadRequest, *_JOB_REFUSALS),
            },
        },
    },
    "/v1/jobs/{job_id}/explanation": {
        "parameters": [_JOB_ID],
        "get": {
            "operationId": "jobExplanation",
            "summary": "Why the job went where it went: how each candidate fared",
            "responses": {"200": _answer("The decisions", _json("Explanation")),
                          **_refusals(*_JOB_REFUSALS)},
        },
    },
    "/v1/jobs/{job_id}/dispute": {
        "parameters": [_JOB_ID],
        "post": {
            "operationId": "disputeJob",
            "summary": "A client counted fewer tokens than its provider signed for: written once a "
                       "job, moves no money",
            "requestBody": {"required": True, "content": {"application/json": {
                "schema": {"$ref": "#/components/schemas/Dispute"}}}},
            "responses": {"201": _answer("The dispute, opened now or before",
                                         _json("DisputedJob")),
                          **_refusals(errors.BadRequest, errors.TooLarge, errors.Forbidden,
                                      *_JOB_REFUSALS)},
        },
    },
    "/v1/chat/completions": _sidecars("chat", "OpenAI's chat completions", streams=True),
    "/v1/completions": _sidecars("complete", "OpenAI's completions of a text", streams=True),
    "/v1/embeddings": _sidecars("embed", "OpenAI's embeddings", streams=False),
}  # fmt: skip


def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    _, shared = models_json_schema(
        [
            (Quote, "serialization"),
            (ResultSealed, "serialization"),
            (Dispute, "validation"),
            (ModelManifest, "serialization"),
        ],
        ref_template="#/components/schemas/{model}",
    )
    key = {"type": "http", "scheme": "bearer", "description": "An API key: ck_ and 43 characters"}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Cocoon's gateway",
            "version": "1",
            "description": "Generated by `python -m services.gateway.openapi --write`.",
        },
        "servers": [{"url": "https://{gateway}", "variables": {"gateway": {"default": "gateway"}}}],
        "security": [{"apiKey": []}],
        "paths": PATHS,
        "components": {
            "schemas": {**shared["$defs"], **SCHEMAS},
            "securitySchemes": {"apiKey": key},
        },
    }


def openapi_page() -> str:
    return json.dumps(openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """See --help."""
    return run_pages({OPENAPI_PAGE: openapi_page}, arguments)


if __name__ == "__main__":
    sys.exit(main())
