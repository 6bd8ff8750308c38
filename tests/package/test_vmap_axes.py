"""vmap over any of the arguments, at any axis, once or twice: as a loop over the entries."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon

B, T, S, N, K, H = 2, 7, 9, 4, 2, 8

# Shape and dtype of each argument, and those that exclude each other.
ARGUMENTS = {
    "query": ((B, T, N, H), "f"), "key": ((B, S, K, H), "f"), "value": ((B, S, K, H), "f"),
    "bias": ((1, N, T, S), "f"), "mask": ((B, 1, T, S), "b"), "key_value_mask": ((B, S), "b"),
    "query_seq_lengths": ((B,), "i"), "key_value_seq_lengths": ((B,), "i"),
    "query_segment_ids": ((B, T), "i"), "key_value_segment_ids": ((B, S), "i"),
    "query_positions": ((B, T), "i"), "key_value_positions": ((S,), "i"),
    "query_offset": ((B,), "i"), "sinks": ((N,), "f"), "scale": ((N,), "f"),
}  # fmt: skip
TOGETHER = [
    ("bias",), ("mask",), ("key_value_mask",), ("query_seq_lengths", "key_value_seq_lengths"),
    ("query_segment_ids", "key_value_segment_ids"), ("query_positions", "key_value_positions"),
    ("query_offset",), ("sinks",), ("scale",),
]  # fmt: skip
LEVELS = {1: (3,), 2: (2, 3)}


def _draw(rng, shape, kind):
    if kind == "f":
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return jnp.asarray(rng.integers(0, 5, shape) > 1 if kind == "b" else rng.integers(0, 5, shape))


def _case(rng, levels):
    """Names of the arguments, where each is mapped at each level (None: not), and arrays."""
    chosen = {group for group in TOGETHER if rng.random() < 0.4}
    if ("query_positions", "key_value_positions") in chosen:
        chosen.discard(("query_offset",))
    names = [*list(ARGUMENTS)[:3], *itertools.chain(*(x for x in TOGETHER if x in chosen))]
    # One operand alone, all of them, or any.
    share = rng.choice([0.0, 0.5, 1.0])
    while True:
        is_mapped = rng.random((len(names), len(levels))) < share
        if share == 0.0:
            is_mapped[rng.integers(len(names))] = True
        if is_mapped.any(0).all():
            break
    axes, arrays = {}, {}
    for name, mapped in zip(names, is_mapped, strict=True):
        shape, kind = ARGUMENTS[name]
        array, axes[name] = _draw(rng, shape, kind), []
        for size, is_at_level in zip(levels[::-1], mapped[::-1], strict=True):
            axis = int(rng.integers(array.ndim + 1)) if is_at_level else None
            if axis is not None:
                array = jnp.stack([array] * size, axis)
                array = _draw(rng, array.shape, kind)
            axes[name].insert(0, axis)
        arrays[name] = array
    return names, axes, arrays


def _entry(array, axes, index):
    """The part of an argument that entry `index` of the mapped axes sees."""
    for axis, i in zip(axes, index, strict=True):
        array = array if axis is None else jnp.take(array, i, axis)
    return array


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("seed", range(6))
def test_vmap_is_a_loop(seed, quantization, implementation, relative_error):
    """Output, log-sum-exp and the gradients of all that has one."""
    if implementation != "cpu" and (quantization or seed > (1 if implementation == "xla" else 0)):
        pytest.skip("a few suffice")
    rng = np.random.default_rng([seed, 7])
    levels = LEVELS[1 + seed % 2]
    names, axes, arrays = _case(rng, levels)
    static = dict(is_causal=bool(rng.random() < 0.5), quantization=quantization)

    def results(*given):
        keywords = dict(zip(names, given, strict=True))
        floats = {name: keywords.pop(name) for name in names if ARGUMENTS[name][1] == "f"}

        def attention(floats):
            return jax_gluon.attention_with_log_sum_exp(
                **floats, **keywords, **static, implementation=implementation
            )

        (out, log_sum_exp), pullback = jax.vjp(attention, floats)
        finite = jnp.where(log_sum_exp == -jnp.inf, 0.0, log_sum_exp)
        return out, finite, pullback((jnp.cos(out), jnp.sin(finite)))[0]

    mapped = results
    for level in reversed(range(len(levels))):
        mapped = jax.vmap(mapped, [axes[name][level] for name in names])
    found = jax.jit(mapped)(*(arrays[name] for name in names))
    one = jax.jit(results)
    for flat, index in enumerate(np.ndindex(*levels)):
        expected = one(*(_entry(arrays[name], axes[name], index) for name in names))
        parts = jax.tree.map(lambda x: x.reshape(math.prod(levels), *x.shape[len(levels) :]), found)
        for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(expected), strict=True):
            assert relative_error(a[flat], b) <= 1e-5, (names, axes)
