"""The table that `jax-gluon tune` keeps: how long each kernel took on this device."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import platform
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jax_gluon import _native
from jax_gluon._kernels import CpuKernel, MetalKernel
from jax_gluon._plan.selection import PIPELINES, Measurement
from jax_gluon._version import __version__

_Value = TypeVar("_Value")

_SCHEMA = 4


@dataclasses.dataclass(frozen=True)
class Crossover:
    """From which size on the GPU pays: of one kind of operands, forward and backward together.

    `min_products` are multiply-accumulates as the plugin counts them, B N T S (H + V); None where
    the GPU was not the faster one at any size, of which the largest was `max_products`.
    """

    operands: str
    min_products: int | None
    max_products: int


class Table(NamedTuple):
    """What a file holds: times of kernels, and of Metal's also from which size on they pay."""

    rows: tuple[Measurement, ...] = ()
    crossovers: tuple[Crossover, ...] = ()


def cache_folder() -> Path | None:
    """Where tables are kept: JAX_GLUON_CACHE_DIR, else the user's cache folder; None without."""
    if given := os.environ.get("JAX_GLUON_CACHE_DIR"):
        return Path(given)
    if sys.platform != "darwin" and (given := os.environ.get("XDG_CACHE_HOME")):
        return Path(given) / "jax_gluon"
    home = os.environ.get("HOME")
    if not home:
        return None
    return Path(home) / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "jax_gluon"


def device_name(device: str) -> str:
    """What `"cpu"` or `"metal"` is on this machine."""
    if device == "metal":
        return _native.metal_device()[0]
    return f"{processor()}, {_native.plugin().cpu_isa()}"


@functools.cache
def processor() -> str:
    """The name of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1] if found else platform.machine()


def table_path(device: str) -> Path | None:
    """The file of this device's table; None where there is no cache folder."""
    folder = cache_folder()
    if folder is None:
        return None
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return folder / f"tuned-{__version__}-{slug}.json"


def measured(device: str) -> Table:
    """The table of `"cpu"` or `"metal"`, read once for each state of its file.

    Empty where there is none; one that is broken, or another device's or version's, is ignored
    with a warning.
    """
    path = table_path(device)
    try:
        changed = path.stat().st_mtime_ns if path else None
    except OSError:
        return Table()
    return Table() if path is None or changed is None else _read(path, device, changed)


@functools.lru_cache(maxsize=8)
def _read(path: Path, device: str, changed: int) -> Table:
    del changed  # part of the cache's key
    try:
        return load(path, device)
    except (OSError, *BROKEN) as error:
        warnings.warn(
            f"jax_gluon: the table {path} is ignored: {error}; `jax-gluon tune` makes a new one.",
            stacklevel=4,
        )
        return Table()


#: What `load` raises for what a file says.
BROKEN = (ValueError, TypeError, KeyError, RecursionError)


def load(path: Path, device: str) -> Table:
    """The table of a file.

    **Raises:** `OSError`, or one of `BROKEN` for a file that is no table of this device and
    version.
    """
    document: Any = json.loads(path.read_text(encoding="utf-8"))
    wanted = {
        "schema": _SCHEMA,
        "package": __version__,
        "device": device_name(device),
    }
    for name, value in wanted.items():
        if document[name] != value:
            raise ValueError(f'its {name} is "{document[name]}", not "{value}"')
    rows = tuple(_from_json(**row) for row in document["rows"])
    return Table(rows, tuple(_crossover(**each) for each in document["crossovers"]))


def _crossover(operands: str, min_products: int | None, max_products: int) -> Crossover:
    _check(operands, str)
    for number in (min_products, max_products):
        if number is not None and not 0 <= _check(number, int) < 2**63:
            raise ValueError(f"a crossover has the number {number}")
    return Crossover(operands, min_products, max_products)


def _from_json(operands: str, direction: str, H: int, S: int, kernels: list[Any]) -> Measurement:
    seconds = {_kernel_from_json(**kernel["kernel"]): kernel["seconds"] for kernel in kernels}
    for name in (operands, direction):
        _check(name, str)
    row = Measurement(operands, direction, _check(H, int), _check(S, int), seconds)
    names = {kernel.name for kernel in seconds}
    if names != set(PIPELINES):
        raise ValueError(f"a row has the kernels {sorted(names)} alone")
    if not (
        H > 0 and S > 0 and all(0 < _check(s, int, float) < math.inf for s in seconds.values())
    ):
        raise ValueError(f"a row has a number that is not positive: {row}")
    return row


def _check(x: _Value, *kinds: type) -> _Value:
    # Not by isinstance: Python's True is an int.
    if type(x) not in kinds:
        raise TypeError(f"{x!r} stands where {kinds[0].__name__} should")
    return x


def _kernel_from_json(device: str, **fields: Any) -> CpuKernel | MetalKernel:
    for name, x in fields.items():
        if x is not None:
            _check(x, str if name == "name" else int)
    return CpuKernel(**fields) if device == "cpu" else MetalKernel(**fields)


def _kernel_to_json(kernel: CpuKernel | MetalKernel) -> dict[str, Any]:
    device = "cpu" if isinstance(kernel, CpuKernel) else "metal"
    return {"device": device, **dataclasses.asdict(kernel)}


def _to_json(row: Measurement) -> dict[str, Any]:
    kernels = [
        {"kernel": _kernel_to_json(kernel), "seconds": seconds}
        for kernel, seconds in row.seconds.items()
    ]
    return {
        "operands": row.operands, "direction": row.direction, "H": row.H, "S": row.S,
        "kernels": kernels,
    }  # fmt: skip


def check_writable(path: Path) -> None:
    """Raises `OSError` where a table can't be kept at `path`."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text("", encoding="utf-8")
    partial.unlink()


def save(path: Path, device: str, table: Table) -> None:
    """Writes a table; the file appears whole, or `OSError` names it and what was there stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "schema": _SCHEMA,
        "package": __version__,
        "device": device_name(device),
        "rows": [_to_json(row) for row in table.rows],
        "crossovers": [dataclasses.asdict(each) for each in table.crossovers],
    }
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        partial.write_text(json.dumps(document, indent=1), encoding="utf-8")
        partial.replace(path)
    except OSError as error:  # of a full disk: it has no name then
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
