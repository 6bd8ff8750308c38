"""Attention under JAX's transformations and strict modes."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon

B, T, S, N, K, H = 2, 5, 7, 4, 2, 8
QUANTIZATIONS = pytest.mark.parametrize("quantization", [None, "int8"])


@pytest.fixture
def arguments():
    """One of each array argument."""
    rng = np.random.default_rng(11)
    return {
        "query": jnp.asarray(rng.standard_normal((B, T, N, H)), jnp.float32),
        "key": jnp.asarray(rng.standard_normal((B, S, K, H)), jnp.float32),
        "value": jnp.asarray(rng.standard_normal((B, S, K, H)), jnp.float32),
        "bias": jnp.asarray(rng.standard_normal((1, N, T, S)), jnp.float32),
        "mask": jnp.asarray(rng.random((B, 1, T, S)) < 0.8),
        "query_seq_lengths": jnp.asarray([4, 5], jnp.int32),
        "key_value_seq_lengths": jnp.asarray([7, 6], jnp.int32),
        "scale": jnp.asarray(0.4, jnp.float32),
    }


FLOATS = ("query", "key", "value", "bias", "scale")
ARGUMENTS = (*FLOATS, "mask", "query_seq_lengths", "key_value_seq_lengths")


def stacked(name, x, count=3):
    """`count` different values of an argument, along a leading axis."""
    if name == "mask":
        return jnp.stack([jnp.roll(x, i, axis=-1) for i in range(count)])
    if name.endswith("lengths"):
        return jnp.stack([jnp.maximum(x - i, 0) for i in range(count)])
    return jnp.stack([x * (1 + i) for i in range(count)])


def attend(arguments, **keywords):
    return jax_gluon.dot_product_attention(**arguments, **keywords)


def loss(floats, others, **keywords):
    out = attend({**floats, **others}, **keywords)
    return jnp.vdot(out, jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))


@functools.cache
def jitted(implementation, quantization):
    """Attention and its gradient, each compiled once for all tests."""
    keywords = {"implementation": implementation, "quantization": quantization}
    return (
        jax.jit(functools.partial(attend, **keywords)),
        jax.jit(jax.grad(functools.partial(loss, **keywords))),
    )


def split(arguments):
    floats = {name: x for name, x in arguments.items() if name in FLOATS}
    return floats, {name: x for name, x in arguments.items() if name not in FLOATS}


def assert_close(actual, expected, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        assert np.linalg.norm(x - y) <= tolerance * max(np.linalg.norm(y), 1e-3)


@pytest.mark.parametrize(
    ("mapped", "quantization"),
    [("key", None), ("bias", None), ("mask", None), ("key", "int8")],
)
def test_vmap_over_one_argument(mapped, quantization, implementation, arguments):
    """vmap, vmap of grad and grad of vmap equal a loop over the mapped argument.

    An operand, a bias and an argument without a gradient stand for all that test_vmap_axes maps.
    """
    if implementation == "xla" and (mapped, quantization) not in (("bias", None), ("key", "int8")):
        pytest.skip("one of floats and one of codes")
    keywords = {"implementation": implementation, "quantization": quantization}
    stack = stacked(mapped, arguments[mapped])
    axes = ({name: 0 if name == mapped else None for name in arguments},)
    batch = {**arguments, mapped: stack}
    rows = [{**arguments, mapped: x} for x in stack]

    run, gradient = jitted(implementation, quantization)
    split_axes = split(axes[0])

    def total(floats, others):
        return jax.vmap(functools.partial(loss, **keywords), split_axes)(floats, others).sum()

    @jax.jit
    def mapped_results(batch):
        each = jax.vmap(gradient, split_axes)(*split(batch))
        return jax.vmap(run, axes)(batch), each, jax.grad(total)(*split(batch))

    out, each, summed = mapped_results(batch)
    assert_close(out, np.stack([run(row) for row in rows]))
    expected = [gradient(*split(row)) for row in rows]
    assert_close(each, jax.tree.map(lambda *x: np.stack(x), *expected))
    for name in FLOATS:
        parts = np.stack([part[name] for part in expected])
        assert_close(summed[name], parts if name == mapped else parts.sum(0))


@QUANTIZATIONS
def test_nested_vmap_over_different_arguments(quantization, implementation, arguments):
    """The outer vmap maps query and bias, the inner one key and lengths: [2, 3] problems."""
    outer, inner = ("query", "bias"), ("key", "key_value_seq_lengths")
    batch = dict(arguments)
    for names, count in ((outer, 2), (inner, 3)):
        batch |= {name: stacked(name, arguments[name], count) for name in names}

    def axes(names):
        return split({name: 0 if name in names else None for name in arguments})

    run, gradient = jitted(implementation, quantization)

    def results(floats, others):
        return run({**floats, **others}), gradient(floats, others)

    actual = jax.jit(jax.vmap(jax.vmap(results, axes(inner)), axes(outer)))(*split(batch))
    for i in range(2):
        for j in range(3):
            row = {
                **arguments,
                **{name: batch[name][i] for name in outer},
                **{name: batch[name][j] for name in inner},
            }
            assert_close(
                jax.tree.map(lambda x, at=(i, j): np.asarray(x)[at], actual), results(*split(row))
            )


def test_vmap_over_trailing_axes(implementation, arguments):
    stack = stacked("query", arguments["query"])
    run = functools.partial(attend, implementation=implementation)
    others = {name: x for name, x in arguments.items() if name != "query"}
    expected = jnp.stack([run({**others, "query": x}) for x in stack])
    actual = jax.vmap(lambda x: run({**others, "query": x}), in_axes=2, out_axes=1)(
        jnp.moveaxis(stack, 0, 2)
    )
    assert_close(jnp.moveaxis(actual, 1, 0), expected)


def test_vmap_of_rank_3_equals_rank_4(implementation, arguments):
    q, k, v = (arguments[name] for name in ("query", "key", "value"))
    run = functools.partial(
        jax_gluon.dot_product_attention, is_causal=True, return_residual=True,
        implementation=implementation,
    )  # fmt: skip
    assert_close(jax.vmap(run)(q, k, v), run(q, k, v))


@QUANTIZATIONS
def test_jit_equals_eager(quantization, implementation, arguments):
    keywords = {"implementation": implementation, "quantization": quantization}
    run, gradient = jitted(implementation, quantization)
    assert_close(run(arguments), attend(arguments, **keywords))
    eager = jax.grad(functools.partial(loss, **keywords))
    assert_close(gradient(*split(arguments)), eager(*split(arguments)))


@QUANTIZATIONS
def test_scan_over_layers(quantization, implementation, arguments):
    _, others = split(arguments)
    q, k = arguments["query"], arguments["key"]
    weights = jnp.stack([jnp.eye(H) * (1 + i) for i in range(3)])

    def layer(x, weight):
        out = jax_gluon.dot_product_attention(
            x @ weight, k, k, **others, quantization=quantization, implementation=implementation
        )
        return x + out, jnp.sum(out)

    def scanned(weights, q):
        x, sums = jax.lax.scan(layer, q, weights)
        return jnp.sum(x**2) + jnp.sum(sums)

    def unrolled(weights, q):
        total = 0.0
        for weight in weights:
            q, out = layer(q, weight)
            total += out
        return jnp.sum(q**2) + total

    actual = jax.jit(jax.value_and_grad(scanned, (0, 1)))(weights, q)
    assert_close(actual, jax.value_and_grad(unrolled, (0, 1))(weights, q))


@QUANTIZATIONS
def test_checkpoint(quantization, implementation, arguments):
    """With nothing saved, and with products saved."""
    function = functools.partial(loss, implementation=implementation, quantization=quantization)

    @jax.jit
    def rematerialized(floats, others):
        return [
            jax.grad(jax.checkpoint(function, policy=policy))(floats, others)
            for policy in (None, jax.checkpoint_policies.dots_saveable)
        ]

    _, gradient = jitted(implementation, quantization)
    expected = gradient(*split(arguments))
    for actual in rematerialized(*split(arguments)):
        assert_close(actual, expected, 1e-6)


def test_eval_shape_computes_nothing(implementation, arguments):
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arguments.items()}
    out, residual = jax.eval_shape(
        functools.partial(attend, return_residual=True, implementation=implementation), shapes
    )
    assert (out.shape, out.dtype) == ((B, T, N, H), jnp.float32)
    assert (residual.shape, residual.dtype) == ((B, T, N), jnp.float32)
    gradients = jax.eval_shape(
        jax.grad(functools.partial(loss, implementation=implementation)), *split(shapes)
    )
    assert {name: x.shape for name, x in gradients.items()} == {
        name: x.shape for name, x in shapes.items() if name in FLOATS
    }


def test_donated_operand_is_consumed_and_the_result_is_right(implementation, arguments):
    q, k = arguments["query"], arguments["key"]
    run = functools.partial(jax_gluon.dot_product_attention, implementation=implementation)
    expected = run(q, k, k)
    donated = q.copy()
    actual = jax.jit(run, donate_argnums=0)(donated, k, k)
    assert_close(actual, expected)
    assert donated.is_deleted()


@pytest.mark.parametrize(
    ("quantization", "dtype", "x64"),
    [(None, "bfloat16", True), ("int8", "float32", False)],
)
def test_strict_modes(quantization, dtype, x64, implementation, arguments, strict_modes, configure):
    """Forward, both gradients and vmap, with an empty row, raise nothing in any strict mode."""
    del strict_modes
    arguments = dict(arguments)
    arguments["query_seq_lengths"] = jnp.asarray([0, 5], jnp.int32)
    for name in ("query", "key", "value", "bias"):
        arguments[name] = arguments[name].astype(dtype)
    keywords = {
        "implementation": implementation, "quantization": quantization, "is_causal": True,
        "local_window_size": (3, 3), "logits_soft_cap": 5.0,
    }  # fmt: skip
    with configure(jax_enable_x64=x64):
        gradient = jax.value_and_grad(functools.partial(loss, **keywords))
        for function in (gradient, jax.jit(gradient)):
            _, gradients = function(*split(arguments))
            assert {name: x.dtype for name, x in gradients.items()} == {
                name: arguments[name].dtype for name in FLOATS
            }
        axes = {name: 0 if name == "query" else None for name in arguments}
        batch = {**arguments, "query": stacked("query", arguments["query"], 2)}
        out = jax.vmap(functools.partial(attend, **keywords), (axes,))(batch)
        assert out.dtype == dtype


def test_log_sum_exp_of_an_empty_row_in_strict_modes(implementation, arguments, strict_modes):
    """-inf is public, so debug_infs has to be off for it; its gradient is 0 and never NaN."""
    del strict_modes
    q, k, v = (arguments[name] for name in ("query", "key", "value"))
    lengths = jnp.asarray([0, S], jnp.int32)

    @jax.jit
    def loss(q, k, v):
        out, log_sum_exp = jax_gluon.attention_with_log_sum_exp(
            q, k, v, key_value_seq_lengths=lengths, implementation=implementation
        )
        return jnp.sum(out) + jnp.sum(jnp.exp(log_sum_exp))

    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
    assert np.isfinite(value)
    for gradient in gradients:
        assert not gradient[0].any()
        assert gradient[1].any()


def test_float64_runs_in_the_xla_implementation(
    arguments, oracle, relative_error, strict_modes, configure
):
    del strict_modes
    with configure(jax_enable_x64=True):
        q, k, v, bias = (
            jnp.asarray(np.asarray(arguments[name], np.float64))
            for name in ("query", "key", "value", "bias")
        )
        d_out, d_log_sum_exp = jnp.cos(q), jnp.sin(q[..., 0])
        for implementation in (None, "xla"):
            (out, log_sum_exp), pullback = jax.vjp(
                lambda *x, implementation=implementation: jax_gluon.attention_with_log_sum_exp(
                    *x, is_causal=True, implementation=implementation
                ),
                q, k, v, bias,
            )  # fmt: skip
            gradients = pullback((d_out, d_log_sum_exp))
            expected = oracle(
                q, k, v, bias, is_causal=True, d_out=d_out, d_log_sum_exp=d_log_sum_exp
            )
            for x, exact in zip((out, log_sum_exp, *gradients), expected, strict=True):
                assert x.dtype == jnp.float64
                assert relative_error(x, exact) <= 1e-13


def test_float64_int8(arguments, oracle, fake_quantize, relative_error, configure):
    with configure(jax_enable_x64=True):
        q, k, v = (
            jnp.asarray(np.asarray(arguments[name], np.float64))
            for name in ("query", "key", "value")
        )
        out, pullback = jax.vjp(
            lambda *x: jax_gluon.dot_product_attention(*x, quantization="int8"), q, k, v
        )
        expected = oracle(
            fake_quantize(q), fake_quantize(k, center=True), fake_quantize(v), d_out=out
        )
        for x, exact in zip((out, *pullback(out)), (expected.out, *expected[2:5]), strict=True):
            assert x.dtype == jnp.float64
            assert relative_error(x, exact) <= 1e-5


def test_float32_under_x64_equals_float32(implementation, arguments, configure):
    _, gradient = jitted(implementation, None)
    expected = gradient(*split(arguments))
    with configure(jax_enable_x64=True):
        actual = gradient(*split(arguments))
    assert_close(actual, expected, 1e-6)
    assert all(
        x.dtype == y.dtype
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    )


def called_by(jaxpr):
    """Names of primitives and targets of custom calls, once for each call of a function."""
    for equation in jaxpr.eqns:
        yield equation.params.get("target_name", equation.primitive.name)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from called_by(getattr(inner, "jaxpr", inner))


@QUANTIZATIONS
@pytest.mark.parametrize(
    ("implementation", "differentiation"),
    [(None, "reverse"), (None, "any"), ("xla", "reverse"), ("xla", "any")],
)
def test_forward_runs_once_where_a_policy_saves_its_names(
    quantization, implementation, differentiation, require
):
    """In value and gradient under `jax.checkpoint`; each name alone is not enough."""
    require(implementation or "cpu")
    rng = np.random.default_rng(3)
    operands = [jnp.asarray(rng.standard_normal((B, T, N, H)), jnp.float32) for _ in range(3)]

    def loss(q, k, v):
        out, log_sum_exp = jax_gluon.attention_with_log_sum_exp(
            q,
            k,
            v,
            implementation=implementation,
            quantization=quantization,
            differentiation=differentiation,
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(log_sum_exp))

    def value_and_grad(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        return jax.value_and_grad(jax.checkpoint(loss, policy=policy), (0, 1, 2))

    def called(function):
        return Counter(called_by(jax.make_jaxpr(function)(*operands).jaxpr))

    def loops(function):
        return called(function)["scan"]

    def kernels(*names):
        """Calls of forward and of the quantizer; of XLA, loops of forward."""
        if implementation == "xla":
            of_backward = loops(jax.value_and_grad(loss, (0, 1, 2))) - loops(loss)
            return loops(value_and_grad(*names)) - of_backward, None
        calls = called(value_and_grad(*names))
        return calls["jax_gluon.attention_forward"], calls["jax_gluon.quantize"]

    names = jax_gluon.CHECKPOINT_NAMES
    forward, quantizer = kernels(*names)
    again = None if quantizer is None else 2 * quantizer
    assert forward > 0
    assert quantizer in (None, 3 if quantization else 0)
    assert kernels() == (2 * forward, again)
    assert kernels(*names[:2]) == (forward, again)
    for left_out in names[:2]:
        assert kernels(*(name for name in names if name != left_out))[0] == 2 * forward
    _, actual = jax.jit(value_and_grad(*names))(*operands)
    expected = jax.jit(jax.grad(loss, (0, 1, 2)))(*operands)
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(x, y)
