"""`block_mask` and attention under it, against the same mask as an array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon._block_mask import _Blocks
from jax_gluon._errors import Checker
from tests.support import cases


def _sees(b, h, i, j):
    """Strides and a diagonal, other ones for each entry and head."""
    is_local = (j <= i + b) & (i - j < 50 + 40 * h)
    return is_local | ((j // 32 + i // 48 + h) % 5 == 0) & (i > 20)


def _dense(predicate, *extents):
    return np.asarray(predicate(*np.ix_(*(np.arange(x) for x in extents)))) & np.ones(extents, bool)


@pytest.mark.parametrize(
    ("batch", "heads", "T", "S", "size"),
    [
        (2, 3, 100, 170, 32),
        (None, None, 64, 130, 16),
        (2, None, 5, 33, 128),
        (None, 3, 129, 96, 48),
    ],
)
def test_a_block_mask_is_its_predicate(batch, heads, T, S, size):
    mask = jax_gluon.block_mask(_sees, T, S, batch=batch, heads=heads, block_size=size)
    expected = _dense(_sees, batch or 1, heads or 1, T, S)
    np.testing.assert_array_equal(mask.to_dense(), expected)
    assert mask.shape == expected.shape
    # As few tiles as there are blocks that are neither empty nor full.
    padding = [(0, 0), (0, 0), (0, -T % size), (0, -S % size)]
    blocks = np.pad(expected, padding, mode="edge")
    blocks = blocks.reshape(*expected.shape[:2], -(-T // size), size, -(-S // size), size)
    mean = blocks.mean((3, 5))
    assert mask.tiles.shape[1] == max(((mean > 0) & (mean < 1)).sum(), 1)
    inside = jax.jit(
        lambda: jax_gluon.block_mask(_sees, T, S, batch=batch, heads=heads, block_size=size)
    )()
    np.testing.assert_array_equal(inside.index, mask.index)
    np.testing.assert_array_equal(inside.to_dense(), expected)


def test_a_predicate_may_read_arrays_and_is_read_anew_each_time():
    ids = np.repeat([0, 1, 2], [40, 37, 23])

    def is_same(b, h, i, j):
        return jnp.asarray(ids)[i] == jnp.asarray(ids)[j]

    first = jax_gluon.block_mask(is_same, 100, 100, block_size=16)
    np.testing.assert_array_equal(first.to_dense()[0, 0], ids[:, None] == ids)
    ids = ids[::-1]
    second = jax_gluon.block_mask(is_same, 100, 100, block_size=16)
    np.testing.assert_array_equal(second.to_dense()[0, 0], ids[:, None] == ids)


def test_no_array_of_all_rows_and_keys_is_made():
    blocks = _Blocks(Checker("block_mask"), lambda b, h, i, j: j <= i, (1, 1), (8192, 8192), 128)
    compiled = jax.jit(lambda: blocks.index()).lower().compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8192**2 / 8


@pytest.mark.parametrize(
    ("implementation", "quantization"), [("cpu", None), ("cpu", "int8"), ("xla", None)]
)
@pytest.mark.parametrize(
    ("batch", "heads", "T", "S", "keywords"),
    [
        (2, 4, 150, 290, {}),
        (None, None, 300, 300, dict(is_causal=True, local_window_size=(140, 0))),
        (None, 4, 3, 700, {}),  # decoding
        (2, None, 70, 50, {}),  # few keys
        (
            2, 4, 130, 290,
            dict(
                query_segment_ids=np.arange(130) // 75, key_value_segment_ids=np.arange(290) // 160,
                key_value_seq_lengths=np.array([290, 221]), sinks=np.ones(4, np.float32),
                logits_soft_cap=5.0,
            ),
        ),
    ],
    ids=["heads", "shared", "decode", "small", "everything"],
)  # fmt: skip
def test_attention_is_that_of_the_array(implementation, quantization, batch, heads, T, S, keywords):
    mask = jax_gluon.block_mask(_sees, T, S, batch=batch, heads=heads, block_size=48)
    arrays, _, d_out, d_log_sum_exp = cases.operands(dict(T=T, S=S, H=16, V=16))
    # What the softmax of no row sees, a full block of it.
    key, value = (np.array(x) for x in arrays[1:])
    unseen = ~_dense(_sees, batch or 1, heads or 1, T, S).any((0, 1, 2))
    key[:, unseen], value[:, unseen] = np.nan, np.inf

    @jax.jit
    def run(mask, *x):
        def attention(*x):
            return jax_gluon.attention_with_log_sum_exp(
                *x, mask=mask, **keywords, implementation=implementation, quantization=quantization
            )

        results, pullback = jax.vjp(attention, *x)
        empty = jnp.isinf(results[1])
        return *results, *pullback((d_out, jnp.where(empty, 0, d_log_sum_exp)))

    operands = (arrays[0], key, value)
    for x, y in zip(run(mask, *operands), run(mask.to_dense(), *operands), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "heads"), [(2, None), (None, 2)])
def test_attention_on_metal_is_that_of_the_array(batch, heads, require):
    require("metal")
    mask = jax_gluon.block_mask(_sees, 24, 70, batch=batch, heads=heads, block_size=16)
    arrays, *_ = cases.operands(dict(T=24, S=70, N=2, K=1, H=16, V=16))
    found, expected = (
        jax_gluon.dot_product_attention(*arrays, mask=x, implementation="metal")
        for x in (mask, mask.to_dense())
    )
    np.testing.assert_array_equal(found, expected)


def test_the_oracle_agrees(oracle, relative_error):
    mask = jax_gluon.block_mask(_sees, 200, 330, batch=2, heads=4, block_size=64)
    arrays, _, d_out, _ = cases.operands(dict(T=200, S=330, H=16, V=16))
    exact = oracle(*arrays, mask=_dense(_sees, 2, 4, 200, 330), d_out=d_out)
    for function in (jax_gluon.dot_product_attention, jax_gluon.reference.dot_product_attention):

        @jax.jit
        def run(d_out, *arrays, f=function):
            out, pullback = jax.vjp(lambda *operands: f(*operands, mask=mask), *arrays)
            return out, *pullback(d_out)

        out, *gradients = run(d_out, *arrays)
        assert relative_error(out, exact.out) <= 2e-6
        for x, y in zip(gradients, exact[2:5], strict=True):
            assert relative_error(x, y) <= 3e-6


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)])
def test_vmap_maps_operands_masks_or_both(implementation, axes):
    shift = jnp.arange(2)
    masks = jax.vmap(
        lambda s: jax_gluon.block_mask(lambda b, h, i, j: j * s < i + s, 70, 90, block_size=32)
    )(shift)
    x = np.random.default_rng(0).standard_normal((2, 1, 90, 2, 16), np.float32)
    query, key = jnp.asarray(x[:, :, :70]), jnp.asarray(x)

    def attention(query, mask):
        return jax_gluon.dot_product_attention(
            query, key[0], key[0], mask=mask, implementation=implementation
        )

    chosen = (query if axes[0] == 0 else query[0], masks)
    if axes[1] is None:
        chosen = (query, jax.tree.map(lambda leaf: leaf[1], masks))
    found = jax.vmap(attention, axes)(*chosen)
    for i in range(2):
        x, one = (
            leaf if axis is None else jax.tree.map(lambda y, i=i: y[i], leaf)
            for leaf, axis in zip(chosen, axes, strict=True)
        )
        expected = attention(x, one.to_dense())
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-5)


def test_a_mask_is_reused_in_a_scan_and_in_remat():
    mask = jax_gluon.block_mask(_sees, 96, 96, heads=2, block_size=32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 96, 2, 16), np.float32))

    def loss(x, mask):
        @jax.checkpoint
        def layer(x, _):
            return x + jax_gluon.dot_product_attention(x, x, x, mask=mask), None

        return jnp.sum(jax.lax.scan(layer, x, None, 3)[0] ** 2)

    found = jax.jit(jax.grad(loss))(x, mask)
    np.testing.assert_allclose(found, jax.grad(loss)(x, mask.to_dense()), rtol=1e-4, atol=1e-4)


def test_explain_takes_a_block_mask():
    mask = jax_gluon.block_mask(_sees, 96, 96)
    x = jnp.zeros((1, 96, 2, 16))
    dense = jax_gluon.explain(x, x, x, mask=mask.to_dense())
    assert jax_gluon.explain(x, x, x, mask=mask) == dense


@pytest.mark.parametrize(
    ("error", "text", "arguments", "keywords"),
    [
        (TypeError, r"mask_mod\(...\) is of dtype int32; allowed: bool", (lambda *x: x[0],), {}),
        (ValueError, r"mask_mod\(...\) is of shape \[3\]", (lambda *x: jnp.ones(3, bool),), {}),
        (TypeError, "mask_mod is a int; allowed: a function", (3,), {}),
        (ValueError, "block_size is 24; allowed: a multiple of 16", (_sees,), dict(block_size=24)),
        (ValueError, "heads is 0; allowed: None, or an int", (_sees,), dict(heads=0)),
    ],
)  # fmt: skip
def test_what_can_be_no_block_mask_is_refused(error, text, arguments, keywords):
    with pytest.raises(error, match=f"^jax_gluon.block_mask: {text}"):
        jax_gluon.block_mask(*arguments, 64, 64, **keywords)
    if not keywords:
        with pytest.raises(ValueError, match="query_length is 0; allowed: an int of at least 1"):
            jax_gluon.block_mask(_sees, 0, 64)


def test_a_block_mask_of_other_lengths_or_heads_is_refused():
    x = jnp.zeros((2, 64, 4, 8))
    for mask in (
        jax_gluon.block_mask(_sees, 64, 65),
        jax_gluon.block_mask(_sees, 64, 64, heads=2),
        jax_gluon.block_mask(_sees, 64, 64, batch=3),
    ):
        text = r"mask is a BlockMask of \[.*; allowed: one of .*\[2, 4, 64, 64\]"
        with pytest.raises(ValueError, match=text):
            jax_gluon.dot_product_attention(x, x, x, mask=mask)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_every_derivative_takes_a_block_mask(implementation):
    mask = jax_gluon.block_mask(_sees, 60, 90, heads=2, block_size=32)
    rng = np.random.default_rng(0)
    draw = lambda T: jnp.asarray(rng.standard_normal((1, T, 2, 16), np.float32))  # noqa: E731
    point, tangents = ((draw(60), draw(90), draw(90)) for _ in range(2))

    @jax.jit
    def run(mask):
        def attention(*x):
            return jax_gluon.dot_product_attention(
                *x, mask=mask, implementation=implementation, differentiation="any"
            )

        def gradient(*x):
            return jax.grad(lambda *y: jnp.sum(jnp.sin(attention(*y))))(*x)

        return jax.jvp(attention, point, tangents), jax.jvp(gradient, point, tangents)

    found, expected = (jax.tree.leaves(run(x)) for x in (mask, mask.to_dense()))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
