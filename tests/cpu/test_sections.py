"""Long documents in one row, which kernels compute apart."""

import functools

import jax
import numpy as np
import pytest

import jax_gluon
from tests.support.arrays import placed

plugin = pytest.importorskip("jax_gluon._plugin")

pytestmark = pytest.mark.usefixtures("poison")
T, S = 1420, 1210
# Documents of queries and of keys, each with a number: split into parts, short, without keys,
# without queries, and padding at the end.
ROWS = {0: [(1, 1060), (2, 300), (-1, 60)], 1: [(7, 270), (3, 5), (9, 280), (4, 600), (5, 265)]}
KEYS = {0: [(1, 700), (8, 30), (2, 450), (-2, 30)], 1: [(7, 100), (3, 300), (4, 10), (5, 800)]}


def _ids(documents):
    return np.stack([np.repeat(*np.transpose(documents[b])) for b in documents]).astype(np.int32)


@pytest.fixture(scope="module")
def problem():
    """Operands, a cotangent and segments; the float64 results of the oracle."""
    from tests.support import oracle

    rng = np.random.default_rng(5)
    shapes = ((T, 2, 24), (S, 1, 24), (S, 1, 20), (T, 2, 20))
    operands = [rng.standard_normal((2, *x), np.float32) for x in shapes]
    segments = dict(query_segment_ids=_ids(ROWS), key_value_segment_ids=_ids(KEYS))
    *arrays, d_out = operands
    expected = oracle.attention(*arrays, is_causal=True, d_out=d_out, **segments)
    return operands, segments, (expected.out, *expected[2:5])


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("kernel", ["baseline", "gluon"])
@pytest.mark.parametrize("variant", plugin.cpu_isas_supported())
def test_documents_are_those_of_a_mask(variant, kernel, quantization, use, problem, relative_error):
    use(variant)
    operands, segments, expected = problem
    *arrays, d_out = map(placed, operands)

    def results(**keywords):
        attention = functools.partial(
            jax_gluon.dot_product_attention, is_causal=True, implementation="cpu", kernel=kernel,
            quantization=quantization, **keywords,
        )  # fmt: skip
        out, pullback = jax.vjp(attention, *arrays)
        return out, *pullback(d_out)

    bound = 3e-6
    if quantization:
        ids, keys = segments.values()
        expected = results(mask=placed(ids[:, None, :, None] == keys[:, None, None]))
        bound = 8e-3  # P has 8 bits, in units of a subtile's largest
    for found, exact in zip(results(**segments), expected, strict=True):
        assert np.all(np.isfinite(found))
        assert relative_error(found, exact) <= bound
