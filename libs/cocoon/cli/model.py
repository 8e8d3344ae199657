"""`./cocoon model`: what exactly is served. Hash a model's folder, compare one, list manifests."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoon.cli.session import Data, Json, folder_of
from cocoon.kernel.errors import BadRequest, ConfigurationError

if TYPE_CHECKING:
    from cocoon.models import ModelManifest

app = typer.Typer(
    help="Manifests: what exactly is served, and the model id that names it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_SAY_AFTER_S = 1.0


@app.command("add")
def add(
    folder: Annotated[Path, typer.Argument(help="The model's folder.")],
    name: Annotated[str, typer.Option(help="The name that clients ask for.")],
    engine: Annotated[
        str | None,
        typer.Option(
            help="What runs it: onnxruntime-cpu, openai-compatible, triton, vllm, ... (default: "
            "onnxruntime-cpu for a folder with a model.onnx, else openai-compatible)."
        ),
    ] = None,
    quantisation: Annotated[
        str | None, typer.Option(metavar="Q", help="Default: what its config.json says.")
    ] = None,
    argument: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="An argument of the engine; may be repeated. Everybody can read it: no secrets.",
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write it (default: models/NAME.json in DIR)."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace another manifest of this name.")
    ] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Hash every file of a model's folder and write its manifest."""
    from cocoon.models.describing import describe_folder
    from cocoon.models.folder import walk
    from cocoon.models.kept import keep, place_of

    if to is not None and data is not None:
        raise BadRequest("give --to FILE or --data DIR, not both")
    _check_folder(folder)
    tree = walk(folder)
    manifest = describe_folder(
        folder, name, engine=engine, quantisation=quantisation,
        arguments=_arguments(argument or []), tree=tree, told=_Progress(),
    )  # fmt: skip
    place = to or place_of(folder_of(data).models, name)
    is_new = keep(manifest, place, force=force)
    if as_json:
        print(json.dumps({**_told(manifest), "file": str(place), "skipped": tree.skipped}))
        return
    if tree.skipped:
        print(f"not part of the model: {', '.join(map(shown, tree.skipped))}", file=sys.stderr)
    print(f"{manifest.name}  {manifest.model_id}")
    print(f"  {files_of(manifest)}; {manifest.engine}, {manifest.quantisation}")
    print(f"  {place}{'' if is_new else ' (was there already)'}")


@app.command("verify")
def verify(
    folder: Annotated[Path, typer.Option(help="The model's folder.")],
    manifest: Annotated[
        str | None,
        typer.Argument(metavar="[NAME|FILE]", help="Which manifest (default: the only one)."),
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Compare every file of a folder with a manifest. Exit code 0: equal, 1: different."""
    from cocoon.models.verifying import differences

    place, wanted = _find(manifest, data)
    _check_folder(folder)
    found = differences(wanted, folder, _Progress())
    if as_json:
        told = {
            "name": wanted.name, "model_id": wanted.model_id, "file": str(place),
            "equal": not found, "differences": [one._asdict() for one in found],
        }  # fmt: skip
        print(json.dumps(told))
    else:
        for one in found:
            print(f"{shown(one.path)}: {one.says}")
        end = "different" if found else f"equal: {files_of(wanted)}"
        print(f"{end}  {wanted.name} {wanted.model_id}")
    if found:
        raise typer.Exit(1)


@app.command("list")
def list_models(
    gateway: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A network's gateway (default: the one that runs here)."),
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="An API key of it, or @FILE (default: the network's own).")
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List the manifests that are kept here and what a network offers."""
    from cocoon.models.kept import kept_in

    here, unread = [], []
    for place, manifest in kept_in(folder_of(data).models):
        if manifest is None:
            unread.append(str(place))
        else:
            here.append((place, manifest))
    offered = offered_models(gateway_of(gateway, key, data))
    if as_json:
        local = [{**_told(manifest), "file": str(place)} for place, manifest in here]
        print(json.dumps({"manifests": local, "unreadable": unread, "offered": offered}))
        return
    for text in unread:
        print(f"cocoon: {text} is not a model manifest", file=sys.stderr)
    print("\n".join(_listed([manifest for _, manifest in here], offered)))


def _listed(here: list[ModelManifest], offered: list[dict[str, Any]] | None) -> Iterator[str]:
    yield "manifests" if here else "no manifest is kept here; `./cocoon model add` makes one"
    for one in here:
        yield f"  {one.name}  {one.model_id}  {one.engine}  {one.quantisation}  {files_of(one)}"
    if offered is None:
        return
    known = {one.model_id for one in here}
    yield "offered" if offered else "nothing is offered"
    for offer in offered:
        count = offer["providers"]
        is_kept = offer["model_id"] in known
        kept = "its manifest is kept here" if is_kept else "no manifest of it is kept here"
        word = "provider" if count == 1 else "providers"
        yield f"  {offer['name']}  {offer['model_id']}  {count} {word}  {kept}"


def gateway_of(gateway: str | None, key: str | None, data: Path | None) -> tuple[str, str] | None:
    """A gateway to ask and the key for it; None without a network that runs here."""
    folder = folder_of(data)
    if gateway is None:
        if not folder.is_running():
            return None
        gateway = folder.read_running().gateway_url
        key = key or f"@{folder.api_key}"  # this network's, never sent to somebody else's gateway
    if key is not None and key.startswith("@"):
        try:
            key = Path(key[1:]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise BadRequest(f"the key file {key[1:]} cannot be read") from None
    return gateway, key or ""


def offered_models(asked: tuple[str, str] | None) -> list[dict[str, Any]] | None:
    """What /v1/models tells, one for each manifest; None without a network to ask."""
    return None if asked is None else list(_by_manifest(_ask(*asked)))


def _ask(url: str, key: str) -> dict[str, Any]:
    import httpx

    base = url.rstrip("/").removesuffix("/v1")
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = httpx.get(f"{base}/v1/models", headers=headers, timeout=10, trust_env=False)
        if answer.status_code == 401:
            raise ConfigurationError(f"{url} wants an API key that it knows; give it with --key")
        answer.raise_for_status()
        return dict(answer.json())
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeEncodeError):
        raise ConfigurationError(
            f"{url} did not tell its models; does a gateway run there?"
        ) from None
    except (ValueError, TypeError):
        raise ConfigurationError(f"{url} answered what is no list of models") from None


def _by_manifest(listed: dict[str, Any]) -> Iterator[dict[str, Any]]:
    try:
        for model in listed["data"]:
            told = model["cocoon"]
            for model_id, count in (
                told.get("model_ids") or {told["model_id"]: told["providers"]}
            ).items():  # fmt: skip
                yield {"name": str(model["id"]), "model_id": str(model_id), "providers": int(count)}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ConfigurationError("the gateway answered what is no list of models") from None


def _find(asked: str | None, data: Path | None) -> tuple[Path, ModelManifest]:
    """The manifest of a name, or in a file. Raises BadRequest: 1 would say that files differ."""
    from cocoon.models.kept import kept_in, load, place_of

    kept = folder_of(data).models
    if asked is None:
        names = [manifest.name for _, manifest in kept_in(kept) if manifest is not None]
        if len(names) != 1:
            raise BadRequest(
                f"name one of the manifests: {', '.join(names)}" if names
                else f"no manifest is kept in {kept}; name a file, or make one: ./cocoon model add"
            )  # fmt: skip
        asked = names[0]
    place = place_of(kept, asked)
    if not place.is_file():
        place = Path(asked)
    if not place.is_file():
        raise BadRequest(f"no manifest {asked} is kept in {kept}, and there is no such file")
    try:
        return place, load(place)
    except ConfigurationError as error:
        raise BadRequest(error.message) from None


def shown(path: str) -> str:
    """A file's name as it is, or escaped where it holds what a terminal would obey."""
    return path if path.isascii() and path.isprintable() else ascii(path)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise BadRequest(f"{folder} is not a folder")


def _arguments(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        key, sign, value = text.partition("=")
        if not key or not sign:
            raise BadRequest(f"--argument is KEY=VALUE, not {text!r}")
        if key in found:
            raise BadRequest(f"--argument {key} is given twice")
        found[key] = value
    return found


def _told(manifest: ModelManifest) -> dict[str, Any]:
    return {
        "name": manifest.name, "model_id": manifest.model_id, "engine": manifest.engine,
        "quantisation": manifest.quantisation, "arguments": manifest.arguments,
        "files": len(manifest.files), "size_bytes": manifest.size_bytes,
    }  # fmt: skip


def files_of(manifest: ModelManifest) -> str:
    count = len(manifest.files)
    return f"{count:,} {'file' if count == 1 else 'files'}, {manifest.size_bytes:,} bytes"


class _Progress:
    """A line on stderr each second, for folders that take longer than one to hash."""

    def __init__(self) -> None:
        self._said_s = time.monotonic()

    def __call__(self, path: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s < _SAY_AFTER_S:
            return
        self._said_s = now_s
        with suppress(OSError):  # nobody reads it
            print(f"hashed {done / 1e9:.1f} of {total / 1e9:.1f} GB: {path}", file=sys.stderr)
