"""Fixtures that every test file shares: the implementations, a NumPy oracle and JAX's modes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest


def _plugin_is_missing() -> bool:
    return importlib.util.find_spec("jax_gluon._plugin") is None


# The Metal pipelines of `shaders/` that a run may make: kernels with their function constants.
MAX_PIPELINES = 150
_RUN = pytest.StashKey[Path]()

# Most of the suite's time is XLA's, which compiles thousands of small programs: with its emitters
# of MLIR each takes three times as long. tests/package/test_smoke.py has the defaults.
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
    # Each of many programs runs once, here and in the processes that tests start.
    jax.config.update("jax_disable_most_optimizations", True)
    if hasattr(config, "workerinput"):
        return
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
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


def pytest_sessionfinish(session):
    """The suite fails where it makes more pipelines than a Mac should have to compile for it."""
    is_worker = hasattr(session.config, "workerinput")
    if not is_worker and len(set().union(*_pipelines().values())) > MAX_PIPELINES:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if made := _pipelines():
        count = len(set().union(*made.values()))
        each = ", ".join(f"{name} {len(made[name])}" for name in sorted(made))
        is_over = count > MAX_PIPELINES
        terminalreporter.write_line(
            f"{'ERROR: ' if is_over else ''}Metal pipelines: {count}, at most {MAX_PIPELINES} "
            f"(by instrumentation: {each})",
            red=is_over,
        )


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


class OracleResult(NamedTuple):
    out: np.ndarray
    log_sum_exp: np.ndarray
    d_query: np.ndarray
    d_key: np.ndarray
    d_value: np.ndarray
    d_bias: np.ndarray | None


def visible_keys(
    shape, bias, mask, is_causal, query_lengths, key_lengths, local_window_size, soft_cap
):
    """Which key each row sees: bool [B, N, T, S]."""
    _, _, T, S = shape
    i, j = np.arange(T)[:, None], np.arange(S)[None, :]
    visible = np.ones(shape, bool)
    if mask is not None:
        visible &= np.asarray(mask)
    if is_causal:
        visible &= j <= i
    if local_window_size is not None:
        left, right = np.broadcast_to(local_window_size, 2)
        visible &= (i - left <= j) & (j <= i + right)
    if query_lengths is not None:
        visible &= (i < np.asarray(query_lengths)[:, None, None])[:, None]
    if key_lengths is not None:
        visible &= (j < np.asarray(key_lengths)[:, None, None])[:, None]
    if bias is not None and soft_cap is None:
        visible &= ~(np.asarray(bias, np.float64) < -2.35e38)  # NaN is visible
    return visible


def numpy_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    logits_soft_cap=None,
    d_out=None,
    d_log_sum_exp=None,
) -> OracleResult:
    """Attention and its gradients in float64 NumPy, one formula a line; small shapes only.

    Cotangents default to zeros. Hidden elements are taken out before anything is summed.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    B, T, N, H = q.shape
    _, S, K, V = v.shape
    group = N // K
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    scale = 1 / np.sqrt(H) if scale is None else float(scale)
    visible = visible_keys(
        (B, N, T, S), bias, mask, is_causal, query_seq_lengths, key_value_seq_lengths,
        local_window_size, logits_soft_cap,
    )  # fmt: skip
    each = visible[..., None]

    def contract(spec, weights, x):
        """einsum over the visible elements alone: weights [B,N,T,S], x spread to [B,N,T,S,*]."""
        with np.errstate(invalid="ignore"):
            return np.einsum(spec, np.where(each, weights[..., None] * x, 0.0))

    q5, k5, v5 = q.transpose(0, 2, 1, 3)[:, :, :, None], *(
        x.transpose(0, 2, 1, 3)[:, :, None] for x in (k, v)
    )  # fmt: skip
    logits = np.where(each, q5 * k5, 0.0).sum(-1) * scale
    if bias is not None:
        logits = logits + np.where(visible, np.asarray(bias, np.float64), 0.0)
    slope = np.ones_like(logits)
    if logits_soft_cap is not None:
        tanh = np.tanh(logits / logits_soft_cap)
        logits, slope = logits_soft_cap * tanh, 1 - tanh**2
    maximum = np.max(logits, axis=-1, keepdims=True, where=visible, initial=-1e300)
    exponentials = np.where(visible, np.exp(np.where(visible, logits - maximum, 0.0)), 0.0)
    total = exponentials.sum(-1, keepdims=True)
    empty = total == 0
    p = exponentials / np.where(empty, 1.0, total)
    log_sum_exp = np.where(empty, -np.inf, maximum + np.log(np.where(empty, 1.0, total)))[..., 0]
    out = contract("bntsv->btnv", p, v5)

    d_out = np.zeros_like(out) if d_out is None else np.asarray(d_out, np.float64)
    d_lse = np.zeros((B, T, N)) if d_log_sum_exp is None else np.asarray(d_log_sum_exp, np.float64)
    d_out = d_out.transpose(0, 2, 1, 3)[:, :, :, None]
    dp = np.where(each, d_out * v5, 0.0).sum(-1)
    delta = np.sum(p * dp, -1, keepdims=True) - d_lse.transpose(0, 2, 1)[..., None]
    d_logits = p * (dp - delta) * slope
    by_kv_head = (B, S, K, group, -1)
    d_bias = None
    if bias is not None:
        d_bias = d_logits
        shape = (1,) * (4 - np.ndim(bias)) + np.shape(bias)
        for axis, extent in enumerate(shape):
            if extent == 1:
                d_bias = d_bias.sum(axis, keepdims=True)
        d_bias = d_bias.reshape(np.shape(bias))
    return OracleResult(
        out,
        log_sum_exp.transpose(0, 2, 1),
        contract("bntsh->btnh", d_logits * scale, k5),
        contract("bntsh->bsnh", d_logits * scale, q5).reshape(*by_kv_head[:-1], H).sum(3),
        contract("bntsv->bsnv", p, d_out).reshape(*by_kv_head[:-1], V).sum(3),
        d_bias,
    )


@pytest.fixture(scope="session")
def oracle():
    return numpy_attention


def numpy_fake_quantize(x, *, center=False, lengths=None):
    """What INT8 rows of `x` [B, S, K, H] dequantize to, in float64: zeros past the lengths."""
    x = np.asarray(x, np.float64)
    lengths = np.full(x.shape[0], x.shape[1]) if lengths is None else np.asarray(lengths)
    centers = np.zeros_like(x[:, :1])
    for b in range(x.shape[0] if center else 0):
        centers[b, 0] = numpy_lower_median(x[b, : np.clip(lengths[b], 0, 32)])
    seen = np.arange(x.shape[1]) < lengths[:, None]
    centered = np.where(seen[:, :, None, None], x - centers, 0.0)
    scale = np.abs(centered).max(-1, keepdims=True) / 127
    return np.rint(centered / np.where(scale > 0, scale, 1.0)) * scale + centers


def numpy_lower_median(x):
    """Of the finite values along the first axis, 0 where there are none."""
    count = np.isfinite(x).sum(0)
    ordered = np.sort(np.where(np.isfinite(x), x, np.inf), axis=0)
    middle = np.maximum(count[None] - 1, 0) // 2
    return np.where(count > 0, np.take_along_axis(ordered, middle, 0)[0], 0) if len(x) else 0.0


@pytest.fixture(scope="session")
def fake_quantize():
    """INT8 rows in float64 NumPy; other formats have an oracle of their own in test_formats."""
    return numpy_fake_quantize


@pytest.fixture(scope="session")
def lower_median():
    """The center that the quantizer takes away, of finite values along the first axis."""
    return numpy_lower_median


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
        return tuple(jax.numpy.asarray(rng.standard_normal(shape), dtype=dtype) for shape in shapes)

    return draw
