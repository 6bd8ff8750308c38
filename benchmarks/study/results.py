"""Records of finished runs, a small file each: what is there is not run again."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.study.training import Settings

KEYS = {"settings", "loss", "held_out", "gradients", "seconds", "machine"}


class ForeignFile(ValueError):
    """A file stands where a record should, and is none; it is left as it was."""


def path_of(folder: Path, settings: Settings) -> Path:
    return folder / (re.sub(r"[^a-z0-9]+", "-", settings.name) + ".json")


def read(path: Path) -> dict[str, Any]:
    """The record in a file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise TypeError(f"a {type(record).__name__}, not an object")
        missing = KEYS - set(record)
        if missing:
            raise KeyError(", ".join(sorted(missing)))
        Settings(**record["settings"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ForeignFile(f"{path} is no record of a run: {error!r}; move it away") from error
    return record


def find(folder: Path, settings: Settings) -> dict[str, Any] | None:
    """The record of a run that is finished, None of one that is not."""
    path = path_of(folder, settings)
    if not path.exists():
        return None
    record = read(path)
    if record["settings"] != settings.to_json():
        raise ForeignFile(
            f"{path} is of {record['settings']}, not of {settings.to_json()}; "
            "move it away, or choose another folder with --results"
        )
    return record


def write(folder: Path, record: dict[str, Any]) -> Path:
    """All of it or nothing, whenever the process is ended."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, Settings(**record["settings"]))
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return path


def read_all(folder: Path) -> list[dict[str, Any]]:
    return [read(path) for path in sorted(folder.glob("*.json"))]
