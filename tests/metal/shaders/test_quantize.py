"""The quantizer's kernels: bit for bit what NumPy stores, for every format."""

from __future__ import annotations

import dataclasses
import itertools

import ml_dtypes
import numpy as np
import pytest

from jax_gluon._quantization.codes import rotation
from jax_gluon._quantization.formats import GRANULARITIES, PRESETS, QuantSpec
from tests.support import quantizer
from tests.support.metal.encoder import quantize

WAYS = {
    "symmetric": dict(symmetric=True),
    "zero_point": dict(symmetric=False),
    "minimum": dict(symmetric=False, float_minimum=True),
}
SPECS = {
    f"int{bits}-{granularity}-{way}": QuantSpec(
        bits, granularity=granularity, block_size=12, **WAYS[way]
    )
    for bits, granularity, way in itertools.product((8, 4), GRANULARITIES, WAYS)
}


def draw(shape=(2, 37, 3, 46), dtype=np.float32):
    rng = np.random.default_rng(3)
    x = rng.standard_normal(shape) * rng.gamma(1, 2, shape[2:]) + rng.standard_normal(shape[2:])
    return x.astype(dtype)


def check_equal(found, wanted):
    for name in ("data", "scale", "zero_point", "minimum", "center"):
        actual, expected = getattr(found, name), getattr(wanted, name)
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert actual.dtype == expected.dtype
            np.testing.assert_array_equal(actual, expected, err_msg=name)


@pytest.mark.parametrize("name", SPECS)
def test_codes_are_numpys(name):
    x = draw()
    check_equal(quantize(x, SPECS[name]), quantizer.quantize(x, SPECS[name]))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_centered(granularity, dtype):
    spec = QuantSpec(symmetric=False, granularity=granularity, block_size=10, center=True)
    x = draw((2, 70, 2, 130), dtype)
    check_equal(quantize(x, spec), quantizer.quantize(x, spec))


@pytest.mark.parametrize(("block_size", "tokens"), [(3, 37), (32, 70), (50, 37)])
def test_powers_of_tokens(block_size, tokens):
    spec = dataclasses.replace(PRESETS["int4"].key, block_size=block_size)
    x = draw((2, tokens, 2, 130))
    x[:, [3, 4, 20, 36]] *= np.float32([30, 1e4, 5, 1e6]).reshape(4, 1, 1)
    visible = np.random.default_rng(9).random(x.shape[:2]) < 0.8
    check_equal(quantize(x, spec, visible=visible), quantizer.quantize(x, spec, visible=visible))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_hidden_tokens_change_no_bit(granularity, way):
    rng = np.random.default_rng(9)
    x = draw((4, 71, 2, 34))
    visible = rng.random((4, 71)) < 0.6
    visible[1, :40] = False  # whole blocks, and more than a step of the search for the center
    visible[2] = False
    spec = QuantSpec(granularity=granularity, block_size=12, center=True, **WAYS[way])
    wanted = quantizer.quantize(x, spec, visible=visible)
    for hidden in (np.nan, -np.inf, 3e38, 0):
        found = quantize(np.where(visible[..., None, None], x, hidden), spec, visible=visible)
        check_equal(found, wanted)
    if granularity == "row":
        assert not wanted.scale[~visible].any()
    rotated = QuantSpec(granularity=granularity, block_size=12, center=True, rotate=True)
    codes = [
        quantize(np.where(visible[..., None, None], x, hidden), rotated, visible=visible)
        for hidden in (np.nan, 3e38)
    ]
    check_equal(*codes)
    assert np.isfinite(codes[0].scale).all()


def test_center_of_finite_values():
    x = draw((3, 50, 2, 40))
    x[0, 3, 1, 7], x[1, 4, 0, 2] = np.nan, np.inf
    x[1, :30:2, 1], x[2, :, 0, 5] = -np.inf, np.nan
    found = quantize(x, QuantSpec(center=True))
    np.testing.assert_array_equal(found.center, quantizer.token_center(x))
    assert found.center[2, 0, 0, 5] == 0
    x[1, :30:2, 1], x[2, :, 0, 5] = 1, 1
    found = quantize(x, QuantSpec(center=True))
    bad = np.zeros(found.scale.shape, bool)
    bad[0, 3, 1], bad[1, 4, 0] = True, True
    np.testing.assert_array_equal(np.isnan(found.scale), bad)
    assert not found.data[bad[..., 0]].any()


@pytest.mark.parametrize("granularity", ["row", "channel"])
@pytest.mark.parametrize("H", [12, 64, 35])
def test_rotated(granularity, H):
    spec = QuantSpec(granularity=granularity, rotate=True, center=True)
    x = draw((2, 40, 2, H))
    found = quantize(x, spec)
    wanted = quantizer.quantize(x, spec)
    np.testing.assert_allclose(found.center, wanted.center, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.scale, wanted.scale, rtol=1e-5)
    apart = np.abs(found.data.astype(int) - wanted.data)
    assert apart.max() <= 1
    assert apart.mean() < 1e-3
    error = quantizer.dequantize(found) @ rotation(H).T - x
    # A step is at most a 127th of the largest element, and rounding takes half of one.
    assert np.abs(error).max() <= np.sqrt(H & -H) * found.scale.max()


def test_tensor_scales_of_parts_of_the_batch():
    x = draw((4, 9, 3, 16)) * np.array([1, 2, 3, 4], np.float32)[:, None, None, None]
    spec = QuantSpec(granularity="tensor", symmetric=False)
    found = quantize(x, spec, maps=2)
    for b in (0, 2):
        wanted = quantizer.quantize(x[b : b + 2], spec)
        np.testing.assert_array_equal(found.scale[b : b + 2], wanted.scale)
        np.testing.assert_array_equal(found.data[b : b + 2], wanted.data)


@pytest.mark.parametrize("way", WAYS)
def test_constant_tiny_and_huge_blocks_are_finite(way):
    x = draw((1, 6, 1, 32))
    x[0, 0], x[0, 1], x[0, 2] = 0, 3.25, 1e-42
    x[0, 3, 0, ::2] = np.finfo(np.float32).max
    x[0, 3, 0, 1::2] = -np.finfo(np.float32).max
    found = quantize(x, QuantSpec(**WAYS[way]))
    restored = quantizer.dequantize(found)
    assert np.isfinite(found.scale).all()
    assert np.isfinite(restored).all()
    np.testing.assert_allclose(restored[0, :2], x[0, :2], rtol=1e-6)
