"""What is on this machine to serve: the shipped model, OpenAI-compatible servers, a Triton."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

# where such servers usually listen: vLLM, SGLang, llama.cpp, Ollama, LM Studio
USUAL_PORTS = (8000, 30000, 8080, 11434, 1234)
TRITON_HTTP, TRITON_GRPC, TRITON_METRICS = 8000, 8001, 8002
PROBE_S = 0.7
MAX_MODELS = 50
SHIPPED = "skills-1"
DEFAULT_CONTEXT = 4096
LEAST_CONTEXT, MOST_CONTEXT = 16, 10_000_000


@dataclass(frozen=True, slots=True)
class Engine:
    """One thing that could be served. `url` empty: the embedded engine with the shipped model."""

    model: str
    kind: str  # embedded, openai, triton
    url: str = ""
    context_tokens: int = DEFAULT_CONTEXT
    metrics_url: str = ""

    @property
    def told(self) -> str:
        if self.kind == "embedded":
            return f"{self.model}, the small model that comes with Cocoon, in the agent itself"
        return f"{self.model} at {self.url}"


def found_here() -> list[Engine]:
    """Real servers first; the shipped model is always there."""
    found: list[Engine] = []
    for port in USUAL_PORTS:
        found += openai_models(f"http://127.0.0.1:{port}/v1")
    found += triton_models()
    return [*found, Engine(SHIPPED, "embedded")]


def at(url: str) -> list[Engine]:
    """What an address serves; nothing if it does not answer."""
    if urlsplit(url).scheme in ("grpc", "grpcs"):
        return [Engine("", "triton", url)]
    return openai_models(url)


def openai_models(url: str) -> list[Engine]:
    """The models that an OpenAI-compatible server names; none if there is no such server."""
    base = url.rstrip("/")
    listed = _get(f"{base}/models").get("data")
    if not isinstance(listed, list):
        return []
    return [
        Engine(str(one["id"]), "openai", base, _context(one))
        for one in listed[:MAX_MODELS]
        if isinstance(one, dict) and isinstance(one.get("id"), str) and one["id"]
    ]


def _context(model: dict[str, Any]) -> int:
    """What vLLM and SGLang (`max_model_len`) and llama.cpp (`meta.n_ctx_train`) say."""
    meta = model.get("meta")
    told = model.get("max_model_len") or (meta.get("n_ctx_train") if isinstance(meta, dict) else 0)
    if isinstance(told, int) and LEAST_CONTEXT <= told <= MOST_CONTEXT:
        return told
    return DEFAULT_CONTEXT


def triton_models() -> list[Engine]:
    """The models of a Triton on its usual ports."""
    index = _post(f"http://127.0.0.1:{TRITON_HTTP}/v2/repository/index")
    return [
        Engine(
            str(one["name"]), "triton", f"grpc://127.0.0.1:{TRITON_GRPC}",
            metrics_url=f"http://127.0.0.1:{TRITON_METRICS}/metrics",
        )
        for one in index[:MAX_MODELS]
        if isinstance(one, dict) and one.get("name") and one.get("state") == "READY"
    ]  # fmt: skip


def _get(url: str) -> dict[str, Any]:
    found = _asked("GET", url)
    return found if isinstance(found, dict) else {}


def _post(url: str) -> list[Any]:
    found = _asked("POST", url)
    return found if isinstance(found, list) else []


def _asked(method: str, url: str) -> object:
    import httpx

    try:
        answer = httpx.request(method, url, timeout=PROBE_S, trust_env=False)
        return json.loads(answer.content[: 1024 * 1024]) if answer.status_code == 200 else None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None
