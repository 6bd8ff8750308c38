"""Versions, processor, devices, caches: what of this machine decides which kernels run."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any, cast

import jax

from jax_gluon import _native
from jax_gluon._cuda import cudnn
from jax_gluon._plan import tuned_table
from jax_gluon._version import __version__

#: What each instruction set of the CPU's kernels is made of, as Linux names the features.
VARIANTS: dict[str, tuple[str, ...]] = {
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    "avx512_bf16": ("avx512_bf16",),
    "amx": ("amx_tile", "amx_int8", "amx_bf16"),
    "neon": ("asimd",),
    "neon_dotprod": ("asimddp",),
    "neon_i8mm_bf16": ("i8mm", "bf16"),
}
#: Each instruction set and those that it takes over operations from.
_INCLUDES = {
    "avx2": ("avx2",),
    "avx512": ("avx2", "avx512"),
    "avx512_bf16": ("avx2", "avx512", "avx512_bf16"),
    "amx": ("avx2", "avx512", "avx512_bf16", "amx"),
    "neon": ("neon",),
    "neon_dotprod": ("neon", "neon_dotprod"),
    "neon_i8mm_bf16": ("neon", "neon_dotprod", "neon_i8mm_bf16"),
}
#: The same features by the names that macOS has for them.
_NAMES_OF_MACOS = {
    "asimd": "AdvSIMD",
    "asimddp": "FEAT_DotProd",
    "i8mm": "FEAT_I8MM",
    "bf16": "FEAT_BF16",
}


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter."""
    found = {"jax-gluon": __version__, "python": platform.python_version()}
    for name in ("jax", "jaxlib", "numpy", "flax"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """The system, JAX's platform and its devices."""
    devices = cast(list[object], jax.devices())
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processors": os.cpu_count(),
        "platform": jax.default_backend(),
        "devices": [str(device) for device in devices],
    }


def ffi() -> dict[str, str]:
    """The FFI API that the plugin was built for, and the one that jaxlib has; why it is missing."""
    try:
        plugin: Any = _native.plugin()
    except ImportError as error:
        return {"plugin": "", "jaxlib": _api_of_jaxlib(), "problem": str(error)}
    return {"plugin": plugin.FFI_API, "jaxlib": _api_of_jaxlib(), "problem": ""}


def _api_of_jaxlib() -> str:
    spec = util.find_spec("jaxlib")
    for folder in (spec and spec.submodule_search_locations) or ():
        header = Path(folder) / "include/xla/ffi/api/c_api.h"
        try:
            text = header.read_text(encoding="utf-8")
        except OSError:
            continue
        found = [re.search(rf"XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
        if all(found):
            return ".".join(each[1] for each in found if each)
    return "unknown"


def processor() -> dict[str, Any]:
    """The processor, its features, and the instruction set of the kernels that use them."""
    if not _native.has_plugin():
        return {"name": tuned_table.processor(), "features": {}, "kernels": "", "others": []}
    plugin: Any = _native.plugin()
    chosen: str = plugin.cpu_isa()
    used = {name for each in _INCLUDES.get(chosen, ()) for name in VARIANTS[each]}
    is_arm = platform.machine().lower() in ("arm64", "aarch64")
    variants = [name for name in VARIANTS if name.startswith("neon") == is_arm]
    wanted = [feature for name in variants for feature in VARIANTS[name]]
    there = _features()
    return {
        "name": tuned_table.processor(),
        "kernels": chosen,
        "others": [name for name in plugin.cpu_isas_supported() if name != chosen],
        "forced": os.environ.get("JAX_GLUON_CPU_ISA", ""),
        "refusal": plugin.cpu_isa_refusal(),
        "features": {
            name: "used" if name in used else "there, not used" if name in there else "absent"
            for name in wanted
        },
    }


def _features() -> set[str]:
    if sys.platform == "darwin":
        return {name for name, key in _NAMES_OF_MACOS.items() if _sysctl(f"hw.optional.arm.{key}")}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


def _sysctl(key: str) -> bool:
    command = ["sysctl", "-n", key]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    return finished.stdout.strip() == "1"


def metal(again: bool) -> dict[str, Any]:
    """The Metal device, or why there is none; whether calls go to it unasked, and its self-test.

    `again` runs the test, though its outcome is remembered.
    """
    name, why = _native.metal_device()
    found: dict[str, Any] = {"device": name, "why": why, "by_default": _native.may_be_metal()}
    if name:
        plugin: Any = _native.plugin()
        found["family"] = plugin.metal_family()
        if plugin.tests_metal():
            found["self_test"] = plugin.metal_self_test(again)
    return found


def cuda() -> dict[str, str]:
    """Whether cuDNN's kernels run here; empty where JAX has no NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        return {}
    return {"device": jax.devices()[0].device_kind, "cudnn": cudnn.missing() or "taken"}


def environment() -> dict[str, str]:
    """The variables that change what runs."""
    names = ("JAX_PLATFORMS", "XLA_FLAGS")
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("JAX_GLUON_", "SOFTMETAL_")) or name in names
    }


def cache() -> dict[str, Any]:
    """The cache folder, its files and their states; `problem` where nothing can be kept in it."""
    folder = tuned_table.cache_folder()
    if folder is None:
        why = "there is none: neither JAX_GLUON_CACHE_DIR nor HOME is set"
        return {"folder": "", "problem": why, "files": {}}
    found: dict[str, str] = {}
    problem = _unwritable(folder)
    try:
        paths = sorted(path for path in folder.iterdir() if path.is_file())
    except FileNotFoundError:
        paths = []
    except OSError as error:
        return {"folder": str(folder), "problem": problem or _text(error), "files": {}}
    for path in paths:
        found[path.name] = _state(path)
    return {"folder": str(folder), "problem": problem, "files": found}


def _unwritable(folder: Path) -> str:
    """Why nothing can be kept in a folder, which is made where it is needed; else nothing."""
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        return f"{nearest} is no folder"
    if not os.access(nearest, os.W_OK | os.X_OK):
        return f"{nearest} can't be written"
    return ""


def _state(path: Path) -> str:
    size = f"{path.stat().st_size:,} bytes"
    if not path.name.startswith("tuned-"):
        return size
    for device in ("cpu", "metal"):
        if path != tuned_table.table_path(device):
            continue
        try:
            table = tuned_table.load(path, device)
            return f"{len(table.rows)} rows, of this machine's {device}"
        except (OSError, *tuned_table.BROKEN) as error:
            return f"BROKEN, ignored: {_text(error)}; `jax-gluon tune` makes a new one"
    return f"{size}, of another device or version"


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
