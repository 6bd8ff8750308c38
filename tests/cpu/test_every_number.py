"""The quantizer on every number of 16 bits: rows of one alone, and of one beside another number."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_gluon
from tests.support import quantizer
from tests.support.variants import cpu_variants

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
FORMATS = {
    "int8": dict(bits=8),
    "int8-zero-point": dict(bits=8, symmetric=False),
    "int8-minimum": dict(bits=8, symmetric=False, float_minimum=True),
    "int4": dict(bits=4),
    "int4-zero-point": dict(bits=4, symmetric=False),
    "int4-minimum": dict(bits=4, symmetric=False, float_minimum=True),
}


@pytest.fixture(scope="module")
def expected():
    """What `tests.support.quantizer` makes of rows, once for all variants."""
    made = {}

    def of(x, spec, name):
        if name not in made:
            with np.errstate(all="ignore"):
                made[name] = quantizer.quantize(x, spec)
        return made[name]

    return of


def ordered(x):
    """Integers, one apart of neighbours; of subnormal numbers, which XLA flushes, 0."""
    x = np.asarray(x)
    if x.dtype == np.uint8:  # two codes
        return np.stack([x & 15, x >> 4], axis=-1).astype(np.int64).reshape(*x.shape[:-1], -1)
    if x.dtype == np.int8:
        return x.astype(np.int64)
    tiny = float(ml_dtypes.finfo(x.dtype).tiny)
    bits = np.where(np.abs(x.astype(np.float32)) < tiny, x.dtype.type(0), x)
    bits = bits.view(f"i{x.dtype.itemsize}").astype(np.int64)
    lowest = np.iinfo(f"i{x.dtype.itemsize}").min
    return np.where(bits < 0, lowest - bits, bits)


@pytest.mark.parametrize("variant", [*cpu_variants(), "xla"])
@pytest.mark.parametrize("beside", [None, 3.0], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_number_of_16_bits(name, dtype, beside, variant, use, poison, expected):
    """All that is stored is the reference's bit by bit; a row with NaN or infinity is NaN."""
    every = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])
    x = np.stack([every, every if beside is None else np.full_like(every, beside)], axis=-1)
    x = x.reshape(1, 2**13, 8, 2)
    spec = jax_gluon.QuantSpec(granularity="row", **FORMATS[name])
    implementation = use(variant)
    found = jax_gluon.quantize(jnp.asarray(x), spec, implementation=implementation)
    right = expected(x, spec, (name, dtype, beside))
    is_finite = np.isfinite(x.astype(np.float32)).all(-1)
    assert np.isnan(np.asarray(found.dequantize(), np.float32)[~is_finite]).all()
    for leaf in ("data", "scale", "zero_point", "minimum"):
        a, b = getattr(found, leaf), getattr(right, leaf)
        assert (a is None) == (b is None)
        if a is None:
            continue
        if variant == "xla" and leaf in ("scale", "minimum"):
            # It multiplies by a reciprocal: the two ends of a row are off by one place each.
            with np.errstate(invalid="ignore"):  # NaN is cast
                a, b, row = (np.asarray(y, np.float64)[is_finite] for y in (a, b, x))
            places = 2.0**-23 * np.abs(row).max(-1, keepdims=True)
            assert (np.abs(a - b) <= places + 2.0**-126).all(), leaf
        else:
            apart = np.abs(ordered(a) - ordered(b))[is_finite]
            assert apart.max() <= (variant == "xla"), leaf
