"""A folder against a manifest: every file, and what is there besides."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from cocoon.kernel.errors import ConfigurationError
from cocoon.models.folder import Told, hash_file, total_bytes, walk
from cocoon.models.manifest import ModelManifest

_NAMED_AT_MOST: Final = 3


class Difference(NamedTuple):
    """One file and what is wrong with it: `missing`, `size`, `content`, `extra` or `unreadable`."""

    path: str
    kind: str
    says: str


def differences(
    manifest: ModelManifest, folder: Path, told: Told | None = None
) -> list[Difference]:
    """All of them, in the order of their paths. Raises ConfigurationError without a folder.

    A file that the manifest does not name is one: engines load what they find.
    """
    wanted = {file.path: file for file in manifest.files}
    tree = walk(folder, wanted)
    found = [Difference(path, "unreadable", why) for path, why in tree.refused.items()]
    total = total_bytes(tree.files[path] for path in wanted if path in tree.files)
    done = 0
    for path, file in wanted.items():
        place = tree.files.get(path)
        if place is None:
            if path not in tree.refused:
                found.append(Difference(path, "missing", "is missing"))
            continue
        size = total_bytes([place])
        if size != file.size_bytes:
            says = f"has {size:,} bytes, the manifest says {file.size_bytes:,}"
            found.append(Difference(path, "size", says))
            continue

        def heard(read: int, path: str = path) -> None:
            nonlocal done
            done += read
            if told is not None:
                told(path, done, total)

        try:
            digest, _ = hash_file(place, heard)
        except ConfigurationError:
            found.append(Difference(path, "unreadable", "cannot be read"))
            continue
        if digest != file.sha256:
            found.append(Difference(path, "content", "has other content than the manifest says"))
    found += [
        Difference(path, "extra", "is not in the manifest")
        for path in tree.files if path not in wanted
    ]  # fmt: skip
    return sorted(found)


def verify(manifest: ModelManifest, folder: Path, told: Told | None = None) -> None:
    """Check every file before it is served. Raises ConfigurationError naming what is wrong."""
    found = differences(manifest, folder, told)
    if not found:
        return
    named = "; ".join(f"{one.path!a} {one.says}" for one in found[:_NAMED_AT_MOST])
    more = f"; and {len(found) - _NAMED_AT_MOST} more" if len(found) > _NAMED_AT_MOST else ""
    raise ConfigurationError(
        f"{folder} is not what the manifest of {manifest.name} names: {named}{more}. Fetch the "
        "model again, or describe this one with `./cocoon model add`"
    )
