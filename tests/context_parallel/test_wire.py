"""Quantized keys and values: the bytes of their codes are sent, and gradients come back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import jax_gluon
from benchmarks import collectives
from jax_gluon import AttentionQuantization, QuantSpec
from jax_gluon._quantization.formats import PRESETS
from tests.context_parallel.conftest import DEVICES
from tests.context_parallel.test_ring_attention import TOKENS, draw, mesh, ordered
from tests.support import oracle

B, N, K, H = 1, 4, 2, 128
ROTATED = AttentionQuantization(
    QuantSpec(rotate=True), QuantSpec(rotate=True, center=True), QuantSpec(center=True)
)


def attention(**keywords):
    local = functools.partial(
        jax_gluon.ring_attention, axis_name="ring", token_layout="zigzag", is_causal=True,
        **keywords,
    )  # fmt: skip
    return jax.shard_map(local, mesh=mesh(), in_specs=(TOKENS,) * 3, out_specs=TOKENS)


def shapes(tokens):
    return [
        jax.ShapeDtypeStruct(
            (B, tokens, heads, H), jnp.bfloat16, sharding=NamedSharding(mesh(), TOKENS)
        )
        for heads in (N, K, K)
    ]


def programs(quantization, tokens):
    """Forward and backward, compiled apart: in one XLA may take a send of the one for the other."""
    function = attention(quantization=quantization)

    def residuals(*arrays):
        return jax.vjp(function, *arrays)

    operands = shapes(tokens)
    out, pull = jax.eval_shape(residuals, *operands)
    backward = jax.jit(lambda pull, d_out: pull(d_out))
    return [
        jax.jit(function).lower(*operands).compile(),
        backward.lower(pull, out).compile(),
    ]


def formula(quantization, tokens):
    """That of docs/ring-attention.md, of both passes."""
    elements = B * tokens // DEVICES * K * H
    key = value = 2.0 * elements
    blocks = B * tokens // DEVICES // 32
    if quantization == "int8":
        # Codes, a float32 scale for each row, and the center of the keys.
        key = elements + 4 * elements / H + 4 * B * K * H
        value = elements + 4 * elements / H
    elif quantization == "int4":
        # Steps and minima in bfloat16: for 32 tokens of a channel, with 7 numbers of powers; for 24
        # elements of a row.
        key = elements / 2 + 4 * blocks * K * H + 2 * 7 * blocks * K + 4 * B * K * H
        value = elements / 2 + 4 * -(-H // 24) * elements / H
    hops = DEVICES - 1
    return hops * (key + value), hops * (key + value + 2 * 4 * elements)


def test_bytes_in_the_program_are_those_of_the_formula():
    tokens = DEVICES * 256
    forward = {}
    for quantization in (None, "int8", "int4"):
        sent = tuple(map(collectives.sent, programs(quantization, tokens)))
        assert sent == formula(quantization, tokens)
        forward[quantization] = sent[0]
    assert forward["int8"] <= 0.55 * forward[None]
    assert forward["int4"] <= 0.34 * forward[None]


def test_memory_does_not_grow_with_the_number_of_devices():
    """Two blocks of keys and values are in flight, and in backward the gradients of two."""
    tokens = 256
    shard = tokens * H * 4 * K
    for is_backward in (False, True):
        temporary = {}
        for devices in (4, 8):
            function = attention_of(devices, is_backward)
            operand = jax.ShapeDtypeStruct((B, devices * tokens, K, H), jnp.float32)
            program = jax.jit(function).lower(operand, operand, operand).compile()
            temporary[devices] = program.memory_analysis().temp_size_in_bytes
        assert temporary[8] <= (6 if not is_backward else 14) * shard
        assert temporary[8] <= 1.05 * temporary[4]


def attention_of(devices, is_backward):
    some = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("ring",))
    local = functools.partial(jax_gluon.ring_attention, axis_name="ring", implementation="cpu")
    function = jax.shard_map(local, mesh=some, in_specs=(TOKENS,) * 3, out_specs=TOKENS)
    if not is_backward:
        return function
    return jax.grad(lambda *x: jnp.sum(function(*x) ** 2), (0, 1, 2))


# Format, dtype, and bars of the output and the gradients against the float64 oracle of what the
# codes of each device stand for.
FORMATS = {
    "int8": ("int8", "float32", (8e-3, 1e-2)),
    "int4": ("int4", "float32", (1.3e-2, 1e-2)),
    "int8_bfloat16": ("int8", "bfloat16", (8e-3, 1e-2)),
    "rotated": (ROTATED, "float32", (8e-3, 1e-2)),
    "bfloat16": (None, "bfloat16", (7e-3, 1e-2)),
}


@pytest.mark.parametrize(
    ("name", "strategy"),
    [*((name, "ring") for name in FORMATS), ("int8", "all_gather"), ("int4", "all_to_all")],
)
def test_quantized_shards(name, strategy):
    quantization, dtype, (bar, gradient_bar) = FORMATS[name]
    rng = np.random.default_rng(7)
    tokens, heads, kv_heads, width = DEVICES * 32, 8, 8 if strategy == "all_to_all" else 4, 32
    q, k, v, d_out = (
        jnp.asarray(draw(rng, 2, tokens, n, width), dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    k = k + jnp.asarray(2.0, dtype)  # a center to be taken away
    specs = PRESETS.get(quantization) if isinstance(quantization, str) else quantization

    def point(x, spec):
        """What the codes of each shard stand for, in the order of the sequence."""
        x = ordered(x, "zigzag", (1,))
        if spec is not None:
            parts = jnp.split(x, DEVICES, axis=1)
            codes = [jax_gluon.quantize(part, spec).dequantize(jnp.float32) for part in parts]
            x = jnp.concatenate(codes, axis=1)
        return np.asarray(ordered(x, "zigzag", (1,), jax_gluon.restore_tokens), np.float64)

    specs = specs or AttentionQuantization()
    points = [point(x, getattr(specs, n)) for n, x in (("query", q), ("key", k), ("value", v))]
    exact = oracle.attention(*points, d_out=np.asarray(d_out, np.float64), is_causal=True)
    function = attention(quantization=quantization, strategy=strategy)
    moved = [ordered(x, "zigzag", (1,)) for x in (q, k, v, d_out)]

    @jax.jit
    def results(q, k, v, d_out):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(d_out)

    for field, bound, x in zip(
        ("out", "d_query", "d_key", "d_value"), (bar, *[gradient_bar] * 3), results(*moved),
        strict=True,
    ):  # fmt: skip
        x = np.asarray(ordered(x, "zigzag", (1,), jax_gluon.restore_tokens), np.float64)
        y = getattr(exact, field)
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert error <= bound, (field, error)


def test_codes_that_are_given_travel_as_they_are():
    rng = np.random.default_rng(8)
    tokens = DEVICES * 32
    q, k, v = (jnp.asarray(draw(rng, 1, tokens, 2, 16)) for _ in range(3))
    spec = QuantSpec(center=True)

    def local(q, k, v):
        key = jax_gluon.quantize(k, spec)
        return jax_gluon.ring_attention(q, key, v, axis_name="ring")

    function = jax.shard_map(local, mesh=mesh(), in_specs=(TOKENS,) * 3, out_specs=TOKENS)
    d_key = jax.jit(jax.grad(lambda *x: jnp.sum(function(*x)), 1))(q, k, v)
    assert not np.any(d_key)
    parts = [jax_gluon.quantize(x, spec).dequantize() for x in jnp.split(k, DEVICES, axis=1)]
    exact = oracle.attention(q, np.concatenate(parts, 1), v).out
    np.testing.assert_allclose(jax.jit(function)(q, k, v), exact, atol=2e-5)


@pytest.mark.parametrize("hidden_by", ["lengths", "mask", "bias"])
@pytest.mark.parametrize("layout", ["contiguous", "striped"])
def test_hidden_tokens_are_in_no_scale(hidden_by, layout):
    """NaN past the lengths would be in the scale of a whole block of tokens."""
    rng = np.random.default_rng(9)
    tokens, last = DEVICES * 32, 41
    q, k, v = (draw(rng, 2, tokens, 2, 16) for _ in range(3))
    is_seen = np.arange(tokens) < np.array([[last], [tokens]])
    bad = [np.where(is_seen[..., None, None], x, np.nan) for x in (k, v)]
    put = functools.partial(ordered, layout=layout)
    if hidden_by == "lengths":
        given = dict(key_value_seq_lengths=np.array([last, tokens]))
    else:
        hidden = put(jnp.asarray(is_seen[:, None, None]), axes=(3,))
        hidden = jnp.where(hidden, 0.0, -jnp.inf) if hidden_by == "bias" else hidden
        given = {hidden_by: hidden}

    @jax.jit
    def attention(q, k, v):
        return jax_gluon.context_parallel_attention(
            q, k, v, mesh=mesh(), axis="ring", quantization="int4", token_layout=layout, **given
        )

    out, clean = (
        ordered(
            attention(*(put(jnp.asarray(x), axes=(1,)) for x in (q, *keys))),
            layout, (1,), jax_gluon.restore_tokens,
        )
        for keys in (bad, (k, v))
    )  # fmt: skip
    np.testing.assert_array_equal(out, clean)
    exact = oracle.attention(q, k, v, key_value_seq_lengths=np.array([last, tokens])).out
    assert np.linalg.norm(out - exact) <= 0.15 * np.linalg.norm(exact)
