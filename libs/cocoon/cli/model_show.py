"""`./cocoon model show`: what exactly a name or a model id is, checked by its hash."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoon.cli.model import files_of, gateway_of, offered_models, shown
from cocoon.cli.session import Data, Json, folder_of
from cocoon.kernel.errors import BadRequest, NotFound

if TYPE_CHECKING:
    from cocoon.models import ModelManifest

_MODEL_ID = re.compile(r"[0-9a-f]{64}\Z")
MAX_SHOWN_FILES = 20


@dataclass(frozen=True, slots=True)
class Found:
    """A manifest whose SHA-256 is its model id, and where it was: a file or a gateway."""

    manifest: ModelManifest
    source: str
    others: tuple[dict[str, Any], ...] = ()  # offered under the same name


def show(
    model: Annotated[str, typer.Argument(metavar="NAME|ID", help="A model's name or id.")],
    gateway: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A network's gateway (default: the one that runs here)."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(help="An API key of it, or @FILE; a model id needs none."),
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Keep it here, for `model verify` and `model list`.")
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to keep it (default: models/NAME.json in DIR)."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace another manifest of this name.")
    ] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Show what exactly a model is: files, hashes, tokenizer, quantisation, engine, kind.

    A published manifest is believed only if its SHA-256 is the model id.
    """
    from cocoon.models.kept import keep, place_of

    found = _find(model, gateway, key, data)
    manifest, place = found.manifest, None
    if save or to is not None:
        place = to or place_of(folder_of(data).models, manifest.name)
        keep(manifest, place, force=force)
    if as_json:
        told = {
            "model_id": manifest.model_id, "kind": manifest.kind, "from": found.source,
            "manifest": manifest.model_dump(mode="json"), "file": str(place) if place else None,
            "others": list(found.others),
        }  # fmt: skip
        print(json.dumps(told))
        return
    print("\n".join(_lines(found)))
    if place is not None:
        print(f"  kept in       {place}")
    if _MODEL_ID.match(model) is None and model != manifest.name:
        print(
            f"cocoon: it is offered as {shown(model)} and its manifest names it {manifest.name}",
            file=sys.stderr,
        )
    for other in found.others:
        count = other["providers"]
        print(
            f"cocoon: {shown(other['name'])} is also {other['model_id']}, of {count} "
            f"{'provider' if count == 1 else 'providers'}",
            file=sys.stderr,
        )


def _lines(found: Found) -> Iterator[str]:
    one = found.manifest
    yield f"{one.name}  {one.model_id}"
    yield f"  kind          {one.kind}"
    yield f"  engine        {one.engine}"
    yield f"  quantisation  {one.quantisation}"
    yield f"  tokenizer     {one.tokenizer_sha256 or 'not stated'}"
    for name, value in sorted(one.arguments.items()):
        yield f"  argument      {name}={shown(value)}"
    if one.files:
        yield f"  files         {files_of(one)}"
    else:
        yield "  files         none: its operator's statement, no file was hashed"
    for file in one.files[:MAX_SHOWN_FILES]:
        yield f"    {file.sha256}  {file.size_bytes:>15,}  {file.path}"
    if len(one.files) > MAX_SHOWN_FILES:
        yield f"    and {len(one.files) - MAX_SHOWN_FILES:,} more: --json lists all"
    yield f"  checked       its SHA-256 is the model id; from {shown(found.source)}"


def _find(model: str, gateway: str | None, key: str | None, data: Path | None) -> Found:
    """By id from what is kept here, else from the network; by name as the network offers it."""
    from cocoon.client.manifests import manifest_of
    from cocoon.models.kept import kept_in

    kept = list(kept_in(folder_of(data).models))
    asked = gateway_of(gateway, key, data)
    others: tuple[dict[str, Any], ...] = ()
    model_id = model
    if _MODEL_ID.match(model) is None:
        if asked is None:
            return _kept_by_name(model, kept)
        offered = [one for one in offered_models(asked) or () if one["name"] == model]
        if not offered:
            raise NotFound(f"{asked[0]} offers no model {model}; see `./cocoon model list`")
        # as clients choose among them
        offered.sort(key=lambda one: (one["providers"], one["model_id"]), reverse=True)
        model_id, others = offered[0]["model_id"], tuple(offered[1:])
    for place, manifest in kept:
        if manifest is not None and manifest.model_id == model_id:
            return Found(manifest, str(place), others)
    if asked is None:
        raise BadRequest(
            f"no manifest {model} is kept here and no network runs here; name one's --gateway"
        )
    return Found(asyncio.run(manifest_of(asked[0], model_id)), asked[0], others)


def _kept_by_name(name: str, kept: list[tuple[Path, ModelManifest | None]]) -> Found:
    for place, manifest in kept:
        if manifest is not None and manifest.name == name:
            return Found(manifest, str(place))
    raise BadRequest(
        f"no manifest of {name} is kept here and no network runs here; name one's --gateway"
    )
