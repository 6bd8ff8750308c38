"""`jax.export` with symbolic batches and lengths: forward and backward, every argument, a file."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from tests.support.arrays import placed

export = pytest.importorskip("jax.export")
N, K, H = 4, 2, 16
SIZES = [(1, 5, 7), (2, 70, 300)]  # batch, queries, keys: less than a block of XLA's, and more

# Arrays of a batch of b, t queries and s keys.
ARRAYS = {
    "bias": (lambda b, t, s: (b, N, t, s), jnp.float32),
    "mask": (lambda b, t, s: (b, 1, t, s), jnp.bool_),
    "key_value_mask": (lambda b, t, s: (b, s), jnp.bool_),
    "query_seq_lengths": (lambda b, t, s: (b,), jnp.int32),
    "key_value_seq_lengths": (lambda b, t, s: (b,), jnp.int32),
    "query_offset": (lambda b, t, s: (b,), jnp.int32),
    "query_segment_ids": (lambda b, t, s: (b, t), jnp.int32),
    "key_value_segment_ids": (lambda b, t, s: (b, s), jnp.int32),
    "query_positions": (lambda b, t, s: (b, t), jnp.int32),
    "key_value_positions": (lambda b, t, s: (b, s), jnp.int32),
    "sinks": (lambda b, t, s: (N,), jnp.float32),
    "scale": (lambda b, t, s: (), jnp.float32),
}
CASES = {
    "causal_int8": (dict(is_causal=True, quantization="int8"), ()),
    "lengths_int4": (
        dict(quantization="int4", is_causal=True),
        ("query_seq_lengths", "key_value_seq_lengths", "query_offset"),
    ),
    "segments": (
        dict(local_window_size=(9, 2), logits_soft_cap=3.0),
        ("query_segment_ids", "key_value_segment_ids", "key_value_mask", "sinks", "scale"),
    ),
    "positions": (
        dict(is_causal=True, dropout_rate=0.3, dropout_rng=jax.random.key(0)),
        ("query_positions", "key_value_positions"),
    ),
    "logits": (dict(local_window_size=(9, 2)), ("bias", "mask")),
}  # fmt: skip


def _draw(shape, dtype, rng):
    if dtype == jnp.float32:
        return placed(rng.standard_normal(shape), dtype)
    return placed(rng.integers(0, 4, shape), dtype)


@pytest.mark.parametrize(
    ("case", "implementation"),
    [*((case, None) for case in CASES), ("causal_int8", "xla"), ("segments", "xla")],
)
def test_every_size_is_the_direct_call(case, implementation, require, relative_error):
    """The output to the bit by default; XLA's operations for gradients may round unlike."""
    require(implementation or "cpu")
    static, names = CASES[case]

    def results(q, k, v, *arrays):
        given = dict(zip(names, arrays, strict=True))
        bias = given.pop("bias", None)

        def attention(q, k, v, bias):
            return jax_gluon.dot_product_attention(
                q, k, v, bias, implementation=implementation, **static, **given
            )

        out, pullback = jax.vjp(attention, q, k, v, bias)
        return jax.tree.leaves((out, pullback(jnp.cos(out))))

    def shapes(b, t, s):
        heads = [(b, t, N, H), (b, s, K, H), (b, s, K, H)]
        listed = [(ARRAYS[name][0](b, t, s), ARRAYS[name][1]) for name in names]
        return [(shape, jnp.float32) for shape in heads] + listed

    symbolic = [jax.ShapeDtypeStruct(*x) for x in shapes(*export.symbolic_shape("b, t, s"))]
    exported = export.export(jax.jit(results), disabled_checks=jax_gluon.export_checks())(*symbolic)
    rng = np.random.default_rng(1)
    direct = jax.jit(results)
    for size in SIZES:
        arrays = [_draw(*x, rng) for x in shapes(*size)]
        pairs = list(zip(exported.call(*arrays), direct(*arrays), strict=True))
        if implementation is None:
            np.testing.assert_array_equal(*pairs[0])
        for found, expected in pairs:
            # XLA: blocks of other sizes.
            bound = 3e-6 if implementation == "xla" else 1e-6
            assert relative_error(found, expected) <= bound


LOAD = """\
import sys, numpy as np, jax, jax.numpy as jnp
if sys.argv[2] == "with": import jax_gluon
from jax import export
loaded = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
def attention(q, k, v):
    return jax_gluon.dot_product_attention(q, k, v, is_causal=True, quantization="int8")
def results(function):
    return jax.jit(jax.value_and_grad(lambda *x: (function(*x) ** 2).sum(), (0, 1, 2)))
for b, t in ((1, 7), (2, 90)):
    x = [jax.random.normal(jax.random.key(n), (b, t, n, 16)) for n in (4, 2, 2)]
    found, right = results(loaded.call)(*x), results(attention)(*x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, right)
print("equal")
"""


def test_another_process_loads_what_was_saved(require, tmp_path):
    """With its gradient; without jax_gluon the error names the custom call."""
    require("cpu")
    pytest.importorskip("flatbuffers")
    b, t = export.symbolic_shape("b, t")
    shapes = [jax.ShapeDtypeStruct((b, t, n, 16), jnp.float32) for n in (N, K, K)]

    def attention(q, k, v):
        return jax_gluon.dot_product_attention(q, k, v, is_causal=True, quantization="int8")

    exported = export.export(
        jax.jit(attention), platforms=("cpu", "tpu"), disabled_checks=jax_gluon.export_checks()
    )(*shapes)
    path = tmp_path / "attention"
    path.write_bytes(exported.serialize(vjp_order=1))

    def load(how):
        return subprocess.run(
            [sys.executable, "-c", LOAD, str(path), how],
            cwd=Path(jax_gluon.__file__).parents[1],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    loaded = load("with")
    assert loaded.stdout.strip() == "equal", loaded.stderr
    assert "No FFI handler registered for jax_gluon." in load("without").stderr


def test_a_cache_of_any_batch(require):
    """Appended to and attended by exported functions."""
    require("cpu")
    b, t = export.symbolic_shape("b, t")
    empty = jax_gluon.QuantizedKVCache.create(3, 64, K, H)
    symbolic = jax.tree.map(lambda x: jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype), empty)
    token = jax.ShapeDtypeStruct((b, t, K, H), jnp.float32)
    query = jax.ShapeDtypeStruct((b, 1, N, H), jnp.float32)
    checks = jax_gluon.export_checks()
    append = export.export(jax.jit(lambda x, k, v: x.append(k, v)), disabled_checks=checks)
    attend = export.export(jax.jit(lambda x, q: x.attention(q)), disabled_checks=checks)
    k, v = (jax.random.normal(jax.random.key(i), (3, 9, K, H)) for i in range(2))
    q = jax.random.normal(jax.random.key(2), (3, 1, N, H))
    found = attend(symbolic, query).call(append(symbolic, token, token).call(empty, k, v), q)
    np.testing.assert_array_equal(found, empty.append(k, v).attention(q))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_other_platforms_have_no_custom_call_of_the_plugin(platform, quantization):
    """Forward and gradient, without `disabled_checks`: JAX would refuse the calls."""

    def loss(q, k, v, bias):
        out = jax_gluon.dot_product_attention(
            q, k, v, bias, is_causal=True, quantization=quantization
        )
        return jnp.sum(out * out)

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
    query, key = (jax.ShapeDtypeStruct((2, 70, heads, H), jnp.bfloat16) for heads in (N, K))
    bias = jax.ShapeDtypeStruct((1, N, 70, 70), jnp.float32)
    exported = export.export(gradient, platforms=(platform,))(query, key, key, bias)
    assert exported.platforms == (platform,)
    assert "jax_gluon." not in exported.mlir_module()
