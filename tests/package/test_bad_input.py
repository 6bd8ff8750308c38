"""Every bad argument is an exception that names function, argument, what was found and allowed."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon

B, T, S, N, K, H = 2, 5, 7, 4, 2, 8
f32 = jnp.float32


def operands():
    return {
        "query": jnp.ones((B, T, N, H), f32),
        "key": jnp.ones((B, S, K, H), f32),
        "value": jnp.ones((B, S, K, H), f32),
    }


def ones(*shape, dtype=f32):
    return jnp.ones(shape, dtype)


def _codes():
    return jax_gluon.quantize(ones(B, S, K, H), jax_gluon.QuantSpec(), implementation="xla")


# name of the case: (changed arguments, error, argument, found, allowed)
CASES = {
    "layout": (
        {"layout": "BHTN"}, ValueError, "layout", "'BHTN'", '"BTNH", "BNTH"'
    ),
    "layout_none": ({"layout": None}, ValueError, "layout", "None", '"BTNH", "BNTH"'),
    "layout_of_codes": (
        {"layout": "BNTH", "key": _codes()},
        ValueError, "layout", '"BNTH" beside key in codes', '"BTNH", as codes are',
    ),
    "layout_rank": (
        {"layout": "BNTH", "key": ones(S, H)}, ValueError, "key", "of rank 2", "[..., K, S, H]"
    ),
    "layout_heads": (
        {"layout": "BNTH", "query": ones(B, 3, T, H), "key": ones(B, K, S, H),
         "value": ones(B, K, S, H)},
        ValueError, "query", "of 3 heads", "a multiple of key's 2 heads",
    ),
    "segment_ids_of_one_side": (
        {"query_segment_ids": np.zeros((B, T), np.int32)},
        ValueError, "key_value_segment_ids", "None", "one array for both needs T = S",
    ),
    "positions_of_one_side": (
        {"key_value_positions": np.zeros(S, np.int32)},
        ValueError, "query_positions", "None", "one array for both needs T = S",
    ),
    "segment_ids_shape": (
        {"query_segment_ids": np.zeros((B, S), int), "key_value_segment_ids": np.zeros(S, int)},
        ValueError, "query_segment_ids", "of shape [2, 7]", "shape [B, T] = [2, 5], or [T]",
    ),
    "segment_ids_of_another_batch": (
        {"query_segment_ids": np.zeros(T, int), "key_value_segment_ids": np.zeros((3, S), int)},
        ValueError, "key_value_segment_ids", "of shape [3, 7]", "shape [B, S] = [2, 7], or [S]",
    ),
    "key_value_mask_shape": (
        {"key_value_mask": np.ones((B, T), bool)},
        ValueError, "key_value_mask", "of shape [2, 5]", "shape [B, S] = [2, 7], or [S]",
    ),
    "key_value_mask_float": (
        {"key_value_mask": np.ones(S, np.float32)},
        TypeError, "key_value_mask", "of dtype float32", "an integer dtype (nonzero: visible)",
    ),
    "positions_float": (
        {"query_positions": np.zeros(T), "key_value_positions": np.zeros(S, int)},
        TypeError, "query_positions", "of dtype float64", "an integer dtype",
    ),
    "positions_past_32_bits": (
        {"query_positions": [2**31] * T, "key_value_positions": np.zeros(S, int)},
        ValueError, "query_positions", "from 2147483648 to 2147483648", "numbers of 32 bits",
    ),
    "positions_uint32": (
        {"query_positions": jnp.zeros(T, jnp.uint32), "key_value_positions": np.zeros(S, int)},
        TypeError, "query_positions", "of dtype uint32", "int32: write .astype(jnp.int32)",
    ),
    "query_offset_shape": (
        {"query_offset": np.zeros(3, int)},
        ValueError, "query_offset", "of shape [3]", "a scalar, or shape [B] = [2]",
    ),
    "query_offset_float": (
        {"query_offset": 1.5}, TypeError, "query_offset", "of dtype float64", "an integer dtype"
    ),
    "query_offset_and_positions": (
        {"query_offset": 1, "query_positions": np.zeros(T, int),
         "key_value_positions": np.zeros(S, int)},
        ValueError, "query_offset", "set beside query_positions", "one of the two",
    ),
    "query_rank_2": ({"query": ones(T, H)}, ValueError, "query", "of rank 2", "rank 3 or more"),
    "query_rank_5": (
        {"query": ones(1, B, T, N, H)}, ValueError, "key", "of rank 4", "query's rank, 5"
    ),
    "query_scalar": ({"query": 1.0}, ValueError, "query", "of rank 0", "rank 3 or more"),
    "key_rank_2": ({"key": ones(S, H)}, ValueError, "key", "of rank 2", "[..., S, K, H]"),
    "value_rank_1": ({"value": ones(S)}, ValueError, "value", "of rank 1", "[..., S, K, H]"),
    "key_rank_unlike_query": (
        {"key": ones(S, K, H)}, ValueError, "key", "of rank 3", "query's rank, 4"
    ),
    "value_rank_unlike_query": (
        {"value": ones(S, K, H)}, ValueError, "value", "of rank 3", "query's rank, 4"
    ),
    "query_none": ({"query": None}, TypeError, "query", "NoneType", "an array or a list"),
    "key_string": ({"key": "key"}, TypeError, "key", "str", "an array or a list"),
    "value_ragged": (
        {"value": [[[1.0], [1.0, 2.0]]]}, TypeError, "value", "list", "an array or a list"
    ),
    "query_int": (
        {"query": ones(B, T, N, H, dtype=jnp.int32)},
        TypeError, "query", "of dtype int32", "float32, bfloat16, float16, float64",
    ),
    "query_bool": (
        {"query": ones(B, T, N, H, dtype=jnp.bool_)},
        TypeError, "query", "of dtype bool", "float32, bfloat16, float16, float64",
    ),
    "query_complex": (
        {"query": ones(B, T, N, H, dtype=jnp.complex64)},
        TypeError, "query", "of dtype complex64", "float32, bfloat16, float16, float64",
    ),
    "query_float8": (
        {"query": ones(B, T, N, H, dtype=jnp.float8_e4m3fn)},
        TypeError, "query", "of dtype float8_e4m3fn", "float32, bfloat16, float16, float64",
    ),
    "key_dtype": (
        {"key": ones(B, S, K, H, dtype=jnp.bfloat16)},
        TypeError, "key", "of dtype bfloat16",
        "query's dtype, float32; write key.astype(jnp.float32)",
    ),
    "value_dtype": (
        {"query": ones(B, T, N, H, dtype=jnp.bfloat16), "key": ones(B, S, K, H, dtype=jnp.bfloat16),
         "value": ones(B, S, K, H, dtype=jnp.float16)},
        TypeError, "value", "of dtype float16",
        "write query.astype(jnp.float32) and key.astype(jnp.float32) and value.astype(jnp.float32)",
    ),
    "key_batch": (
        {"key": ones(1, S, K, H)}, ValueError, "key", "of batch axes [1]", "query's, [2]"
    ),
    "value_batch": (
        {"value": ones(3, S, K, H)}, ValueError, "value", "of batch axes [3]", "query's, [2]"
    ),
    "key_head_dim": (
        {"key": ones(B, S, K, 9)}, ValueError, "key", "of head dim 9", "query's head dim, 8"
    ),
    "value_length": (
        {"value": ones(B, 6, K, H)}, ValueError, "value", "of length 6", "key's length, 7"
    ),
    "value_heads": (
        {"value": ones(B, S, 4, H)}, ValueError, "value", "of 4 heads", "key's number of heads, 2"
    ),
    "heads_do_not_divide": (
        {"query": ones(B, T, 3, H)},
        ValueError, "query", "of 3 heads", "a multiple of key's 2 heads",
    ),
    "more_kv_heads_than_heads": (
        {"query": ones(B, T, 1, H)},
        ValueError, "query", "of 1 heads", "a multiple of key's 2 heads",
    ),
    "no_query_heads": (
        {"query": ones(B, T, 0, H)}, ValueError, "query", "of heads 0", "at least 1"
    ),
    "no_kv_heads": (
        {"key": ones(B, S, 0, H), "value": ones(B, S, 0, H)},
        ValueError, "key", "of heads 0", "at least 1",
    ),
    "head_dim_0": (
        {"query": ones(B, T, N, 0), "key": ones(B, S, K, 0)},
        ValueError, "query", "of head dim 0", "at least 1",
    ),
    "value_head_dim_0": (
        {"value": ones(B, S, K, 0)}, ValueError, "value", "of head dim 0", "at least 1"
    ),
    "bias_rank": (
        {"bias": ones(1, B, N, T, S)},
        ValueError, "bias", "of shape [1, 2, 4, 5, 7]", "[B, N, T, S] = [2, 4, 5, 7]",
    ),
    "bias_shape": (
        {"bias": ones(T, S + 1)}, ValueError, "bias", "of shape [5, 8]", "[2, 4, 5, 7]"
    ),
    "bias_kv_heads": (
        {"bias": ones(B, K, T, S)}, ValueError, "bias", "of shape [2, 2, 5, 7]", "[2, 4, 5, 7]"
    ),
    "bias_empty": (
        {"bias": ones(B, N, T, 0)}, ValueError, "bias", "of shape [2, 4, 5, 0]", "[2, 4, 5, 7]"
    ),
    "bias_int": (
        {"bias": ones(T, S, dtype=jnp.int32)},
        TypeError, "bias", "of dtype int32", "a floating dtype",
    ),
    "bias_bool": (
        {"bias": ones(T, S, dtype=jnp.bool_)}, TypeError, "bias", "of dtype bool", "floating dtype"
    ),
    "mask_shape": (
        {"mask": ones(B, N, S, T, dtype=jnp.bool_)},
        ValueError, "mask", "of shape [2, 4, 7, 5]", "[2, 4, 5, 7]",
    ),
    "mask_rank": (
        {"mask": ones(1, 1, 1, 1, 1, dtype=jnp.bool_)},
        ValueError, "mask", "of shape [1, 1, 1, 1, 1]", "[2, 4, 5, 7]",
    ),
    "mask_float": (
        {"mask": ones(T, S)}, TypeError, "mask", "of dtype float32", "bool (True: visible)"
    ),
    "query_seq_lengths_shape": (
        {"query_seq_lengths": ones(3, dtype=jnp.int32)},
        ValueError, "query_seq_lengths", "of shape [3]", "shape [B] = [2]",
    ),
    "query_seq_lengths_rank": (
        {"query_seq_lengths": 3}, ValueError, "query_seq_lengths", "of shape []", "shape [B] = [2]"
    ),
    "key_value_seq_lengths_rank": (
        {"key_value_seq_lengths": ones(2, 1, dtype=jnp.int32)},
        ValueError, "key_value_seq_lengths", "of shape [2, 1]", "shape [B] = [2]",
    ),
    "query_seq_lengths_dtype": (
        {"query_seq_lengths": ones(2, dtype=jnp.float32)},
        TypeError, "query_seq_lengths", "of dtype float32", "an integer dtype",
    ),
    "key_value_seq_lengths_dtype": (
        {"key_value_seq_lengths": ones(2, dtype=jnp.bool_)},
        TypeError, "key_value_seq_lengths", "of dtype bool", "an integer dtype",
    ),
    "scale_nan": ({"scale": float("nan")}, ValueError, "scale", "nan", "finite"),
    "scale_inf": ({"scale": -np.inf}, ValueError, "scale", "-inf", "finite"),
    "scale_overflows": ({"scale": 1e39}, ValueError, "scale", "1e+39", "finite in float32"),
    "scale_bool": ({"scale": True}, TypeError, "scale", "bool", "a real Python or NumPy number"),
    "scale_complex": ({"scale": 1j}, TypeError, "scale", "complex", "a real"),
    "scale_numpy_complex": (
        {"scale": np.complex64(1)}, TypeError, "scale", "complex64", "a real"
    ),
    "scale_string": ({"scale": "1"}, TypeError, "scale", "str", "a real Python or NumPy number"),
    "scale_vector": (
        {"scale": ones(N + 1)}, ValueError, "scale", "of shape [5]", "a scalar, or a scale for each"
    ),
    "scale_matrix": (
        {"scale": np.ones((1, N))}, ValueError, "scale", "of shape [1, 4]", "head, [N] = [4]"
    ),
    "scale_complex_array": (
        {"scale": jnp.asarray(1j)}, TypeError, "scale", "of dtype complex64", "a real number"
    ),
    "is_causal_int": ({"is_causal": 1}, TypeError, "is_causal", "int", "True or False"),
    "is_causal_none": ({"is_causal": None}, TypeError, "is_causal", "NoneType", "True or False"),
    "return_residual": (
        {"return_residual": "yes"}, TypeError, "return_residual", "str", "True or False"
    ),
    "window_negative": (
        {"local_window_size": -1}, ValueError, "local_window_size", "-1", "an int >= 0"
    ),
    "window_pair_negative": (
        {"local_window_size": (1, -2)}, ValueError, "local_window_size", "(1, -2)", "an int >= 0"
    ),
    "window_triple": (
        {"local_window_size": (1, 2, 3)}, ValueError, "local_window_size", "(1, 2, 3)", "a pair"
    ),
    "window_float": (
        {"local_window_size": 2.0}, TypeError, "local_window_size", "2.0", "an int >= 0"
    ),
    "window_pair_none": (
        {"local_window_size": (1, None)}, TypeError, "local_window_size", "(1, None)", "a pair"
    ),
    "window_bool": (
        {"local_window_size": True}, TypeError, "local_window_size", "True", "an int >= 0"
    ),
    "window_string": (
        {"local_window_size": "12"}, TypeError, "local_window_size", "'12'", "an int >= 0"
    ),
    "soft_cap_zero": ({"logits_soft_cap": 0.0}, ValueError, "logits_soft_cap", "0.0", "positive"),
    "soft_cap_negative": ({"logits_soft_cap": -5}, ValueError, "logits_soft_cap", "-5", "positive"),
    "soft_cap_tiny": (
        {"logits_soft_cap": 1e-300}, ValueError, "logits_soft_cap", "1e-300", "finite in float32"
    ),
    "soft_cap_inf": (
        {"logits_soft_cap": np.inf}, ValueError, "logits_soft_cap", "inf", "None or a positive"
    ),
    "soft_cap_nan": (
        {"logits_soft_cap": np.nan}, ValueError, "logits_soft_cap", "nan", "None or a positive"
    ),
    "soft_cap_array": (
        {"logits_soft_cap": ones(N)}, TypeError, "logits_soft_cap", "Array", "NumPy number"
    ),
    "quantization_unknown": (
        {"quantization": "int3"}, ValueError, "quantization", '"int3"', 'None, "int8", "int4"'
    ),
    "quantization_type": ({"quantization": 8}, TypeError, "quantization", "int", 'None, "int8"'),
    "implementation_unknown": (
        {"implementation": "cuda"}, ValueError, "implementation", '"cuda"',
        'None, "cpu", "metal", "xla"',
    ),
    "implementation_type": (
        {"implementation": 1}, TypeError, "implementation", "int", 'None, "cpu", "metal", "xla"'
    ),
    "kernel_unknown": (
        {"kernel": "fast"}, ValueError, "kernel", '"fast"', 'None, "baseline", "gluon"'
    ),
    "kernel_type": ({"kernel": 2}, TypeError, "kernel", "int", 'None, "baseline"'),
    "kernel_of_a_pair": (
        {"kernel": ("baseline", "fast")}, ValueError, "kernel", '"fast"',
        'None, "baseline", "gluon"',
    ),
    "kernel_triple": (
        {"kernel": ("baseline",) * 3}, ValueError, "kernel", "of length 3",
        "a pair, of forward and of backward",
    ),
    "kernel_name": (
        {"kernel": jax_gluon.CpuKernel("fast")}, ValueError, "kernel",
        '"fast"', "a CpuKernel, a MetalKernel, a pair of these",
    ),
    "kernel_size": (
        {"kernel": jax_gluon.CpuKernel("gluon", block_k=0)}, ValueError, "kernel.block_k",
        "0", "an int of at least 1",
    ),
    "kernel_size_type": (
        {"kernel": jax_gluon.CpuKernel("gluon", stages=2.0)}, TypeError, "kernel.stages",
        "2.0", "an int of at least 1",
    ),
    "kernel_of_xla": (
        {"kernel": jax_gluon.CpuKernel("baseline")}, ValueError, "kernel",
        "for implementation 'xla'", "one of a device that the call may run on",
    ),
    "kernel_gluon": (
        {"kernel": "gluon"}, ValueError, "kernel", '"gluon"',
        'None, "baseline": "xla" has no kernels to choose from',
    ),
    "dropout_without_a_key": (
        {"dropout_rate": 0.1}, ValueError, "dropout_rng", "None", "a key, where dropout_rate is 0.1"
    ),
    "dropout_rng_is_a_number": (
        {"dropout_rate": 0.1, "dropout_rng": 7}, TypeError, "dropout_rng", "a int", "a key"
    ),
    "dropout_rng_keys": (
        {"dropout_rate": 0.1, "dropout_rng": jax.random.split(jax.random.key(0), 2)},
        ValueError, "dropout_rng", "keys of shape [2]", "one key",
    ),
    "broadcast_dropout": (
        {"broadcast_dropout": 1}, TypeError, "broadcast_dropout", "a int", "True or False"
    ),
    "dropout_negative": (
        {"dropout_rate": -0.1}, ValueError, "dropout_rate", "-0.1", "a number in [0, 1)"
    ),
    "dropout_one": ({"dropout_rate": 1}, ValueError, "dropout_rate", "1.0", "a number in [0, 1)"),
    "dropout_nan": (
        {"dropout_rate": np.nan}, ValueError, "dropout_rate", "nan", "a number in [0, 1)"
    ),
    "dropout_none": (
        {"dropout_rate": None}, TypeError, "dropout_rate", "NoneType", "NumPy number"
    ),
    "sinks_of_kv_heads": (
        {"sinks": ones(K)}, ValueError, "sinks", f"of shape [{K}]",
        f"a logit for each query head, [N] = [{N}]",
    ),
    "sinks_scalar": ({"sinks": 0.5}, ValueError, "sinks", "of shape []", f"[N] = [{N}]"),
    "sinks_rank": ({"sinks": ones(1, N)}, ValueError, "sinks", f"[1, {N}]", f"[N] = [{N}]"),
    "sinks_integers": (
        {"sinks": np.zeros(N, np.int32)}, TypeError, "sinks", "of dtype int32", "float32, bfloat16"
    ),
    "sinks_bool": ({"sinks": np.ones(N, bool)}, TypeError, "sinks", "of dtype bool", "float32"),
    "sinks_string": ({"sinks": "many"}, TypeError, "sinks", "a str", "an array or a list"),
}  # fmt: skip


def assert_says(error, function, argument, found, allowed):
    text = str(error.value)
    pattern = (
        rf"jax_gluon\.{function}: {argument} is .*{re.escape(found)}.*allowed: .*"
        rf"{re.escape(allowed)}"
    )
    assert re.match(pattern, text, re.DOTALL), text


@pytest.mark.parametrize("case", CASES)
def test_bad_argument_of_dot_product_attention(case):
    changed, error_type, argument, found, allowed = CASES[case]
    with pytest.raises(error_type) as error:
        jax_gluon.dot_product_attention(**{**operands(), "implementation": "xla", **changed})
    assert error.type is error_type
    assert_says(error, "dot_product_attention", argument, found, allowed)


@pytest.mark.parametrize("case", [case for case in CASES if case != "return_residual"])
def test_bad_argument_of_attention_with_log_sum_exp(case):
    changed, error_type, argument, found, allowed = CASES[case]
    with pytest.raises(error_type) as error:
        jax_gluon.attention_with_log_sum_exp(**{**operands(), "implementation": "xla", **changed})
    assert_says(error, "attention_with_log_sum_exp", argument, found, allowed)


@pytest.mark.parametrize("case", CASES)
def test_bad_argument_of_explain(case):
    changed, error_type, argument, found, allowed = CASES[case]
    arguments = {**operands(), "implementation": "xla", **changed}
    with pytest.raises(error_type) as error:
        jax_gluon.explain(**arguments)
    assert_says(error, "explain", argument, found, allowed)


@pytest.mark.parametrize("function", ["attention_with_log_sum_exp", "explain"])
def test_unknown_keyword_is_named(function):
    with pytest.raises(TypeError, match=rf'{function}: unexpected keyword argument "causal"'):
        getattr(jax_gluon, function)(**operands(), causal=True)
    with pytest.raises(TypeError, match="causal"):
        jax_gluon.dot_product_attention(**operands(), causal=True)


def test_float64_with_the_cpu_kernels_says_why(configure):
    with configure(jax_enable_x64=True):
        x = jnp.ones((1, 2, 3, 4), jnp.float64)
        with pytest.raises(ValueError, match="float64 operands, which its kernels do not take"):
            jax_gluon.dot_product_attention(x, x, x, implementation="cpu")


LENGTHS = {
    "list": [2**33, -1],
    "numpy_int64": np.array([2**33, -(2**33)]),
    "numpy_uint8": np.array([200, 0], np.uint8),
    "jax_int64": lambda: jnp.array([2**33, -(2**33)]),
}


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("is_traced", [False, True])
def test_lengths_of_any_integer_dtype_are_clamped(configure, kind, is_traced):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 2, 4)), jnp.float32)
    spec = jax_gluon.QuantSpec(center=True)

    def run(lengths):
        out = jax_gluon.dot_product_attention(
            x, x, x, key_value_seq_lengths=lengths, implementation="xla"
        )
        mean = jax_gluon.quantize(x, spec, lengths=lengths, implementation="xla").center
        cache = jax_gluon.QuantizedKVCache.create(2, 16, 2, 4)
        return out, mean, cache.append(x, x, lengths).length

    with configure(jax_enable_x64=True):
        lengths = LENGTHS[kind]() if callable(LENGTHS[kind]) else LENGTHS[kind]
        if is_traced:
            out, mean, length = jax.jit(run)(jnp.asarray(lengths))
        else:
            out, mean, length = run(lengths)
    assert out[0].all()
    assert not out[1].any()
    np.testing.assert_array_equal(mean[0, 0], np.sort(x[0], axis=0)[1])
    assert not mean[1].any()
    assert length.tolist() == [3, 0]


def test_an_empty_list_of_lengths_is_taken():
    x = jnp.ones((0, 3, 2, 4))
    spec = jax_gluon.QuantSpec(center=True)
    assert jax_gluon.quantize(x, spec, lengths=[], implementation="xla").shape == x.shape
    out = jax_gluon.dot_product_attention(x, x, x, query_seq_lengths=[], implementation="xla")
    assert out.shape == x.shape


@pytest.mark.parametrize("argument", ["is_causal", "logits_soft_cap", "dropout_rate"])
def test_traced_static_argument_is_refused(argument):
    def attention(x):
        return jax_gluon.dot_product_attention(**operands(), implementation="xla", **{argument: x})

    with pytest.raises(TypeError, match=rf"dot_product_attention: {argument} is a "):
        jax.jit(attention)(jnp.asarray(0.0))


def test_missing_plugin_is_reported_by_the_call_that_needs_it(monkeypatch):
    from jax_gluon import _lowering, _native

    def fail(name):
        raise ImportError("libfoo.so: cannot open shared object file")

    monkeypatch.setattr(_native.importlib, "import_module", fail)
    _native.plugin.cache_clear()
    _lowering.forward.clear_cache()
    try:
        _native.register()
        for implementation in ("cpu", None):
            with pytest.raises(ImportError, match=r"The cause: libfoo\.so") as error:
                jax_gluon.dot_product_attention(**operands(), implementation=implementation)
            assert isinstance(error.value.__cause__, ImportError)
        out = jax_gluon.dot_product_attention(**operands(), implementation="xla")
        assert out.shape == (B, T, N, H)
    finally:
        _native.plugin.cache_clear()


LEAST = np.finfo(np.float32).min


@pytest.mark.parametrize("lowest", [-np.inf, -1e9, LEAST, jnp.bfloat16(-1e9), jnp.float16(-65504)])
def test_a_bias_that_a_soft_cap_keeps_from_hiding_is_warned_of(lowest):
    bias = np.zeros((B, 1, 1, S), getattr(lowest, "dtype", np.float32))
    bias[1, ..., 3:] = lowest
    visible = np.ones((T, S), bool)
    attend = functools.partial(
        jax_gluon.dot_product_attention, **operands(), implementation="xla", logits_soft_cap=30.0
    )
    says = r"jax_gluon\.dot_product_attention: bias is as low as .*_cap 30 .* -30; allowed: mask"
    for given in (bias, jnp.asarray(bias)):
        with pytest.warns(UserWarning, match=says) as warned:
            attend(bias=given, mask=visible)
        assert warned[0].filename == __file__
    # Hidden by the mask as well; traced; without a cap.
    attend(bias=bias, mask=bias == 0)
    jax.jit(lambda bias: attend(bias=bias))(bias)
    attend(bias=bias, logits_soft_cap=None)
    attend(bias=np.where(bias == 0, np.float32(1e4), np.float32(-6e4)))
