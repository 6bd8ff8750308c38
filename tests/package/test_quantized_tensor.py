"""`QuantizedTensor` as a pytree and as an array, and what bad formats get."""

import dataclasses
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import AttentionQuantization, QuantSpec

MINIMUM = dict(symmetric=False, float_minimum=True)
SPECS = {
    "int8": QuantSpec(center=True),
    "tensor": QuantSpec(granularity="tensor"),
    "channel": QuantSpec(granularity="channel", symmetric=False),
    "int4": QuantSpec(4, granularity="channel_block", block_size=8, **MINIMUM),
    "powers": QuantSpec(
        4, granularity="channel_block", block_size=8, center=True, token_powers=True, **MINIMUM
    ),
    "group": QuantSpec(4, granularity="group", block_size=8, rotate=True, **MINIMUM),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(0).standard_normal((3, 32, 2, 24)), jnp.float32)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


@every_spec
def test_array_like_properties(spec, x):
    quantized = jax_gluon.quantize(x.astype(jnp.bfloat16), spec)
    assert quantized.shape == x.shape
    assert quantized.ndim == 4
    assert quantized.dtype == jnp.bfloat16
    assert quantized.dequantize().dtype == jnp.bfloat16
    assert quantized.dequantize(jnp.float32).dtype == jnp.float32
    assert quantized.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))
    assert quantized.nbytes <= x.nbytes / (2 if spec.bits == 8 else 3)


@every_spec
def test_slices_along_batch_and_tokens(spec, x):
    quantized = jax_gluon.quantize(x, spec)
    whole = np.asarray(quantized.dequantize())
    indices = (
        1, slice(1, 3), (slice(None), slice(8, 24)), (-1, slice(16, None)), (2, slice(0, 8)),
        (..., slice(None), slice(None)), (slice(0, 2), slice(24, 40)), (0, slice(8, 8)),
    )  # fmt: skip

    @jax.jit
    def every(quantized):
        parts = [quantized[index] for index in indices]
        return parts, [part.dequantize() for part in parts]

    for index, part, restored in zip(indices, *every(quantized), strict=True):
        assert part.shape == whole[index].shape
        np.testing.assert_allclose(restored, whole[index], atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "index", "complaint"),
    [
        (
            "int4",
            (0, slice(4, 8)),
            "index of tokens is 4 to 8 of 32; allowed: whole blocks of 8 tokens",
        ),
        (
            "int4",
            (0, slice(0, 9)),
            "index of tokens is 0 to 9 of 32; allowed: whole blocks of 8 tokens",
        ),
        ("int8", (0, slice(0, 9, 2)), "allowed: a slice of step 1"),
        ("int8", (0, 3), "allowed: a slice of step 1"),
        ("int8", (0, slice(None), 1), "allowed: ints and slices of leading axes and tokens"),
        ("int8", (0,) * 5, "allowed: ints and slices of leading axes and tokens"),
    ],
)
def test_slices_that_would_cut_a_block(spec, index, complaint, x):
    with pytest.raises(IndexError, match=re.escape(complaint)):
        jax_gluon.quantize(x, SPECS[spec])[index]


@every_spec
def test_jit_scan_tree_and_donation(spec, x):
    quantized = jax_gluon.quantize(x, spec)
    assert_equal(jax.jit(lambda tensor: tensor)(quantized), quantized)
    assert_equal(jax.tree.map(lambda leaf: leaf, quantized), quantized)
    assert_equal(jax.device_put(quantized), quantized)
    leaves, structure = jax.tree.flatten(quantized)
    assert_equal(jax.tree.unflatten(structure, leaves), quantized)
    _, rows = jax.lax.scan(lambda carry, part: (carry, part.dequantize()), 0, quantized)
    np.testing.assert_allclose(rows, quantized.dequantize(), atol=1e-6)
    mapped = jax.vmap(lambda part: part.dequantize())(quantized)
    np.testing.assert_allclose(mapped, quantized.dequantize(), atol=1e-6)
    expected = np.asarray(quantized.dequantize())
    donated = jax.jit(lambda tensor: tensor, donate_argnums=0)(quantized)
    np.testing.assert_array_equal(donated.dequantize(), expected)
    shapes = jax.eval_shape(lambda x: jax_gluon.quantize(x, spec), x)
    assert jax.tree.structure(shapes) == jax.tree.structure(donated)


@every_spec
def test_pickle_and_hashable_structure(spec, x):
    quantized = jax_gluon.quantize(x, spec)
    assert_equal(pickle.loads(pickle.dumps(quantized)), quantized)
    assert hash(jax.tree.structure(quantized)) == hash(jax.tree.structure(quantized))


@every_spec
def test_orbax_checkpoint(spec, x, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    quantized = jax_gluon.quantize(x, spec)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tensor", {"cache": quantized})
        checkpointer.wait_until_finished()
        template = jax.tree.map(jnp.zeros_like, {"cache": quantized})
        restored = checkpointer.restore(tmp_path / "tensor", template)
    assert_equal(restored["cache"], quantized)


BAD_SPECS = {
    "bits": (dict(bits=3), ValueError, "bits is 3; allowed: 4 or 8"),
    "bits_type": (dict(bits=8.0), TypeError, "bits is 8.0; allowed: 4 or 8"),
    "bits_bool": (dict(bits=True), TypeError, "bits is True; allowed: 4 or 8"),
    "block_size": (dict(block_size=0), ValueError, "block_size is 0; allowed: an int of at least"),
    "block_size_float": (dict(block_size=32.0), TypeError, "block_size is 32.0; allowed: an int"),
    "block_size_bool": (dict(block_size=True), TypeError, "block_size is True; allowed: an int"),
    "granularity": (dict(granularity="column"), ValueError, "granularity is 'column'; allowed: te"),
    "granularity_type": (dict(granularity=None), ValueError, "granularity is None; allowed: ten"),
    "contradiction": (
        dict(symmetric=True, float_minimum=True), ValueError,
        "float_minimum is True; allowed: False where symmetric is True",
    ),
    "symmetric": (dict(symmetric=1), TypeError, "symmetric is 1; allowed: True or False"),
    "center": (dict(center="yes"), TypeError, "center is 'yes'; allowed: True or False"),
    "rotate": (dict(rotate=None), TypeError, "rotate is None; allowed: True or False"),
    "token_powers": (
        dict(granularity="channel_block", token_powers=True), ValueError,
        "token_powers is True; allowed: False unless granularity is channel_block and center",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SPECS)
def test_bad_spec(case):
    fields, error, complaint = BAD_SPECS[case]
    with pytest.raises(error, match=rf"jax_gluon\.QuantSpec: {re.escape(complaint)}"):
        QuantSpec(**fields)


def test_bad_attention_quantization():
    with pytest.raises(TypeError, match=r"AttentionQuantization: key is a str; allowed: None or"):
        AttentionQuantization(key="int8")


@pytest.mark.parametrize(
    ("x", "spec", "keywords", "error", "complaint"),
    [
        (np.ones((2, 3)), QuantSpec(), {}, ValueError, "x is of rank 2; allowed: rank 3 or 4"),
        (np.ones((2, 3, 4), int), QuantSpec(), {}, TypeError, "x is of dtype int"),
        (np.ones((2, 3, 0)), QuantSpec(), {}, ValueError, "x is of head dim 0"),
        (np.ones((2, 3, 5)), QuantSpec(4), {}, ValueError, "x is of head dim 5; allowed: an even"),
        (np.ones((2, 3, 4)), "int8", {}, TypeError, "spec is a str; allowed: a QuantSpec"),
        (
            np.ones((2, 3, 4)), QuantSpec(), {"implementation": "gpu"}, ValueError,
            'implementation is "gpu"; allowed: None, "cpu", "metal", "xla"',
        ),
        (
            np.ones((2, 3, 4, 4), np.float32), QuantSpec(),
            {"lengths": np.ones(3, np.int32)}, ValueError, "lengths is of shape [3]; allowed",
        ),
        (
            np.ones((2, 3, 4, 4), np.float32), QuantSpec(),
            {"lengths": np.ones(2, np.float32)}, TypeError, "lengths is of dtype float32; allowed",
        ),
    ],
)  # fmt: skip
def test_bad_argument_of_quantize(x, spec, keywords, error, complaint):
    with pytest.raises(error, match=rf"jax_gluon\.quantize: {re.escape(complaint)}"):
        jax_gluon.quantize(x, spec, **keywords)


def test_quantizing_codes(x):
    quantized = jax_gluon.quantize(x, QuantSpec())
    with pytest.raises(TypeError, match="x is a QuantizedTensor; allowed: a float array"):
        jax_gluon.quantize(quantized, QuantSpec())


@pytest.mark.parametrize(
    ("part", "change", "complaint"),
    [
        ("scale", lambda leaf: leaf[:, :-1], "scale is float32[3, 31, 2, 1], expected float32[3"),
        ("scale", lambda leaf: leaf.astype(jnp.bfloat16), "scale is bfloat16[3, 32, 2, 1], expec"),
        ("data", lambda leaf: leaf[..., :-1], "data is int8[3, 32, 2, 23], expected int8[3"),
        ("data", lambda leaf: leaf.astype(jnp.int32), "data is int32[3, 32, 2, 24], expected"),
        ("center", lambda leaf: None, "center is missing"),
        ("minimum", lambda leaf: jnp.zeros((3, 32, 2, 1)), "minimum is set"),
    ],
)
@pytest.mark.parametrize("operand", ["query", "key", "value"])
def test_parts_that_disagree(operand, part, change, complaint, x):
    tensor = jax_gluon.quantize(x, SPECS["int8"])
    tensor = dataclasses.replace(tensor, **{part: change(getattr(tensor, part))})
    arguments = dict.fromkeys(("query", "key", "value"), x) | {operand: tensor}
    pattern = rf"{operand} is a QuantizedTensor whose {re.escape(complaint)}"
    with pytest.raises(ValueError, match=pattern):
        jax_gluon.dot_product_attention(**arguments)


def test_odd_head_dim_for_4_bits():
    x = jnp.ones((1, 4, 2, 7))
    with pytest.raises(ValueError, match=r"key is of head dim 7; allowed: an even head dim"):
        jax_gluon.dot_product_attention(x, x, x, quantization="int4")


def test_as_data():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3, 4)), jnp.float32)
    q = jax_gluon.quantize(x, jax_gluon.QuantSpec(), implementation="xla")
    np.testing.assert_array_equal(np.asarray(q), q.dequantize())
    for function in (jnp.asarray, lambda q: jax.nn.dot_product_attention(q, q, q)):
        with pytest.raises(TypeError, match="dequantize"):
            function(q)
    copy = jax.tree.map(jnp.copy, q)
    assert q == q
    assert q != copy
    assert "(2, 5, 3, 4)" in repr(q)
    assert len(repr(q)) < 300
    assert len(repr(jax_gluon.QuantizedKVCache.create(2, 32, 3, 4))) < 600
