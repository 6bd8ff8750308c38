"""Fixtures that every test shares: implementations, oracles, JAX's modes; bounds of a run."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
import pytest

from tests.support import oracle as numpy_oracle
from tests.support.arrays import placed


def _plugin_is_missing() -> bool:
    return importlib.util.find_spec("jax_gluon._plugin") is None


# The Metal pipelines of `shaders/` that a run may make: kernels with their function constants.
MAX_PIPELINES = 150
# Bytes of memory that a process of the run may have resident at its peak, and that it may have
# before compiled programs are dropped.
MAX_RESIDENT = float(os.environ.get("TESTS_MAX_RESIDENT_GIB", "2.5")) * 2**30
ENOUGH_RESIDENT = 2**30
_RUN = pytest.StashKey[Path]()
_PEAKS = pytest.StashKey[list[int]]()

# Most of the suite's time is XLA's, which compiles thousands of small programs: with its emitters
# of MLIR each takes three times as long. `make smoke` has the defaults.
QUICK_XLA_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def _xla_takes(flags):
    """Asked in a process of its own, which XLA ends at a flag that it does not know."""
    finished = subprocess.run(
        [sys.executable, "-c", "import jax; jax.jit(lambda: 1)()"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return finished.returncode == 0


def pytest_configure(config):
    """A folder for the run and all its processes: kernels compiled for the software Metal device.

    Each pipeline that the device makes is a line of the folder's file `pipelines`.
    """
    # Traces make many objects, most of which are still there when they are looked through for
    # cycles: with Python's thresholds that takes a seventh of the time.
    gc.set_threshold(50_000, 20, 50)
    # Each of many programs runs once, here and in the processes that tests start.
    jax.config.update("jax_disable_most_optimizations", True)
    config.stash[_PEAKS] = []
    if hasattr(config, "workerinput"):
        return
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ.setdefault("KERAS_BACKEND", "jax")  # which Keras reads when it is imported
    # NumPy's threads of several processes would spin for each other's cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if "XLA_FLAGS" not in os.environ and _xla_takes(QUICK_XLA_FLAGS):
        os.environ["XLA_FLAGS"] = QUICK_XLA_FLAGS
    run = config.stash[_RUN] = Path(tempfile.mkdtemp(prefix="jax-gluon-tests-"))
    os.environ.setdefault("SOFTMETAL_CACHE_DIR", str(run / "softmetal"))
    os.environ.setdefault("SOFTMETAL_PIPELINES", str(run / "pipelines"))


def pytest_unconfigure(config):
    if run := config.stash.get(_RUN, None):
        shutil.rmtree(run, ignore_errors=True)


def _pipelines():
    """Names and function constants of our kernels, by how they were compiled."""
    path = Path(os.environ["SOFTMETAL_PIPELINES"])
    made = defaultdict(set)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        name, *constants, image = line.split()
        if name.startswith(("attention_", "quantize_")):
            made[image.split(".")[1]].add((name, *sorted(constants)))
    return made


def _peak():
    """The most bytes that this process has had resident."""
    # Linux's ru_maxrss has what the process that started this one had.
    status = Path("/proc/self/status")
    if status.exists():
        rows = (line.split() for line in status.read_text(encoding="utf-8").splitlines())
        return next((1024 * int(row[1]) for row in rows if row[0] == "VmHWM:"), 0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Of pytest-xdist, in the process that started the worker."""
    node.config.stash[_PEAKS].append(getattr(node, "workeroutput", {}).get("peak", 0))


def pytest_sessionfinish(session):
    """The suite fails where it makes more pipelines than a Mac should have to compile for it.

    It fails as well where one of its processes takes more memory than it may.
    """
    config = session.config
    if hasattr(config, "workerinput"):
        config.workeroutput["peak"] = _peak()
        return
    config.stash[_PEAKS].append(_peak())
    pipelines = len(set().union(*_pipelines().values()))
    if pipelines > MAX_PIPELINES or max(config.stash[_PEAKS]) > MAX_RESIDENT:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    peak = max(config.stash[_PEAKS])
    is_over = peak > MAX_RESIDENT
    terminalreporter.write_line(
        f"{'ERROR: ' if is_over else ''}Memory of a process: {peak / 2**30:.2f} GiB resident, "
        f"at most {MAX_RESIDENT / 2**30:.2f}",
        red=is_over,
    )
    if made := _pipelines():
        count = len(set().union(*made.values()))
        each = ", ".join(f"{name} {len(made[name])}" for name in sorted(made))
        is_over = count > MAX_PIPELINES
        terminalreporter.write_line(
            f"{'ERROR: ' if is_over else ''}Metal pipelines: {count}, at most {MAX_PIPELINES} "
            f"(by instrumentation: {each})",
            red=is_over,
        )


@pytest.fixture(autouse=True)
def _few_programs():
    """Drops the programs that JAX keeps compiled, once they take much memory.

    Freed memory goes back to the system, or the peak would grow with its fragments.
    """
    yield
    if psutil.Process().memory_info().rss > ENOUGH_RESIDENT:
        jax.clear_caches()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory):
    """Compiled pipelines of Metal are kept apart from the user's."""
    if "JAX_GLUON_CACHE_DIR" not in os.environ:
        os.environ["JAX_GLUON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def require():
    """`require(implementation)` skips the test where it is not there.

    That is a checkout without the compiled plugin, or no Metal device; with SOFTMETAL_REQUIRED the
    test then fails.
    """

    def check(implementation):
        if implementation not in ("cpu", "metal"):
            return
        if _plugin_is_missing():
            pytest.skip("jax_gluon._plugin is not built")
        from jax_gluon import _plugin

        name, why = _plugin.metal_device()
        if implementation == "metal" and not name:
            (pytest.fail if os.environ.get("SOFTMETAL_REQUIRED") else pytest.skip)(why)

    return check


@pytest.fixture(params=["cpu", "metal", "xla"])
def implementation(request, require):
    """Each implementation."""
    require(request.param)
    return request.param


@pytest.fixture
def configure():
    """`with configure(jax_enable_x64=True, ...)`: JAX's configuration, put back afterwards."""

    @contextlib.contextmanager
    def scope(**settings):
        before = {name: getattr(jax.config, name) for name in settings}
        try:
            for name, setting in settings.items():
                jax.config.update(name, setting)
            yield
        finally:
            for name, setting in before.items():
                jax.config.update(name, setting)

    return scope


STRICT_MODES = {
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_debug_nans": True,
    "jax_debug_infs": True,
}


@pytest.fixture
def strict_modes(configure):
    """Every strict mode of JAX but x64."""
    with configure(**STRICT_MODES):
        yield


@pytest.fixture(scope="session")
def oracle():
    """Attention and its gradients in float64 NumPy."""
    return numpy_oracle.attention


@pytest.fixture(scope="session")
def fake_quantize():
    """INT8 rows in float64 NumPy; other formats have tests/support/quantizer.py."""
    return numpy_oracle.fake_quantize


@pytest.fixture(scope="session")
def lower_median():
    """The center that the quantizer takes away, of finite values along the first axis."""
    return numpy_oracle.lower_median


@pytest.fixture(scope="session")
def seen_lengths():
    """`seen_lengths(B, T, S, **keywords)`: how many rows and keys of each entry may be seen."""

    def lengths(B, T, S, *, query_seq_lengths=None, key_value_seq_lengths=None, **keywords):
        reach = 0 if keywords.get("is_causal") else S
        if (window := keywords.get("local_window_size")) is not None:
            reach = min(reach, window if np.ndim(window) == 0 else window[1])
        rows = np.full(B, T) if query_seq_lengths is None else np.clip(query_seq_lengths, 0, T)
        keys = np.full(B, S) if key_value_seq_lengths is None else key_value_seq_lengths
        return np.asarray(rows, np.int32), np.clip(keys, 0, min(S, T + reach)).astype(np.int32)

    return lengths


@pytest.fixture(scope="session")
def relative_error():
    """Relative L2 distance of `actual` from `expected`, absolute where `expected` is 0."""

    def distance(actual, expected) -> float:
        actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
        assert actual.shape == expected.shape
        return float(np.linalg.norm(actual - expected) / (np.linalg.norm(expected) or 1.0))

    return distance


@pytest.fixture(scope="session")
def random_operands():
    """`random_operands(B=2, T=5, S=7, N=4, K=2, H=8, V=8)`: query, key, value and a cotangent."""

    def draw(B=2, T=5, S=7, N=4, K=2, H=8, V=8, dtype="float32", seed=0) -> tuple[Any, ...]:
        rng = np.random.default_rng(seed)
        shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V), (B, T, N, V)
        return tuple(placed(rng.standard_normal(shape), dtype) for shape in shapes)

    return draw
