"""`jax_gluon.quantize`: every format, by the plugin's custom call and by `jax.numpy`."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon._quantization.codes import rotation
from jax_gluon._quantization.formats import GRANULARITIES, PRESETS, QuantSpec
from tests.support import quantizer
from tests.support.arrays import placed

WAYS = {
    "symmetric": dict(symmetric=True),
    "zero_point": dict(symmetric=False),
    "minimum": dict(symmetric=False, float_minimum=True),
}
FORMATS = {
    f"int{bits}-{granularity}-{way}": QuantSpec(bits, granularity=granularity, **WAYS[way])
    for bits, granularity, way in itertools.product((8, 4), GRANULARITIES, WAYS)
}
LARGEST = float(np.finfo(np.float32).max)
# Every other one: each width, granularity and way, and each pair of them, is in both halves.
EVEN, ODD = list(FORMATS)[::2], list(FORMATS)[1::2]


def every_format(on_metal):
    """A test of every format, on Metal of a half of them.

    Of all formats tests/metal/shaders/test_quantize.py compares Metal's codes with NumPy's.
    """
    return pytest.mark.parametrize(
        ("name", "implementation"),
        [
            (name, implementation)
            for name in FORMATS
            for implementation in ("cpu", "metal", "xla")
            if implementation != "metal" or name in on_metal
        ],
        indirect=["implementation"],
    )


@pytest.fixture
def quantize(implementation):
    """`jax_gluon.quantize` through the implementation under test."""
    return lambda x, spec, **keywords: jax_gluon.quantize(
        x, spec, implementation=implementation, **keywords
    )


# Tests share compiled programs where they share this shape, with blocks of 8: the last block is
# short, and the first 32 tokens, of which a center is made, are not all.
def random_rows(seed=0, B=2, S=37, K=3, H=20, dtype=jnp.float32):
    x = np.random.default_rng(seed).standard_normal((B, S, K, H))
    return placed(x * np.linspace(0.01, 10, S)[:, None, None], dtype)


def steps(quantized):
    """The scale of each element, in float64."""
    scale = np.asarray(quantized.scale, np.float64)
    return quantizer.spread(scale, quantized.spec, quantized.shape)


@pytest.mark.parametrize(
    ("name", "dtype"), [(x, "float32") for x in FORMATS] + [(x, "bfloat16") for x in EVEN]
)
def test_error_is_at_most_half_a_step(name, dtype, quantize):
    spec = dataclasses.replace(FORMATS[name], block_size=8)
    x = random_rows(dtype=dtype)
    quantized = quantize(x, spec)
    assert quantized.shape == x.shape
    assert quantized.dtype == x.dtype
    width = x.shape[-1] // 2 if spec.bits == 4 else x.shape[-1]
    assert quantized.data.shape == (*x.shape[:-1], width)
    assert quantized.data.dtype == (jnp.uint8 if spec.bits == 4 else jnp.int8)
    assert quantized.scale.shape == spec.scale_shape(x.shape)
    error = np.abs(np.asarray(quantized.dequantize(jnp.float32), np.float64) - np.asarray(x, float))
    # A rounded zero point may push the extremes over the edge by another half.
    most = 1.001 if quantized.zero_point is not None else 0.501
    # 4-bit scales round to the nearest bfloat16: the ends lose 15 steps of 2**-9.
    most += 0.04 if spec.bits == 4 and spec.scale_dtype == jnp.bfloat16 else 0
    assert (error <= most * steps(quantized)).all()


@every_format(on_metal=EVEN)
def test_scales_are_those_of_the_block(name, quantize):
    """In float64: the range of each block over the number of steps, no more than bfloat16 away."""
    spec = dataclasses.replace(FORMATS[name], block_size=8)
    x = random_rows()
    (_, S, _, H) = x.shape
    values = np.asarray(x, np.float64)
    if spec.granularity == "tensor":
        low, high = np.broadcast_to(values.min(), (2, 1, 1, 1)), values.max()
    else:
        token, head = spec.token_block or S, spec.head_block or H
        low, high = (
            np.stack([
                np.stack([
                    extreme(values[:, i : i + token, :, h : h + head], axis=(1, 3))
                    for h in range(0, H, head)
                ], -1) for i in range(0, S, token)
            ], 1) for extreme in (np.min, np.max)
        )  # fmt: skip
    lowest, highest = spec.code_range
    if spec.symmetric:
        expected = np.maximum(-low, high) / highest
    elif spec.float_minimum:
        expected = (high - low) / (highest - lowest)
    else:
        expected = (np.maximum(high, 0) - np.minimum(low, 0)) / (highest - lowest)
    scale = np.asarray(quantize(x, spec).scale, np.float64)
    is_narrow = spec.scale_dtype == jnp.bfloat16
    tolerance = np.abs(low) / (highest - lowest) * 2**-7 if is_narrow else 1e-6
    np.testing.assert_allclose(
        scale, np.broadcast_to(expected, scale.shape), rtol=2**-7 if is_narrow else 1e-6,
        atol=float(np.max(tolerance)) if spec.float_minimum else 0,
    )  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_both_implementations_give_the_same_codes(name):
    rotate = name in EVEN
    spec = dataclasses.replace(FORMATS[name], block_size=8, center=True, rotate=rotate)
    x = random_rows(seed=4) + 1
    lengths = jnp.asarray([37, 13], jnp.int32)
    a, b = (
        jax_gluon.quantize(x, spec, lengths=lengths, implementation=implementation)
        for implementation in ("cpu", "xla")
    )
    for part in ("scale", "minimum", "zero_point", "center"):
        left, right = getattr(a, part), getattr(b, part)
        assert (left is None) == (right is None)
        if left is not None:
            # A mean or a rotation that differs in its last bit may round to the next bfloat16.
            atol = 1 if part == "zero_point" else 1e-5
            left, right = (np.asarray(x).astype(np.float32) for x in (left, right))
            np.testing.assert_allclose(left, right, rtol=2**-7, atol=atol)
    same = np.asarray(a.data) == np.asarray(b.data)
    assert same.mean() > 0.97
    distance = np.abs(quantizer.values(a) - quantizer.values(b))
    # Rotating back mixes the elements of a row.
    assert (distance <= (4 if rotate else 1.1) * steps(a).max()).all()
    assert distance.mean() <= 0.02 * steps(a).mean()


@pytest.mark.parametrize(("bits", "most"), [(8, 0.0012), (4, 0.021)], ids=["int8", "int4"])
def test_round_trip_of_normal_numbers(bits, most, quantize):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 256, 4, 64)), jnp.float32)
    exact = np.asarray(x, np.float64)

    def restored(granularity, **keywords):
        spec = QuantSpec(bits, granularity=granularity, **keywords)
        return np.asarray(quantize(x, spec).dequantize(), np.float64)

    def relative(granularity, **keywords):
        return np.linalg.norm(restored(granularity, **keywords) - exact) / np.linalg.norm(exact)

    rms = np.sqrt(np.mean((restored("tensor") - exact) ** 2))
    assert rms / (2 * np.abs(exact).max()) <= most
    assert relative("tensor") > relative("row")
    assert relative("row") > relative("group")
    if bits == 8:
        assert relative("row") <= 0.008
    else:
        assert relative("group", symmetric=False, float_minimum=True) <= 0.09


def test_halves_round_to_even(quantize):
    numbers = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.49], np.float32)
    rows = quantize(jnp.asarray(numbers).reshape(1, 1, 1, 8), QuantSpec())
    np.testing.assert_array_equal(rows.data.ravel(), [127, 0, 2, 2, 0, -2, -2, 3])


def test_nibbles_are_low_first_and_biased(quantize):
    numbers = np.array([7, -7, 0, 1, -1, 3], np.float32)
    rows = quantize(jnp.asarray(numbers).reshape(1, 1, 1, 6), QuantSpec(4))
    np.testing.assert_array_equal(rows.data.ravel(), [0x1F, 0x98, 0xB7])


@every_format(on_metal=ODD)
@pytest.mark.parametrize("constant", [3.7, -3e38])
def test_constant_blocks_are_exact(name, constant, quantize):
    """To the last place of float32, or 2**-16 where the minimum is stored as bfloat16."""
    spec = dataclasses.replace(FORMATS[name], block_size=8)
    x = jnp.full((2, 37, 3, 20), constant, jnp.float32)
    tolerance = 2**-15 if spec.float_minimum and spec.scale_dtype == jnp.bfloat16 else 2e-7
    if spec.scale_dtype == jnp.bfloat16 and not spec.float_minimum:
        tolerance = 2**-7 / 2 if spec.bits == 8 else 2**-3  # half a step: scales round up
    restored = quantize(x, spec).dequantize()
    np.testing.assert_allclose(restored, x, rtol=tolerance, atol=1e-37)


@every_format(on_metal=EVEN)
@pytest.mark.parametrize("magnitude", [1e-44, LARGEST])
def test_no_magnitude_overflows(name, magnitude, quantize):
    """Blocks with both ends of the range, and rows with both; half of them centered."""
    center = name in ODD and magnitude == LARGEST
    spec = dataclasses.replace(FORMATS[name], block_size=8, center=center)
    row = np.resize(np.array([-1, 1, -0.3, 0.2, 0.7, -0.1, 0, 0.9], np.float32), 20)
    signs = np.resize(np.array([1, -1, 1, 1, -1, 1, -1, -1], np.float32), 37)[:, None, None]
    x = jnp.asarray(np.broadcast_to(signs * row * np.float32(magnitude), (2, 37, 3, 20)))
    quantized = quantize(x, spec)
    for leaf in jax.tree.leaves(quantized):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    error = np.abs(np.asarray(quantized.dequantize(), np.float64) - np.asarray(x, np.float64))
    assert np.isfinite(error).all()
    assert (error <= magnitude * (0.02 if spec.bits == 8 else 0.2) + 1e-36).all()


@every_format(on_metal=ODD)
def test_an_outlier_stays_in_its_block(name, quantize):
    spec = dataclasses.replace(FORMATS[name], block_size=8)
    x = np.asarray(random_rows())
    large = x.copy()
    large[1, 5, 2, 3] = 1e30
    restored = np.asarray(quantize(large, spec).dequantize())
    assert np.isfinite(restored).all()
    assert restored[1, 5, 2, 3] == pytest.approx(1e30, rel=0.2)
    other = np.asarray(quantize(x, spec).dequantize())
    inside = np.zeros(x.shape, bool)
    tokens = {1: slice(5, 6), 8: slice(0, 8), 0: slice(None)}[spec.token_block]
    columns = {1: slice(3, 4), 8: slice(0, 8), 0: slice(None)}[spec.head_block]
    inside[1, tokens, 2, columns] = True
    if spec.granularity != "tensor":
        np.testing.assert_array_equal(restored[~inside], other[~inside])


@every_format(on_metal=EVEN)
@pytest.mark.parametrize("factor", [0, 1])
def test_a_poisoned_block_dequantizes_to_nan(name, factor, quantize):
    spec = dataclasses.replace(FORMATS[name], block_size=8)
    x = np.asarray(factor * random_rows())
    x = x.copy()
    x[1, 5, 2, 3] = np.nan
    restored = np.asarray(quantize(x, spec).dequantize())
    poisoned = np.zeros(x.shape, bool)
    tokens = {1: slice(5, 6), 8: slice(0, 8), 0: slice(None)}[spec.token_block]
    columns = {1: slice(3, 4), 8: slice(0, 8), 0: slice(None)}[spec.head_block]
    poisoned[1, tokens, 2, columns] = True
    if spec.granularity == "tensor":
        poisoned[:] = True
    np.testing.assert_array_equal(np.isnan(restored), poisoned)
    assert np.isfinite(restored[~poisoned]).all()


@pytest.mark.parametrize("length", [6, 32, 45])
def test_center_is_the_median_of_the_first_finite_values_inside_the_lengths(
    length, quantize, lower_median
):
    x = (random_rows(S=50) + 5).at[0, 2, 1, 3].set(jnp.inf)
    lengths = jnp.asarray([length, 0], jnp.int32)
    rows = quantize(x, QuantSpec(center=True), lengths=lengths)
    expected = lower_median(np.asarray(x)[0, : min(length, 32)])
    assert rows.center.shape == (2, 1, 3, 20)
    np.testing.assert_array_equal(rows.center[0, 0], expected)
    assert not rows.center[1].any()


def outliers(x):
    """Rows of `x` `[2, 45, 3, 36]` of all sizes, with a center."""
    size = np.ones((2, 45, 1, 1), np.float32)
    size[:, [3, 20, 21, 40]] = np.reshape([7, 100, 1e4, 3], (4, 1, 1))
    size[1, 44] = 1e6
    return (x + 2) * size


@pytest.mark.parametrize("block_size", [12, 32, 64])
def test_large_tokens_are_divided_by_powers_of_4(block_size, quantize):
    """Bit for bit what NumPy makes, whatever hidden tokens hold; the others keep their accuracy."""
    spec = dataclasses.replace(PRESETS["int4"].key, block_size=block_size)
    x = outliers(
        random_rows(S=45, H=36) / np.linspace(0.01, 10, 45, dtype=np.float32)[:, None, None]
    )
    lengths = jnp.asarray([45, 42], jnp.int32)
    visible = np.arange(45) < lengths[:, None]
    found = quantize(x.at[1, 42:].set(jnp.nan), spec, lengths=lengths)
    expected = quantizer.quantize(np.asarray(x), spec, visible=visible)
    for name in ("data", "scale", "minimum", "center"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    restored = np.asarray(found.dequantize())
    np.testing.assert_allclose(restored, quantizer.dequantize(expected), rtol=1e-5, atol=1e-5)
    error = np.abs(restored - np.asarray(x)) / np.abs(x).max((2, 3), keepdims=True)
    assert error[0].max() < 0.2


@pytest.mark.parametrize("magnitude", [0, 1e-30, 1e25])
def test_no_power_without_an_ordinary_norm(magnitude, quantize):
    """And a token that is not finite has none: it poisons the channels of its block."""
    spec = PRESETS["int4"].key
    x = (magnitude * outliers(random_rows(S=45, H=36))).at[0, 33, 1, 2].set(jnp.inf)
    found, plain = quantize(x, spec), quantize(x, dataclasses.replace(spec, token_powers=False))
    np.testing.assert_array_equal(found.data, plain.data)
    np.testing.assert_array_equal(found.dequantize(), plain.dequantize())
    assert np.isnan(found.dequantize()[0, 32:, 1, 2]).all()
    assert np.isfinite(found.dequantize()[:, :32]).all()


def test_centring_removes_what_all_tokens_share(quantize):
    """A common offset of 1000 costs float32's rounding, not codes."""
    x = random_rows()
    spec = QuantSpec(center=True)
    error = np.abs(np.asarray(quantize(x + 1000, spec).dequantize()) - np.asarray(x + 1000))
    assert (error <= 0.51 * steps(quantize(x, spec)) + 2e-4).all()


@pytest.mark.parametrize("H", [1, 2, 6, 64, 96])
def test_rotation_is_orthogonal_and_spreads_an_outlier(H, quantize):
    matrix = rotation(H)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(H), atol=1e-12)
    x = jnp.zeros((1, 2, 1, H), jnp.float32).at[0, 1, 0, H // 2].set(3.0)
    rotated = quantize(x, QuantSpec(rotate=True))
    np.testing.assert_allclose(rotated.dequantize(), x, atol=3 / 127)
    if H == 64:
        assert len(np.unique(np.abs(np.asarray(rotated.data[0, 1, 0], np.int32)))) == 1


def test_rotation_helps_where_one_element_of_a_row_sticks_out(quantize):
    x = np.random.default_rng(0).standard_normal((1, 64, 2, 64))
    x[..., 5] *= 30
    x = jnp.asarray(x, jnp.float32)

    def error(rotate):
        restored = quantize(x, QuantSpec(rotate=rotate)).dequantize()
        return float(jnp.linalg.norm(restored - x))

    assert error(True) < 0.5 * error(False)


@pytest.mark.parametrize("name", ["int8-row-symmetric", "int4-channel_block-minimum"])
def test_jit_vmap_and_scan(name, quantize):
    spec = dataclasses.replace(FORMATS[name], center=True, block_size=8)
    x = jnp.stack([random_rows(seed, B=1, S=16, K=2, H=8) for seed in range(3)])
    lengths = jnp.asarray([[16], [9], [3]], jnp.int32)

    def apply(x, lengths):
        return quantize(x, spec, lengths=lengths)

    expected = [apply(x[i], lengths[i]) for i in range(3)]
    mapped = jax.jit(jax.vmap(apply))(x, lengths)
    _, scanned = jax.lax.scan(lambda carry, each: (carry, apply(*each)), 0, (x, lengths))
    for stacked in (mapped, scanned):
        assert stacked.shape == x.shape
        for i in range(3):
            entry = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            for a, b in zip(jax.tree.leaves(entry), jax.tree.leaves(expected[i]), strict=True):
                np.testing.assert_array_equal(a, b)


def test_tensor_granularity_is_one_scale_per_mapped_entry(quantize):
    x = jnp.stack([random_rows(0, S=4), 100 * random_rows(1, S=4)])
    spec = QuantSpec(granularity="tensor")
    scale = jax.vmap(lambda x: quantize(x, spec).scale)(x)
    assert scale.shape == (2, 2, 1, 1, 1)
    np.testing.assert_allclose(scale[:, 0], scale[:, 1])
    assert scale[1, 0] > 10 * scale[0, 0]


def test_rank_3_and_empty_arrays(quantize, lower_median):
    x = random_rows()
    flat, batched = quantize(x[1], QuantSpec(center=True)), quantize(x, QuantSpec(center=True))
    np.testing.assert_array_equal(flat.center, batched.center[1])
    np.testing.assert_array_equal(flat.data, batched.data[1])
    scalar = quantize(x[1], QuantSpec(center=True), lengths=jnp.int32(5))
    np.testing.assert_array_equal(scalar.center[0], lower_median(np.asarray(x[1, :5])))
    for spec in (QuantSpec(), QuantSpec(granularity="channel"), QuantSpec(granularity="tensor")):
        assert quantize(jnp.zeros((2, 0, 3, 4)), spec).dequantize().shape == (2, 0, 3, 4)
        assert quantize(jnp.zeros((0, 5, 3, 4)), spec).dequantize().shape == (0, 5, 3, 4)


def test_no_gradient_flows_through(quantize):
    x = random_rows()
    gradient = jax.grad(lambda x: quantize(x, QuantSpec(center=True)).dequantize().sum())(x)
    assert not gradient.any()


def test_strict_modes(strict_modes, quantize):
    for name in list(FORMATS)[::4]:  # each width, granularity and way
        spec = dataclasses.replace(FORMATS[name], center=True, block_size=5)
        assert np.isfinite(quantize(random_rows(S=7, H=6), spec).dequantize()).all()
