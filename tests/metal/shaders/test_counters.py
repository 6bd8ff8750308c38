"""Counted work: products, barriers and bytes of keys and values, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from jax_gluon._quantization.formats import QuantSpec
from tests.support.metal.encoder import (
    BLOCK_ROWS,
    SHADERS,
    Problem,
    backward,
    blocks,
    decode,
    forward,
    matrix_type,
)
from tests.support.metal.problems import DTYPES, QUANTIZED, draw

COUNT = dict(instrumentation="counters")
INT4 = QuantSpec(4, granularity="group", block_size=32)
INT4_CHANNEL = QuantSpec(4, symmetric=False, granularity="channel_block", float_minimum=True)
FORMATS = {
    "int8": (QuantSpec(),) * 3,
    "int8_zero_point": (QuantSpec(symmetric=False),) * 3,
    "int4": (QuantSpec(4),) * 3,
    "int4_group": (QuantSpec(), INT4, INT4),
    "int4_channel": (QuantSpec(), INT4_CHANNEL, INT4_CHANNEL),
    "int4_preset": QUANTIZED["int4"][0],
}


def problem_of(kind, **shape):
    """One head, of `T` queries and `S` keys."""
    shape = {"B": 1, "N": 1, "K": 1, **shape}
    dtype = kind if kind in DTYPES else "float32"
    q, k, v, d_out = draw(dtype, FORMATS.get(kind, (None,) * 3), **shape)
    return Problem(q, k, v, out_dtype=DTYPES[dtype]), d_out


def visible(problem):
    i, j = np.arange(problem.T)[:, None], np.arange(problem.S)
    left, right = problem.window or (problem.T, problem.S)
    seen = (i - left <= j) & (j <= i + (0 if problem.is_causal else right))
    if problem.segment_ids is not None:
        of_rows, of_keys = (ids[0] for ids in problem.segment_ids)
        seen &= of_rows[:, None] == of_keys
    return np.pad(seen, ((0, -problem.T % 8), (0, -problem.S % 8)))


def matrices(problem):
    """8x8 matrices of scores with a visible pair: the least that can be multiplied."""
    seen = visible(problem)
    return int(seen.reshape(len(seen) // 8, 8, -1, 8).any((1, 3)).sum())


def tile_rows(problem, matrix):
    head_dim = next(d for d in (64, 128, 256) if d >= max(problem.H, problem.V))
    return 8192 // (head_dim * (4 if matrix == "float" else 2))


def tiles(problem, matrix, by_keys=False):
    """Tiles of the other side that the threadgroups walk."""
    seen = visible(problem).T if by_keys else visible(problem)
    total, step = 0, tile_rows(problem, matrix)
    for first in range(0, len(seen), BLOCK_ROWS):
        other = np.flatnonzero(seen[first : first + BLOCK_ROWS].any(0))
        if len(other):
            total += blocks(other[-1] + 1 - other[0] // 8 * 8, step)
    return total


def check_near(found, least):
    """Little besides the products of matrices: what softmax multiplies and adds."""
    assert least <= found <= 1.05 * least


def check_products(problem, d_out, with_backward):
    H, V = (blocks(n, 8) * 8 for n in (problem.H, problem.V))
    found = forward(problem, **COUNT)
    check_near(found.counters.multiply_accumulates, matrices(problem) * 64 * (H + V))
    assert found.counters.threadgroup_barriers == 2 * tiles(problem, matrix_type(problem))
    if not with_backward:
        return
    gradients = backward(problem, found, d_out, **COUNT)
    # P K besides S, dP and dS K, where the output is rounded.
    is_rounded = problem.out_dtype != np.float32
    for counters, products, by_keys in (
        (gradients.query_counters, (3 if is_rounded else 2) * H + V, False),
        (gradients.key_value_counters, 2 * H + 2 * V, True),
    ):
        check_near(counters.multiply_accumulates, matrices(problem) * 64 * products)
        matrix = "half" if matrix_type(problem) == "half" else "float"
        assert counters.threadgroup_barriers == 2 * tiles(problem, matrix, by_keys)


@pytest.mark.parametrize(
    ("dtype", "H", "V", "is_causal"),
    [("float32", 64, 64, False), ("float16", 20, 36, False), ("float16", 128, 128, True)],
)
def test_products_and_barriers(dtype, H, V, is_causal):
    problem, d_out = problem_of(dtype, T=136, S=200, H=H, V=V)
    problem.is_causal = is_causal
    check_products(problem, d_out, with_backward=True)


def test_products_of_a_window():
    problem, d_out = problem_of("float16", T=300, S=300, H=64, V=64)
    problem.window = (40, 10)
    check_products(problem, d_out, with_backward=True)


def test_products_of_packed_sequences():
    problem, d_out = problem_of("float16", T=300, S=300, H=64, V=64)
    ids = np.repeat(np.arange(3, dtype=np.int32), [100, 57, 143])[None]
    problem.is_causal, problem.segment_ids = True, (ids, ids)
    check_products(problem, d_out, with_backward=True)


def test_products_of_a_long_causal_head():
    problem, _ = problem_of("float16", T=512, S=512, H=64, V=64)
    problem.is_causal = True
    check_products(problem, None, with_backward=False)


def test_operations_of_a_simdgroup():
    """Products, and a few shuffles for each tile; MLX's attention has 1.25 times the products."""
    problem, _ = problem_of("float16", T=128, S=256, H=64, V=64)
    for pipeline in ("baseline", "gluon"):
        counters = forward(problem, pipeline=pipeline, **COUNT).counters
        products = matrices(problem) * 2 * 64 // 8
        assert products < counters.simdgroup_operations < 1.15 * products


def bytes_per_key(kind, H):
    """Device bytes that one more key costs a forward pass, over as many query blocks as passes."""
    T, S = 64, 128
    few, many = (
        forward(problem_of(kind, T=T, S=n, H=H, V=H)[0], **COUNT).counters.device_bytes_read
        for n in (S, 2 * S)
    )
    return (many - few) / (S * blocks(T, BLOCK_ROWS))


def test_bytes_of_keys_and_values():
    H = 64
    half = bytes_per_key("float16", H)
    # Each query block reads keys and values once.
    assert half == 2 * H * 2
    assert bytes_per_key("float16", 128) == 2 * half
    assert bytes_per_key("float32", H) == 2 * half
    for kind, most in (
        ("int8", 0.55), ("int8_zero_point", 0.55), ("int4", 0.33), ("int4_group", 0.33),
        ("int4_channel", 0.33), ("int4_preset", 0.33),
    ):  # fmt: skip
        assert bytes_per_key(kind, H) <= most * half, kind


@pytest.mark.parametrize(("kind", "bytes_of_a_row"), [("float16", 128), ("int8", 68), ("int4", 36)])
def test_decode_reads_keys_and_values_once(kind, bytes_of_a_row):
    """For all query heads of a group, with scales of rows beside their codes."""

    def count(S):
        problem, _ = problem_of(kind, T=1, S=S, N=8, H=64, V=64)
        return decode(problem, 2, **COUNT).counters.device_bytes_read

    # Whole tiles, so that the splits' ends cost nothing of their own.
    assert (count(512) - count(256)) / 256 == 2 * bytes_of_a_row


#: What shaders/block_sizes.h says of tiles and columns, and 2 KiB for rows and flags.
THREADGROUP_BYTES = {
    ("float32", 64): 17408 + 2048,
    ("float32", 128): 16896 + 4096,
    ("float32", 256): 16640 + 8192,
    ("float16", 64): 18432,
    ("float16", 128): 17408,
    ("float16", 256): 16896,
}


@pytest.mark.parametrize(("dtype", "H"), THREADGROUP_BYTES)
def test_threadgroup_memory(dtype, H):
    problem, d_out = problem_of(dtype, T=40, S=40, H=H, V=H)
    found = forward(problem, **COUNT)
    gradients = backward(problem, found, d_out, **COUNT)
    table = THREADGROUP_BYTES[dtype, H]
    text = (SHADERS / "block_sizes.h").read_text(encoding="utf-8")
    tiles = table - (32 * H if dtype == "float32" else 0)
    assert f"{tiles:,}" in text
    for counters in (found.counters, gradients.query_counters):
        assert table <= counters.threadgroup_memory_peak <= table + 2048
    # The dK/dV pass has no columns.
    assert tiles <= gradients.key_value_counters.threadgroup_memory_peak <= tiles + 2048
