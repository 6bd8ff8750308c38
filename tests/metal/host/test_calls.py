"""Metal from inside `jax.jit`, on the software device: what the kernels' own tests do not see."""

from __future__ import annotations

import functools
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import QuantSpec, _lowering
from jax_gluon._quantization.formats import PRESETS

ROOT = Path(__file__).resolve().parents[3]
plugin = pytest.importorskip("jax_gluon._plugin")


def draw(seed, *shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def operands(seed=0, B=2, T=40, S=70, N=4, K=2, H=24, V=16, dtype=jnp.float32):
    return draw(seed, (B, T, N, H), (B, S, K, H), (B, S, K, V), dtype=dtype)


def gradients(implementation, **keywords):
    @jax.jit
    def function(*x):
        def loss(*x):
            out = jax_gluon.dot_product_attention(*x, implementation=implementation, **keywords)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*x)

    return function


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("T", [40, 2], ids=["blocks", "decode"])
def test_as_on_the_cpu(relative_error, quantization, T):
    x = operands(T=T, S=600 if T == 2 else 70)
    keywords = dict(quantization=quantization, logits_soft_cap=5.0)
    ((_, out), grads) = gradients("metal", **keywords)(*x)
    ((_, cpu_out), cpu_grads) = gradients("cpu", **keywords)(*x)
    # The CPU's probabilities have 8 bits where operands are quantized.
    bar = 3e-6 if quantization is None else 1.3e-2
    assert relative_error(out, cpu_out) <= bar
    for actual, expected in zip(grads, cpu_grads, strict=True):
        assert relative_error(actual, expected) <= 2 * bar


@pytest.mark.parametrize("granularity", ["tensor", "head", "row", "block", "group", "channel"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_as_on_the_cpu(bits, granularity):
    spec = QuantSpec(bits=bits, granularity=granularity, symmetric=bits == 8)
    (x,) = draw(1, (2, 50, 3, 32))
    actual = jax_gluon.quantize(x, spec, implementation="metal")
    expected = jax_gluon.quantize(x, spec, implementation="cpu")
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_centered_and_rotated_codes():
    (x,) = draw(2, (2, 50, 3, 32))
    lengths = np.array([50, 7], np.int32)
    for spec in (PRESETS["int8"].key, PRESETS["int4"].key, QuantSpec(rotate=True)):
        assert spec is not None
        keywords = dict(lengths=lengths if spec.center else None)
        metal = jax_gluon.quantize(x, spec, **keywords, implementation="metal")
        cpu = jax_gluon.quantize(x, spec, **keywords, implementation="cpu")
        difference = metal.dequantize() - cpu.dequantize()
        # Sums in another order move a mean by a rounding, and a code by one at most.
        step = np.abs(np.asarray(cpu.scale, np.float32)).max()
        assert float(jnp.abs(difference).max()) <= 1.01 * step
        assert float(jnp.mean(jnp.abs(difference) > 1e-5)) < 0.01


@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_codes_are_made_in_the_forward_call(preset):
    """Those of the quantizer, and so is what becomes of them."""
    x = operands(T=33, S=65)
    specs = PRESETS[preset]
    lengths = dict(query_seq_lengths=np.array([33, 9]), key_value_seq_lengths=np.array([40, 65]))
    codes = [
        jax_gluon.quantize(
            array,
            spec,
            lengths=lengths[f"{name}_seq_lengths"],
            implementation="metal",
        )
        for array, spec, name in zip(
            x, (specs.query, specs.key, specs.value), ("query", "key_value", "key_value"),
            strict=True,
        )
    ]  # fmt: skip
    keywords = dict(**lengths, implementation="metal")
    made = jax_gluon.dot_product_attention(*x, **keywords, quantization=preset)
    given = jax_gluon.dot_product_attention(*codes, **keywords)
    np.testing.assert_array_equal(made, given)


def test_vmap_quantizes_what_it_does_not_map(relative_error):
    query, key, value = draw(7, (3, 2, 20, 4, 16), (2, 30, 2, 16), (3, 2, 30, 2, 8))

    def function(implementation):
        def loss(query, key, value):
            attend = functools.partial(
                jax_gluon.dot_product_attention, quantization="int8", implementation=implementation
            )
            return jnp.sum(jax.vmap(attend, in_axes=(0, None, 0))(query, key, value) ** 2)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value)

    for actual, expected in zip(function("metal"), function("cpu"), strict=True):
        assert relative_error(actual, expected) <= 2e-2


@pytest.mark.parametrize("has_lengths", [False, True])
def test_vmap_quantizes_each_operand_once(monkeypatch, relative_error, has_lengths):
    """Codes, scales, zero points and means are those of every entry; backward reads them too."""
    monkeypatch.setenv("JAX_GLUON_POISON", "1")
    query, key, value = draw(7, (3, 2, 20, 4, 16), (2, 30, 2, 16), (2, 2, 30, 2, 8))
    # Means of keys and values are of their lengths, which are mapped where there are any.
    lengths = jnp.array([[30, 7], [12, 30], [30, 7]]) if has_lengths else None
    spec = QuantSpec(symmetric=False, granularity="head", center=True)
    specs = jax_gluon.AttentionQuantization(spec, QuantSpec(4, center=True), spec)

    def attend(query, key, value, lengths):
        return jax_gluon.dot_product_attention(
            query, key, value, key_value_seq_lengths=lengths,
            quantization=specs, implementation="metal",
        )  # fmt: skip

    def mapped(inner, outer):
        def loss(query, key, value):
            function = jax.vmap(attend, in_axes=(*inner, None if lengths is None else 0))
            out = jax.vmap(function, in_axes=(*outer, None))(query, key, value, lengths)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

    def run(function, *x):
        jax_gluon.debug.metal_counters()
        (_, out), gradients = jax.block_until_ready(function(*x))
        groups: dict[str, int] = {}
        for each in jax_gluon.debug.metal_counters():
            groups[each["kernel"]] = groups.get(each["kernel"], 0) + each["threads"] // 128
        return out, gradients, groups

    # The query is mapped along the inner axis, the value along the outer one, the key along none.
    out, gradients, groups = run(mapped((0, None, None), (None, None, 0)), query, key, value)
    every = (
        jnp.broadcast_to(query, (2, *query.shape)),
        jnp.broadcast_to(key, (2, 3, *key.shape)),
        jnp.broadcast_to(value[:, None], (2, 3, *value.shape[1:])),
    )
    wanted, summed, _ = run(mapped((0, 0, 0), (0, 0, 0)), *every)
    np.testing.assert_array_equal(out, wanted)
    for found, axes, gradient in zip(gradients, (0, (0, 1), 1), summed, strict=True):
        assert relative_error(found, gradient.sum(axes)) <= 1e-6
    queries, keys, values = (3, 3, 6) if has_lengths else (3, 1, 2)
    # Threadgroups: of heads and batch; of four tokens each besides.
    assert groups["quantize_center"] == 4 * 2 * queries + 2 * 2 * keys + 2 * 2 * values
    assert groups["quantize_blocks"] == 8 * 2 * 2 * keys
    assert groups["quantize_codes"] == 5 * 4 * 2 * queries + 8 * 2 * 2 * values


def test_rotated_operands_are_quantized_before(relative_error):
    x = operands()
    rotated = QuantSpec(rotate=True)
    for specs in (
        jax_gluon.AttentionQuantization(rotated, rotated, QuantSpec()),
        jax_gluon.AttentionQuantization(None, rotated, rotated),
    ):
        (_, out), grads = gradients("metal", quantization=specs)(*x)
        (_, cpu_out), cpu_grads = gradients("cpu", quantization=specs)(*x)
        assert relative_error(out, cpu_out) <= 1.3e-2
        for actual, expected in zip(grads, cpu_grads, strict=True):
            assert relative_error(actual, expected) <= 2e-2


def test_vmap_over_every_operand(relative_error):
    query, key, value = draw(3, (3, 2, 20, 4, 16), (2, 30, 2, 16), (3, 2, 30, 2, 8))
    (bias,) = draw(4, (3, 1, 4, 20, 30))

    def function(implementation):
        def attention(query, value, bias):
            return jax_gluon.dot_product_attention(
                query, key, value, bias, implementation=implementation
            )

        def loss(*x):
            return jnp.sum(jax.vmap(attention)(*x) ** 2)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, value, bias)

    for actual, expected in zip(function("metal"), function("cpu"), strict=True):
        assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("gain", [1, 30, 100])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_gradients_as_near_as_those_of_jax(oracle, relative_error, dtype, gain):
    query, key, value = operands(T=64, S=64, K=4, H=64, V=64, dtype=dtype)
    query *= gain
    (bias,) = draw(5, (1, 4, 1, 64), dtype=dtype)
    (d_out,) = draw(6, query.shape, dtype=dtype)
    x = [np.asarray(each, np.float64) for each in (query, key, value, bias)]
    for is_causal in (False, True):
        wanted = oracle(*x, is_causal=is_causal, d_out=np.asarray(d_out, np.float64))

        def gradients_of(function, is_causal=is_causal):
            attend = functools.partial(function, is_causal=is_causal)
            return jax.vjp(attend, query, key, value, bias)[1](d_out)

        plain = gradients_of(jax.nn.dot_product_attention)
        found = gradients_of(
            functools.partial(jax_gluon.dot_product_attention, implementation="metal")
        )
        names = ("d_query", "d_key", "d_value", "d_bias")
        for name, actual, usual in zip(names, found, plain, strict=True):
            expected = getattr(wanted, name)
            bound = 1.3 * relative_error(usual, expected)
            assert relative_error(actual, expected) <= bound, (name, is_causal)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8"])
def test_a_bias_equal_for_all_keys_has_no_gradient(kind):
    """Also after a vmap, and where there are no rows at all."""
    dtype = jnp.float32 if kind == "int8" else kind
    attend = functools.partial(
        jax_gluon.dot_product_attention,
        quantization="int8" if kind == "int8" else None,
        implementation="metal",
    )
    x = operands(T=33, dtype=dtype)

    def loss(bias, *x):
        return jnp.sum(jnp.sin(attend(*x, bias).astype(jnp.float32)))

    d_bias = jax.grad(loss)(jnp.ones((2, 4, 33, 1)), *x)
    assert float(jnp.abs(d_bias).max()) <= 1e-5
    split = [each[:, None] for each in x]
    d_bias = jax.vmap(jax.grad(loss))(jnp.ones((2, 1, 4, 33, 1)), *split)
    assert float(jnp.abs(d_bias).max()) <= 1e-5
    for sizes in (dict(T=0), dict(B=0), dict(S=0)):
        assert not np.any(jax.grad(loss)(jnp.ones((1, 4, 1, 1)), *operands(**sizes, dtype=dtype)))


def test_no_rows_and_no_keys():
    for sizes in (dict(T=0), dict(B=0), dict(S=0)):
        x = operands(**sizes)
        (_, out), grads = gradients("metal")(*x)
        assert out.shape == (*x[0].shape[:3], 16)
        assert not np.any(out)
        assert not any(np.any(grad) for grad in grads)


def test_from_many_threads():
    """Two shapes through one cache of pipelines; each thread gets its own results."""
    functions = {T: gradients("metal", is_causal=True) for T in (33, 65)}
    inputs = {(T, seed): operands(seed, T=T, S=T) for T in functions for seed in range(3)}
    expected = {
        key: np.asarray(gradients("cpu", is_causal=True)(*x)[0][1]) for key, x in inputs.items()
    }
    wrong = []

    def work(key):
        out = np.asarray(functions[key[0]](*inputs[key])[0][1])
        if not np.allclose(out, expected[key], atol=1e-5):
            wrong.append(key)

    threads = [threading.Thread(target=work, args=(key,)) for key in inputs for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_explain():
    x = operands()
    plan = jax_gluon.explain(*x, implementation="metal")
    assert plan.implementation == "metal"
    assert f'"{plugin.metal_device()[0]}"' in plan.reasons[0]
    # The software device is for those who ask for it.
    large = jax.ShapeDtypeStruct((8, 4096, 16, 128), jnp.float32)
    expected = "metal" if sys.platform == "darwin" else "cpu"
    assert jax_gluon.explain(large, large, large).implementation == expected


def test_head_dims_over_256_are_refused():
    with pytest.raises(ValueError, match=r'implementation is "metal" for a head dim of 257'):
        jax_gluon.dot_product_attention(*operands(H=257), implementation="metal")


def test_rows_over_512_are_not_quantized():
    (x,) = draw(8, (1, 4, 1, 514))
    with pytest.raises(ValueError, match="x is of head dim 514; allowed: at most 512 where impl"):
        jax_gluon.quantize(x, QuantSpec(), implementation="metal")
    widest = x[..., :512]
    metal, cpu = (
        jax_gluon.quantize(widest, QuantSpec(), implementation=i) for i in ("metal", "cpu")
    )
    np.testing.assert_array_equal(metal.data, cpu.data)


def test_the_plugin_refuses_rows_over_512():
    """Whoever goes round Python's own checks."""
    (x,) = draw(8, (1, 4, 1, 514))
    spec = QuantSpec()
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"the head dim is 514; the quantizer takes"
    ):
        jax.block_until_ready(_lowering.quantize(spec, "metal", x, None))


# --- Pinned arrays ---


def test_pinned_arrays_are_found():
    query, key, value = operands(T=3, S=300)
    attend = jax.jit(functools.partial(jax_gluon.dot_product_attention, implementation="metal"))
    expected = attend(query, key, value)
    with jax_gluon.pin({"key": key, "value": value}) as pin:
        assert pin.nbytes == key.nbytes + value.nbytes
        assert pin.uses == 0
        np.testing.assert_array_equal(attend(query, key, value), expected)
        assert pin.uses == 2
        np.testing.assert_array_equal(attend(query, key, value), expected)
        assert pin.uses == 4
        # Another array is not taken for it.
        other = np.asarray(attend(query, key + 1, value))
        assert pin.uses == 5
    np.testing.assert_array_equal(other, attend(query, key + 1, value))
    assert pin.uses == pin.nbytes == 0
    pin.release()
    np.testing.assert_array_equal(attend(query, key, value), expected)


def test_pinned_codes():
    query, key, value = operands(T=3, S=300)
    codes = [jax_gluon.quantize(x, QuantSpec(), implementation="metal") for x in (key, value)]
    attend = jax.jit(functools.partial(jax_gluon.dot_product_attention, implementation="metal"))
    expected = attend(query, *codes)
    with jax_gluon.pin(codes) as pin:
        np.testing.assert_array_equal(attend(query, *codes), expected)
        assert pin.uses == 4  # data and scales


def test_a_pinned_array_outlives_deletion_and_donation():
    query, key, value = operands(T=3, S=300)
    attend = jax.jit(functools.partial(jax_gluon.dot_product_attention, implementation="metal"))
    kept = np.array(key)
    with jax_gluon.pin([key, value]) as pin:
        moved = jax.jit(lambda x: x + 1, donate_argnums=0)(key)
        value.delete()
        junk = [jnp.full(key.shape, 7.0) for _ in range(20)]
        (view, _) = pin._views
        np.testing.assert_array_equal(view, kept)
        # What was made of the donated array is elsewhere, and read from there.
        fresh = jnp.asarray(np.ones_like(operands(T=3, S=300)[2]))
        expected = attend(query, jnp.asarray(kept + 1), fresh)
        np.testing.assert_array_equal(attend(query, moved, fresh), expected)
        del junk


def test_what_can_not_be_pinned():
    (x,) = draw(9, (4, 4))
    with pytest.raises(TypeError, match=r"jax_gluon.pin: tree\['a'\] is a ndarray; allowed: jax.A"):
        jax_gluon.pin({"a": np.zeros(3)})
    with pytest.raises(TypeError, match=r"Tracer; allowed: jax.Array, outside of jit"):
        jax.jit(jax_gluon.pin)(x)
    with jax_gluon.pin([x, jnp.zeros((0, 3))]) as pin:
        assert pin.nbytes == x.nbytes


def test_float64_is_refused(configure):
    with configure(jax_enable_x64=True):
        x = operands(dtype=jnp.float64)
        with pytest.raises(ValueError, match=r'implementation is "metal" for float64'):
            jax_gluon.dot_product_attention(*x, implementation="metal")


# --- In a process of its own ---

# What each of these programs prints is checked.
