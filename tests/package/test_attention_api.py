"""What the public functions compute, against a float64 oracle and against `jax.nn`."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon

B, T, S, N, K = 2, 9, 13, 4, 2
RNG = np.random.default_rng(7)

CASES = {
    "plain": {},
    "scale": {"scale": 0.3},
    "negative_scale": {"scale": -0.5},
    "zero_scale": {"scale": 0.0},
    "numpy_scale": {"scale": np.float64(0.4)},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (2, 3)},
    "window_int": {"local_window_size": 2},
    "window_zero": {"local_window_size": 0},
    "window_huge": {"local_window_size": (np.int64(2**62), 1)},
    "causal_window": {"is_causal": True, "local_window_size": (3, 1)},
    "lengths": {
        "query_seq_lengths": np.array([5, 9], np.int32),
        "key_value_seq_lengths": np.array([13, 4], np.int32),
    },
    "lengths_zero": {"key_value_seq_lengths": np.array([0, 7], np.int32)},
    "soft_cap": {"logits_soft_cap": 2.0},
    "bias": {"bias": RNG.standard_normal((B, N, T, S), np.float32)},
    "bias_broadcast": {"bias": RNG.standard_normal((1, N, 1, S), np.float32)},
    "bias_rank_2": {"bias": RNG.standard_normal((T, S), np.float32)},
    "bias_soft_cap": {
        "bias": RNG.standard_normal((B, 1, T, S), np.float32),
        "logits_soft_cap": 1.5,
    },
    "mask": {"mask": RNG.random((B, N, T, S)) < 0.6},
    "mask_broadcast": {"mask": RNG.random((B, 1, 1, S)) < 0.6},
    "mask_rank_1": {"mask": RNG.random(S) < 0.6},
    "everything": {
        "bias": RNG.standard_normal((B, N, T, S), np.float32),
        "mask": RNG.random((1, N, T, S)) < 0.8,
        "is_causal": True,
        "local_window_size": (6, 6),
        "query_seq_lengths": np.array([8, 9], np.int32),
        "key_value_seq_lengths": np.array([11, 6], np.int32),
        "logits_soft_cap": 3.0,
        "scale": 0.7,
    },
}
# Forward and gradient, relative L2: the promise for float32, and the rounding of 8 and 11 bits.
TOLERANCE = {"float32": (2e-6, 3e-6), "bfloat16": (8e-3, 1.6e-2), "float16": (1e-3, 2e-3)}


def value_and_gradients(function, operands, bias, cotangents):
    """Outputs and gradients of query, key, value and, where there is one, bias: one program."""

    @jax.jit
    def run(cotangents, *inputs):
        outputs, pullback = jax.vjp(function, *inputs)
        return outputs, pullback(cotangents)

    return run(cotangents, *operands, *(() if bias is None else (bias,)))


def check(oracle, relative_error, operands, d_out, keywords, implementation, tolerance):
    bias = keywords.get("bias")
    static = {name: x for name, x in keywords.items() if name != "bias"}

    def attention(q, k, v, bias=None):
        return jax_gluon.dot_product_attention(
            q, k, v, bias, implementation=implementation, **static
        )

    out, gradients = value_and_gradients(attention, operands, bias, d_out)
    expected = oracle(*operands, **keywords, d_out=d_out)
    assert out.dtype == operands[0].dtype
    assert relative_error(out, expected.out) <= tolerance[0]
    for gradient, exact, name in zip(
        gradients, expected[2:], ("q", "k", "v", "bias"), strict=False
    ):
        assert relative_error(gradient, exact) <= tolerance[1], name


# Arguments come to XLA as to the plugin; tests/package/test_xla.py has its rules in float64.
CASES_OF_XLA = ("plain", "window_huge", "lengths_zero", "bias_rank_2", "mask_rank_1", "everything")


@pytest.mark.parametrize(
    ("case", "implementation"),
    [(case, x) for case in CASES for x in ("cpu", "metal", "xla")
     if x != "xla" or case in CASES_OF_XLA],
    indirect=["implementation"],
)  # fmt: skip
def test_output_and_gradients_match_the_oracle(
    case, implementation, oracle, relative_error, random_operands
):
    q, k, v, d_out = random_operands(B, T, S, N, K, H=8, V=8)
    check(oracle, relative_error, (q, k, v), d_out, CASES[case], implementation, (2e-6, 3e-6))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["plain", "everything"])
def test_half_precision(case, dtype, implementation, oracle, relative_error, random_operands):
    if (case, implementation) == ("plain", "xla"):
        pytest.skip("tests/package/test_xla.py has it")
    q, k, v, d_out = random_operands(B, T, S, N, K, H=8, V=8, dtype=dtype)
    keywords = CASES[case]
    check(oracle, relative_error, (q, k, v), d_out, keywords, implementation, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("shape", "is_causal"),
    [
        ({"N": 3, "K": 3}, True),
        ({"N": 6, "K": 1}, False),
        ({"H": 16, "V": 5}, True),
        ({"H": 3, "V": 24}, False),
        ({"T": 20, "S": 6}, True),
        ({"T": 20, "S": 6}, False),
        ({"B": 1, "T": 1, "S": 33, "N": 8, "K": 2}, True),
        ({"B": 1, "T": 1, "S": 33, "N": 8, "K": 2}, False),
    ],
    ids=lambda x: "-".join(f"{letter}{extent}" for letter, extent in x.items())
    if isinstance(x, dict) else "causal" if x else "full",
)  # fmt: skip
def test_shapes(shape, is_causal, implementation, oracle, relative_error, random_operands):
    q, k, v, d_out = random_operands(**shape)
    keywords = {"is_causal": is_causal}
    check(oracle, relative_error, (q, k, v), d_out, keywords, implementation, (2e-6, 3e-6))


def test_bias_of_another_dtype_gets_its_gradient_in_that_dtype(
    implementation, oracle, relative_error, random_operands
):
    q, k, v, d_out = random_operands(B, T, S, N, K)
    dtypes = (jnp.bfloat16, jnp.float16, jnp.float8_e5m2)
    biases = [jnp.asarray(CASES["bias_broadcast"]["bias"], dtype) for dtype in dtypes]

    def loss(biases):
        return sum(
            jnp.vdot(
                jax_gluon.dot_product_attention(q, k, v, x, implementation=implementation), d_out
            )
            for x in biases
        )

    for dtype, bias, gradient in zip(dtypes, biases, jax.jit(jax.grad(loss))(biases), strict=True):
        assert gradient.dtype == dtype
        exact = oracle(q, k, v, np.asarray(bias, np.float32), d_out=d_out).d_bias
        rounding = float(jnp.finfo(dtype).eps)
        assert relative_error(gradient, exact) <= rounding


JAX_NN_CASES = [
    "plain",
    "scale",
    "causal",
    "window",
    "window_int",
    "causal_window",
    "bias",
    "bias_broadcast",
    "bias_rank_2",
    "mask_broadcast",
]


@pytest.mark.parametrize("case", JAX_NN_CASES)
def test_agrees_with_jax_nn(case, relative_error, random_operands):
    """What arguments mean, in ranks 4 and 3; other implementations agree with the oracle."""
    keywords = CASES[case]
    first = {name: x[:1] if np.ndim(x) == 4 else x for name, x in keywords.items()}

    @jax.jit
    def run(q, k, v):
        return [
            (
                attention(q, k, v, **keywords, return_residual=True),
                attention(q[0], k[0], v[0], **first, return_residual=True),
            )
            for attention in (jax_gluon.dot_product_attention, jax.nn.dot_product_attention)
        ]

    actual, expected = map(jax.tree.leaves, run(*random_operands(B, T, S, N, K)[:3]))
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert relative_error(x, y) <= 2e-6


def test_lengths_agree_with_jax_nn_in_both_ranks(implementation, relative_error, random_operands):
    lengths = {"query_seq_lengths": [4, 9], "key_value_seq_lengths": [13, 5]}
    q, k, v, _ = random_operands(B, T, S, N, K)
    arrays = {name: jnp.asarray(x, jnp.int32) for name, x in lengths.items()}
    expected = jax.nn.dot_product_attention(q, k, v, **arrays)
    actual = jax_gluon.dot_product_attention(q, k, v, **lengths, implementation=implementation)
    assert relative_error(actual, expected) <= 2e-6
    first = {name: x[:1] for name, x in arrays.items()}
    actual = jax_gluon.dot_product_attention(
        q[0], k[0], v[0], **first, implementation=implementation
    )
    assert relative_error(actual, expected[0]) <= 2e-6


def test_lengths_out_of_range_are_clamped(implementation, random_operands):
    q, k, v, _ = random_operands(B, T, S, N, K)

    def attention(query_lengths, key_lengths):
        return jax_gluon.dot_product_attention(
            q, k, v, query_seq_lengths=jnp.asarray(query_lengths, jnp.int32),
            key_value_seq_lengths=jnp.asarray(key_lengths, jnp.int32),
            implementation=implementation,
        )  # fmt: skip

    big = 2**31 - 1
    np.testing.assert_array_equal(attention([-3, big], [big, S + 1]), attention([0, T], [S, S]))
    np.testing.assert_array_equal(attention([T, T], [-big, 4]), attention([T, T], [0, 4]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_residual_has_keys_dtype_and_carries_no_gradient(
    dtype, implementation, oracle, relative_error, random_operands
):
    q, k, v, _ = random_operands(B, T, S, N, K, dtype=dtype)

    def residual(q, k, v):
        return jax_gluon.dot_product_attention(
            q, k, v, return_residual=True, implementation=implementation
        )[1]

    ones = np.ones((B, T, N), dtype)
    actual, gradients = value_and_gradients(residual, (q, k, v), None, ones)
    assert actual.dtype == dtype
    expected = oracle(q, k, v).log_sum_exp
    assert relative_error(actual, expected) <= max(2e-6, float(jnp.finfo(dtype).eps))
    assert not any(np.any(gradient) for gradient in gradients)


@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        *((case, x) for case in ("plain", "everything", "lengths_zero", "bias_broadcast")
          for x in ("cpu", "metal")),
        ("everything", "xla"),
    ],
    indirect=["implementation"],
)  # fmt: skip
def test_gradient_flows_through_log_sum_exp(
    case, implementation, oracle, relative_error, random_operands
):
    keywords = dict(CASES[case])
    q, k, v, d_out = random_operands(B, T, S, N, K, V=6)
    d_log_sum_exp = jnp.asarray(RNG.standard_normal((B, T, N)), jnp.float32)
    bias = keywords.pop("bias", None)

    def attention(q, k, v, bias=None):
        return jax_gluon.attention_with_log_sum_exp(
            q, k, v, bias, implementation=implementation, **keywords
        )

    (out, log_sum_exp), gradients = value_and_gradients(
        attention, (q, k, v), bias, (d_out, d_log_sum_exp)
    )
    expected = oracle(q, k, v, bias, **keywords, d_out=d_out, d_log_sum_exp=d_log_sum_exp)
    assert log_sum_exp.dtype == jnp.float32
    empty = np.isneginf(expected.log_sum_exp)
    np.testing.assert_array_equal(np.isneginf(log_sum_exp), empty)
    assert relative_error(out, expected.out) <= 2e-6
    assert relative_error(log_sum_exp[~empty], expected.log_sum_exp[~empty]) <= 2e-6
    for gradient, exact in zip(gradients, expected[2:], strict=False):
        assert relative_error(gradient, exact) <= 3e-6


def test_partial_results_merge_to_the_whole(
    implementation, oracle, relative_error, random_operands
):
    """Output and gradients of two halves of the keys, merged by their log-sum-exp."""
    q, k, v, d_out = random_operands(B, T, S, N, K)

    def merged(q, k, v):
        parts = [
            jax_gluon.attention_with_log_sum_exp(
                q, k[:, part], v[:, part], implementation=implementation
            )
            for part in (slice(None, 6), slice(6, None))
        ]
        total = jnp.logaddexp(parts[0][1], parts[1][1])
        return sum(out * jnp.exp(lse - total)[..., None] for out, lse in parts)

    out, gradients = value_and_gradients(merged, (q, k, v), None, d_out)
    expected = oracle(q, k, v, d_out=d_out)
    assert relative_error(out, expected.out) <= 3e-6
    for gradient, exact in zip(gradients, expected[2:5], strict=True):
        assert relative_error(gradient, exact) <= 6e-6


def test_numpy_arrays_and_lists_are_taken(implementation, random_operands):
    q, k, v, _ = random_operands(1, 2, 3, 2, 1, H=4, V=4)
    expected = jax_gluon.dot_product_attention(q, k, v, implementation=implementation)
    for convert in (np.asarray, lambda x: np.asarray(x, np.float64), lambda x: x.tolist()):
        actual = jax_gluon.dot_product_attention(
            convert(q), convert(k), convert(v), implementation=implementation
        )
        np.testing.assert_array_equal(actual, expected)


def test_weakly_typed_arrays_are_taken_and_give_strong_ones(implementation):
    x = jnp.full((1, 3, 2, 4), 0.5)
    assert x.weak_type
    out = jax_gluon.dot_product_attention(x, x, x, implementation=implementation)
    assert not out.weak_type
    np.testing.assert_allclose(out, 0.5, rtol=1e-6)


def test_equal_calls_give_equal_bits(implementation, random_operands):
    q, k, v, d_out = random_operands(B, 40, 70, N, K)

    def run():
        return jax.vjp(
            lambda *x: jax_gluon.dot_product_attention(*x, implementation=implementation), q, k, v
        )[1](d_out)

    for first, second in zip(run(), run(), strict=True):
        np.testing.assert_array_equal(first, second)


# INT8: the oracle of quantized attention is float attention of the dequantized operands. The CPU
# kernels round the probabilities to 8 bits as well, Metal's to half; XLA's do not.
INT8_TOLERANCE = {"cpu": (8e-3, 1e-2), "metal": (8e-3, 1e-2), "xla": (1e-5, 1e-4)}


def _int8_cases():
    """Each case in each dtype; XLA, to which codes are floats, in two."""
    for case in ("plain", "causal", "lengths", "everything"):
        for dtype in ("float32", "bfloat16"):
            for implementation in ("cpu", "metal"):
                yield case, dtype, implementation
    yield from (("lengths", "float32", "xla"), ("everything", "bfloat16", "xla"))


@pytest.mark.parametrize(
    ("case", "dtype", "implementation"), list(_int8_cases()), indirect=["implementation"]
)
def test_int8_matches_attention_of_the_dequantized_operands(
    case, dtype, implementation, oracle, fake_quantize, relative_error, random_operands,
    seen_lengths,
):  # fmt: skip
    keywords = dict(CASES[case])
    q, k, v, d_out = random_operands(B, T, S, N, K, H=32, V=16, dtype=dtype)
    k = np.asarray(k) + np.asarray(2, dtype)  # A mean that would cost most codes if it stayed.
    bias = keywords.pop("bias", None)

    def attention(q, k, v, bias=None):
        return jax_gluon.dot_product_attention(
            q, k, v, bias, quantization="int8", implementation=implementation, **keywords
        )

    out, gradients = value_and_gradients(attention, (q, k, v), bias, d_out)
    _, lengths = seen_lengths(B, T, S, **keywords)
    dequantized = (
        fake_quantize(q),
        fake_quantize(k, center=True, lengths=lengths),
        fake_quantize(v),
    )
    expected = oracle(*dequantized, bias, **keywords, d_out=d_out)
    rounding = float(jnp.finfo(dtype).eps) if dtype == "bfloat16" else 0.0
    forward, backward = (tolerance + 2 * rounding for tolerance in INT8_TOLERANCE[implementation])
    assert out.dtype == dtype
    assert relative_error(out, expected.out) <= forward
    for gradient, exact in zip(gradients, expected[2:], strict=False):
        assert relative_error(gradient, exact) <= backward
    assert [gradient.dtype for gradient in gradients[:3]] == [dtype] * 3


def test_int8_is_close_to_float_attention(implementation, oracle, relative_error, random_operands):
    q, k, v, _ = random_operands(1, 32, 48, 4, 2, H=64, V=64)
    out = jax_gluon.dot_product_attention(
        q, k, v, quantization="int8", implementation=implementation
    )
    error = relative_error(out, oracle(q, k, v).out)
    assert 1e-4 < error < 2e-2  # Above the floor too: it really was quantized.


def test_int8_keeps_codes_for_backward_and_no_float_operand(implementation, random_operands):
    q, k, v, _ = random_operands(1, 64, 96, 2, 2, H=32, V=32)

    def residual_bytes(quantization):
        _, pullback = jax.vjp(
            lambda *x: jax_gluon.dot_product_attention(
                *x, quantization=quantization, implementation=implementation
            ),
            q, k, v,
        )  # fmt: skip
        leaves = [x for x in jax.tree.leaves(pullback) if isinstance(x, jax.Array)]
        return leaves, sum(x.nbytes for x in leaves)

    leaves, quantized = residual_bytes("int8")
    _, plain = residual_bytes(None)
    operands = q.nbytes + k.nbytes + v.nbytes
    assert sum(x.dtype == jnp.int8 for x in leaves) == 3
    # Codes are a quarter; a scale a row is 4 bytes beside 32 codes, and the mean is one row a head.
    assert plain - quantized >= operands * (1 - 1 / 4 - 1 / 32) - 2 * 32 * 4


def test_signature_is_that_of_jax_nn_and_the_design():
    ours = list(inspect.signature(jax_gluon.dot_product_attention).parameters.values())
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    shared = [p for p in ours if p.name in theirs]
    for parameter in shared:
        assert (parameter.kind, parameter.default) == (
            theirs[parameter.name].kind,
            theirs[parameter.name].default,
        )
    assert set(theirs) <= {p.name for p in ours}
    assert [p.name for p in ours if p.name not in theirs] == [
        "key_value_mask", "query_offset", "query_segment_ids", "key_value_segment_ids",
        "query_positions", "key_value_positions", "quantization", "logits_soft_cap",
        "dropout_rate", "dropout_rng", "broadcast_dropout", "sinks", "layout", "kernel",
        "differentiation",
    ]  # fmt: skip


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_any_number_of_batch_axes(implementation, quantization, random_operands, relative_error):
    """As with one axis, which they are flattened to: arguments, results and gradients."""
    rng = np.random.default_rng(2)
    arrays = random_operands(6, 9, 11, 4, 2, 8, 8)
    bias = rng.standard_normal((3, 1, 9, 11), np.float32)  # the first axis is shared
    mask = rng.integers(0, 3, (2, 3, 1, 9, 11))  # nonzero is visible
    lengths = rng.integers(1, 12, (2, 3))
    ids, at = rng.integers(0, 2, (2, 1, 9)), rng.integers(0, 2, (2, 3, 11))

    def run(bias, mask, lengths, ids, at, *arrays):
        def attention(bias, q, k, v):
            return jax_gluon.attention_with_log_sum_exp(
                q, k, v, bias, mask, key_value_seq_lengths=lengths, query_segment_ids=ids,
                key_value_segment_ids=at, quantization=quantization, implementation=implementation,
            )  # fmt: skip

        # Not jitted: XLA fuses what surrounds its own implementation, and rounds otherwise.
        (out, log_sum_exp), pullback = jax.vjp(attention, bias, *arrays[:3])
        return out, log_sum_exp, *pullback((arrays[3], jnp.zeros_like(log_sum_exp)))

    found = run(bias, mask, lengths, ids, at, *(x.reshape(2, 3, *x.shape[1:]) for x in arrays))
    flat = run(
        np.tile(bias, (2, 1, 1, 1)), mask.reshape(6, 1, 9, 11) != 0, lengths.ravel(),
        np.repeat(ids, 3, axis=1).reshape(6, 9), at.reshape(6, 11), *arrays,
    )  # fmt: skip
    assert found[2].shape == bias.shape
    assert relative_error(found[2], flat[2].reshape(2, *bias.shape).sum(0)) <= 1e-6
    for a, b in zip(found[:2] + found[3:], flat[:2] + flat[3:], strict=True):
        assert a.shape == (2, 3, *b.shape[1:])
        np.testing.assert_array_equal(a.reshape(b.shape), b)


def test_baseline_kernel_can_be_asked_for(implementation, random_operands):
    q, k, v, _ = random_operands()
    outputs = [
        jax_gluon.dot_product_attention(q, k, v, implementation=implementation, kernel=kernel)
        for kernel in (None, "baseline")
    ]
    np.testing.assert_array_equal(*outputs)


class TestExplain:
    def test_takes_shapes_and_arrays_alike(self, random_operands, monkeypatch):
        monkeypatch.setenv("JAX_GLUON_CPU_ISA", "portable")
        q, k, v, _ = random_operands()
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
        plan = jax_gluon.explain(*shapes, is_causal=True, quantization="int8")
        assert plan == jax_gluon.explain(q, k, v, is_causal=True, quantization="int8")
        assert plan.implementation == "cpu"
        assert plan.forward is not None
        assert plan.forward.name == "baseline"
        assert len(plan.reasons) == 3

    def test_says_what_was_asked_for(self, random_operands):
        q, k, v, _ = random_operands()
        plan = jax_gluon.explain(q, k, v, implementation="xla")
        assert (plan.implementation, plan.forward, plan.backward) == ("xla", None, None)
        assert 'implementation="xla"' in plan.reasons[0]
        plan = jax_gluon.explain(q, k, v, kernel="baseline", return_residual=True)
        assert 'kernel="baseline"' in plan.reasons[1]

    def test_float64_goes_to_xla(self, configure):
        with configure(jax_enable_x64=True):
            x = jax.ShapeDtypeStruct((1, 2, 3, 4), jnp.float64)
            plan = jax_gluon.explain(x, x, x)
        assert plan.implementation == "xla"
        assert "float64" in plan.reasons[0]

    def test_checks_its_arguments(self):
        x = jax.ShapeDtypeStruct((1, 2, 3, 4), jnp.int32)
        with pytest.raises(TypeError, match=r"jax_gluon\.explain: query is of dtype int32"):
            jax_gluon.explain(x, x, x)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_an_array_scale_does_not_overflow_float16(require, relative_error, implementation):
    require(implementation)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 5, 3, 4)).astype(np.float16) for _ in range(3))
    q, k = q * np.float16(1000), k * np.float16(1e-5)

    def loss(q, k, v, scale):
        out = jax_gluon.dot_product_attention(q, k, v, scale=scale, implementation=implementation)
        # Small, for gradients that are finite in float16.
        return 1e-3 * jnp.sum(out.astype(jnp.float32) ** 2), out

    @jax.jit
    def results(q, k, v):
        of = jax.grad(loss, (0, 1, 2), has_aux=True)
        return [jax.tree.leaves(of(q, k, v, scale)) for scale in (100.0, jnp.float16(100.0))]

    for expected, actual in zip(*results(q, k, v), strict=True):
        assert actual.dtype == jnp.float16
        assert relative_error(actual, expected) <= 5e-3


@pytest.mark.parametrize(
    ("each_head", "dtype", "quantization"),
    [(False, "float32", None), (False, "float16", "int8"),
     (True, "float32", "int8"), (True, "float16", None)],
)  # fmt: skip
def test_an_array_scale_and_its_gradient(
    each_head, dtype, quantization, implementation, oracle, fake_quantize, relative_error,
    random_operands,
):  # fmt: skip
    """Against float64; with codes, at the codes of query times scale."""
    q, k, v, d_out = random_operands(B, T, S, N, K, H=16, V=16, dtype=dtype)
    scales = [0.3, -0.2, 0.1, 0.25] if each_head else 0.3
    scale = jnp.asarray(scales, dtype)

    def attention(*x):
        return jax_gluon.dot_product_attention(
            *x[:3], scale=x[3], quantization=quantization, implementation=implementation
        )

    out, gradients = value_and_gradients(attention, (q, k, v, scale), None, d_out)
    by_row = np.broadcast_to(np.asarray(scale, np.float64), N)[:, None]
    scaled, operands = np.asarray(q, np.float64) * by_row, (k, v)
    if quantization:
        scaled, operands = fake_quantize(scaled), (fake_quantize(k, center=True), fake_quantize(v))
    exact = oracle(scaled, *operands, scale=1.0, d_out=d_out)
    axes = (0, 1, 3) if each_head else None
    d_scale = np.sum(exact.d_query * np.asarray(q, np.float64), axis=axes)
    expected = (exact.out, exact.d_query * by_row, exact.d_key, exact.d_value, d_scale)
    rounding = 2e-3 if dtype == "float16" else 0
    forward, backward = INT8_TOLERANCE[implementation] if quantization else (2e-6, 4e-6)
    for x, y, bar in zip(
        (out, *gradients), expected, (forward, *(backward,) * 3, 3 * backward), strict=True
    ):
        assert (x.shape, x.dtype) == (y.shape, dtype)
        assert relative_error(x, y) <= bar + rounding
