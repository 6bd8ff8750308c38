"""Derivatives with `differentiation="any"`, and what says that they need it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import reference
from jax_gluon._quantization.formats import PRESETS
from tests.support.arrays import placed

B, T, S, N, K, H, V = 2, 5, 7, 4, 2, 6, 3
FLOATS = ("query", "key", "value", "bias", "sinks")
any_order = functools.partial(jax_gluon.dot_product_attention, differentiation="any")


# The plugin's and XLA's: Metal differs in its kernel alone.
HOSTS = ("cpu", "xla")
on_hosts = pytest.mark.parametrize("implementation", HOSTS, indirect=True)


@pytest.fixture
def hosts(require):
    """Both, for tests that compare them with the same result."""
    require("cpu")
    return HOSTS


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture
def draw(rng):
    return lambda *shape: placed(rng.standard_normal(shape), jnp.float32)


@pytest.fixture
def floats(draw):
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, V), (1, N, T, S), (N,))
    return dict(zip(FLOATS, (draw(*shape) for shape in shapes), strict=True))


@pytest.fixture
def tangents(draw, floats):
    return {name: draw(*x.shape) for name, x in floats.items()}


TARGETS = [f'"jax_gluon.attention_{name}"' for name in ("forward", "tangent", "backward")]
RULES = {
    "plain": {},
    "all": {
        "logits_soft_cap": 2.0,
        "is_causal": True,
        "query_offset": 2,
        "dropout_rate": 0.25,
        "query_seq_lengths": [5, 4],
        "mask": np.random.default_rng(2).random((B, 1, T, S)) < 0.8,
        "query_segment_ids": np.arange(T, dtype=np.int32) // 3,
        "key_value_segment_ids": np.arange(S, dtype=np.int32) // 4,
    },
}
rules = pytest.mark.parametrize("rule", RULES)


def of_floats(attention, rule, **keywords):
    """Attention as a function of its differentiable operands alone."""
    given = {"dropout_rng": jax.random.key(3), **RULES[rule], **keywords}
    return lambda floats: attention(**floats, **given)


def assert_close(actual, expected, limit=2e-6):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=limit * (1 + np.abs(y).max()))


def compare(program, rule, implementations, *operands, limit=2e-6, configure=None):
    """`program(attention, *operands)`, of each implementation and of the plain formula.

    With `configure` the formula is in float64: of third order, float32 is off by more than ours.
    """

    def run(attention, operands=operands):
        return jax.jit(functools.partial(program, of_floats(attention, rule)))(*operands)

    if configure is None:
        expected = run(reference.dot_product_attention)
    else:
        with configure(jax_enable_x64=True):
            exact = jax.tree.map(lambda x: placed(x, jnp.float64), operands)
            expected = jax.tree.map(np.asarray, run(reference.dot_product_attention, exact))
    for implementation in implementations:
        ours = functools.partial(any_order, implementation=implementation)
        assert_close(run(ours), expected, limit)


def square(attention, floats):
    return jnp.sum(attention(floats) ** 2)


@rules
@pytest.mark.parametrize("implementations", [HOSTS, ("metal",)], ids="-".join)
def test_forward_mode(rule, implementations, require, floats, tangents):
    for implementation in implementations:
        require(implementation)
    compare(lambda f, *given: jax.jvp(f, *given), rule, implementations, (floats,), (tangents,))


def test_forward_mode_in_one_operand(hosts, floats, tangents):
    def program(attention, floats, tangents):
        return [
            jax.jvp(
                lambda x, name=name: attention({**floats, name: x}),
                (floats[name],),
                (tangents[name],),
            )
            for name in FLOATS
        ]

    compare(program, "all", hosts, floats, tangents)


@on_hosts
def test_forward_mode_of_the_log_sum_exp(implementation, floats, tangents):
    def program(attention, floats, tangents):
        return jax.jvp(attention, (floats,), (tangents,))

    ours = of_floats(
        jax_gluon.attention_with_log_sum_exp,
        "plain",
        implementation=implementation,
        differentiation="any",
    )
    plain = of_floats(reference.attention_with_log_sum_exp, "plain")
    assert_close(program(ours, floats, tangents), program(plain, floats, tangents))


@on_hosts
def test_linearize_runs_forward_once(implementation, floats, tangents):
    """The primal result is that of a call without derivatives, to the bit."""
    attention = of_floats(any_order, "plain", implementation=implementation)
    plain = of_floats(reference.dot_product_attention, "plain")
    out, tangent = jax.linearize(attention, floats)
    np.testing.assert_array_equal(out, attention(floats))
    assert_close(tangent(tangents), jax.jvp(plain, (floats,), (tangents,))[1])


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_forward_mode_is_one_kernel(quantization, floats, tangents, require):
    """Forward's own call has no reader, and is dropped."""
    require("cpu")
    attention = of_floats(any_order, "plain", implementation="cpu", quantization=quantization)

    def calls(program):
        text = jax.jit(program).lower(floats, tangents).compile().as_text()
        return [text.count(f"custom_call_target={name}") for name in TARGETS]

    assert calls(lambda *given: jax.jvp(attention, given[:1], given[1:])) == [0, 1, 0]


@pytest.mark.parametrize("quantization", [None, "int8"])
@on_hosts
def test_reverse_mode_is_that_of_custom_vjp(quantization, implementation, floats):
    """To the bit, but for what XLA fuses with other neighbours."""

    def gradient(differentiation):
        attention = of_floats(
            jax_gluon.dot_product_attention,
            "plain",
            implementation=implementation,
            quantization=quantization,
            differentiation=differentiation,
        )
        return jax.jit(jax.grad(functools.partial(square, attention)))(floats)

    assert_close(gradient("any"), gradient("reverse"), 1e-6 if implementation == "xla" else 0)


@on_hosts
def test_codes_have_the_straight_through_tangent(implementation, draw):
    """That of float attention at the dequantized operands."""
    operands = tuple(draw(B, 5, K, 16) for _ in range(3))
    tangents = tuple(draw(B, 5, K, 16) for _ in range(3))
    run = functools.partial(any_order, implementation=implementation)
    _, actual = jax.jvp(functools.partial(run, quantization="int8"), operands, tangents)
    specs = PRESETS["int8"]
    dequantized = tuple(
        jax_gluon.quantize(x, spec).dequantize()
        for x, spec in zip(operands, (specs.query, specs.key, specs.value), strict=True)
    )
    assert_close(actual, jax.jvp(run, dequantized, tangents)[1], 1e-5)


@rules
def test_second_order(rule, hosts, floats, tangents):
    """Forward over reverse, and a gradient of a directional derivative of it."""

    def program(attention, floats, tangents):
        gradient = jax.grad(functools.partial(square, attention))

        def along(floats):
            return jax.jvp(gradient, (floats,), (tangents,))[1]

        return along(floats)

    compare(program, rule, hosts, floats, tangents, limit=5e-6)


def test_reverse_over_reverse(hosts, floats, tangents):
    def program(attention, floats, tangents):
        def along(floats):
            gradient = jax.grad(functools.partial(square, attention))(floats)
            return sum(jnp.vdot(x, tangents[name]) for name, x in gradient.items())

        return jax.grad(along)(floats)

    compare(program, "plain", hosts, floats, tangents, limit=5e-6)


def test_hessian_and_third_order(hosts, floats, configure):
    def program(attention, floats, x):
        def of_scale(x):
            moved = {**floats, "query": floats["query"] * x[0], "key": floats["key"] * x[1]}
            return square(attention, moved)

        def second(x):
            return jax.jvp(jax.grad(of_scale), (x,), (jnp.ones_like(x),))[1]

        return jax.hessian(of_scale)(x), jax.jvp(second, (x,), (jnp.ones_like(x),))[1]

    at = jnp.array([1.1, 0.7])
    compare(program, "plain", hosts, floats, at, limit=3e-6, configure=configure)


def test_loss_with_a_stopped_tangent(hosts, floats, tangents):
    """What consistency and flow matching train with: forward mode inside a gradient."""

    def program(attention, floats, tangents):
        def loss(floats):
            out, tangent = jax.jvp(attention, (floats,), (tangents,))
            return jnp.sum((out - jax.lax.stop_gradient(tangent)) ** 2)

        return jax.grad(loss)(floats)

    compare(program, "all", hosts, floats, tangents)


def test_transformations(hosts, floats, tangents):
    """vmap on both sides of derivatives; scan over checkpointed steps."""

    def program(attention, floats, tangents):
        stacked = {**floats, "query": jnp.stack([floats["query"], 0.5 * floats["query"]])}
        axes = {name: 0 if name == "query" else None for name in floats}
        gradient = jax.grad(functools.partial(square, attention))

        @jax.checkpoint
        def layer(x, _):
            out = attention({**floats, "query": x})
            return x.at[..., :V].add(out), None

        def scanned(x):
            return jnp.sum(jax.lax.scan(layer, x, None, length=2)[0] ** 2)

        of_vmap = jax.grad(lambda x: jnp.sum(jax.vmap(attention, (axes,))(x) ** 2))
        return (
            jax.vmap(gradient, (axes,))(stacked),
            of_vmap(stacked),
            jax.vmap(lambda x: jax.jvp(attention, (x,), (tangents,)), (axes,))(stacked),
            jax.vmap(lambda x: jax.jvp(attention, (floats,), (x,))[1], (axes,))(stacked),
            jax.grad(scanned)(floats["query"]),
        )

    compare(program, "plain", hosts, floats, tangents)


def test_finite_differences_in_float64(floats, tangents, configure):
    """First and second derivatives along a direction."""
    with configure(jax_enable_x64=True):
        floats, tangents = (
            {name: placed(x, jnp.float64) for name, x in tree.items()}
            for tree in (floats, tangents)
        )
        attention = of_floats(any_order, "all", implementation="xla")

        @jax.jit
        def along(x):
            moved = {name: floats[name] + x * tangents[name] for name in floats}
            return square(attention, moved)

        first = jax.jit(jax.grad(along))
        second = jax.jit(jax.jvp, static_argnums=0)(jax.grad(along), (0.0,), (1.0,))[1]
        step = 1e-4
        slope = (along(step) - along(-step)) / (2 * step)
        curvature = (first(step) - first(-step)) / (2 * step)
        np.testing.assert_allclose(first(0.0), slope, rtol=1e-6)
        np.testing.assert_allclose(second, curvature, rtol=1e-6)


@on_hosts
def test_hidden_numbers_reach_no_tangent(implementation, draw):
    """NaN in keys, values and their tangents that no row sees."""
    q, k, v = draw(B, T, N, H), draw(B, S, K, H), draw(B, S, K, V)
    lengths = [4, 4]
    run = functools.partial(any_order, key_value_seq_lengths=lengths, implementation=implementation)
    bad_k, bad_v = (x.at[:, 4:].set(jnp.nan) for x in (k, v))
    expected = jax.jvp(run, (q, k, v), (q, k, v))
    assert_close(jax.jvp(run, (q, bad_k, bad_v), (q, bad_k, bad_v)), expected, 0)


def test_memory_of_second_derivatives_is_linear():
    """A matrix of scores would take 16 times the memory for 4 times the tokens."""

    def bytes_of(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 1, 16), jnp.float32)

        def loss(q, k, v):
            return jnp.sum(any_order(q, k, v, is_causal=True, implementation="xla") ** 2)

        def along(q, k, v):
            gradient = jax.grad(loss, (0, 1, 2))(q, k, v)
            return sum(jnp.vdot(x, x) for x in gradient)

        program = jax.jit(jax.grad(along, (0, 1, 2))).lower(x, x, x).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert bytes_of(4096) < 5 * bytes_of(1024)


# Errors, and the default.


def attend(x, **keywords):
    return jax_gluon.dot_product_attention(x, x, x, **keywords)


ASKED_FOR = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "grad of grad": lambda f, x: jax.grad(
        lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(f(x) ** 2))(x))
    )(x),
    "jvp of grad": lambda f, x: jax.jvp(jax.grad(lambda x: jnp.sum(f(x))), (x,), (x,)),
    "hessian": lambda f, x: jax.hessian(lambda x: jnp.sum(f(x)))(x),
    "jit": lambda f, x: jax.jit(jax.hessian(lambda x: jnp.sum(f(x))))(x),
}


@pytest.mark.parametrize("asked_for", ASKED_FOR)
@on_hosts
def test_errors_name_the_argument(asked_for, implementation, draw):
    function = functools.partial(attend, implementation=implementation)
    with pytest.raises(TypeError, match=r'allowed: .* differentiation="any"'):
        ASKED_FOR[asked_for](function, draw(1, 3, 1, 4))


def test_default_differentiation(draw):
    x = draw(1, 3, 1, 4)
    function = jax.jit(functools.partial(attend, implementation="xla"))
    function(x)
    with jax_gluon.default_differentiation("any"):
        expected = jax.jvp(functools.partial(attend, implementation="xla"), (x,), (x,))
        if hasattr(jax, "make_user_context"):
            assert_close(jax.jvp(function, (x,), (x,)), expected)
        with pytest.raises(TypeError, match="differentiation"):
            jax.jvp(functools.partial(attend, differentiation="reverse"), (x,), (x,))
    with pytest.raises(TypeError, match="differentiation"):
        jax.jvp(attend, (x,), (x,))


@on_hosts
def test_second_derivatives_of_codes_that_are_made_are_refused(implementation, draw):
    function = functools.partial(
        attend,
        quantization=PRESETS["int8"],
        implementation=implementation,
        differentiation="any",
    )
    with pytest.raises(NotImplementedError, match=r"query is quantized on the fly.*allowed"):
        jax.hessian(lambda x: jnp.sum(function(x)))(draw(1, 3, 1, 4))


@pytest.mark.parametrize(("found", "error"), [("forward", ValueError), (2, TypeError)])
def test_bad_differentiation(found, error, draw):
    with pytest.raises(error, match=r'differentiation is .*; allowed: None, "reverse", "any"'):
        attend(draw(1, 3, 1, 4), differentiation=found)
    with (
        pytest.raises(error, match="default_differentiation: differentiation is"),
        jax_gluon.default_differentiation(found),
    ):
        pass
