"""What NVIDIA GPUs are given: lowered for the platform here, where there is none of them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import _native
from jax_gluon._cuda import cudnn, mosaic
from jax_gluon._problem import AttentionOperands, AttentionProblem
from jax_gluon._xla import implementation as xla
from tests.support import oracle as numpy_oracle
from tests.support.arrays import placed

B, T, S, N, K, H = 2, 32, 48, 4, 2, 64
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


@pytest.fixture
def has_cudnn(monkeypatch):
    """JAX asks its CUDA plugin for cuDNN's version when a call is traced."""
    if cudnn._calls is None:
        pytest.skip("this JAX calls cuDNN in another way")
    monkeypatch.setattr(cudnn._calls, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(cudnn._calls, "check_compute_capability", lambda least: least == "8.0")
    if (why := cudnn.missing()) is not None:
        pytest.skip(why)


def shapes(dtype=jnp.bfloat16, head_major=False, T=T, H=H):
    def of(T, N):
        return jax.ShapeDtypeStruct((B, N, T, H) if head_major else (B, T, N, H), dtype)

    return of(T, N), of(S, K), of(S, K)


def gradient(**keywords):
    def loss(q, k, v):
        out = jax_gluon.dot_product_attention(q, k, v, **keywords)
        return jnp.sum(out.astype(jnp.float32))

    return jax.grad(loss, (0, 1, 2))


def calls(function, *arguments):
    """The names of the custom calls of a program for CUDA."""
    traced = jax.jit(function).trace(*arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"custom_call @([\w$]+)", text)


TAKEN = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "local_window_size": 7},
    "left_window": {"local_window_size": (7, 0)},
    "int8": {"quantization": "int8"},
    "head_major": {"layout": "BNTH"},
    "lengths": {"key_value_seq_lengths": np.asarray([48, 5], np.int32)},
    "forced": {"implementation": "cudnn"},
}
# What it is refused for, and of which operands.
REFUSED = {
    "float32": ({}, {"dtype": jnp.float32}),
    "head dims to 128 that 8 divides": ({}, {"H": 20}),
    "no mask": ({"mask": np.ones((1, 1, T, S), bool)}, {}),
    "no key_value_mask": ({"key_value_mask": np.ones((B, S), bool)}, {}),
    "no positions": ({"query_positions": np.arange(T), "key_value_positions": np.arange(S)}, {}),
    "no segment_ids": (
        {"query_segment_ids": np.zeros(T, int), "key_value_segment_ids": np.zeros(S, int)}, {},
    ),
    "no sinks": ({"sinks": np.zeros(N, np.float32)}, {}),
    "no query_offset": ({"query_offset": 3}, {}),
    "soft cap": ({"logits_soft_cap": 3.0}, {}),
    "positive scale": ({"scale": -1.0}, {}),
    "a scale that is a Python number": ({"scale": np.ones(N, np.float32)}, {}),
    "windows to the left": ({"local_window_size": (3, 3)}, {}),
    "at most as many as keys": ({"local_window_size": (3, 0)}, {"T": 100}),
    "a bias bfloat16": ({"bias": np.zeros((1, 1, T, S), np.float32)}, {}),
    "dropout": ({"dropout_rate": 0.5, "dropout_rng": np.zeros(2, np.uint32)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_cudnn_takes_each_pass_once(case, has_cudnn):
    """Backward reads what forward kept: it does not run forward again."""
    given = shapes(head_major=case == "head_major")
    assert calls(gradient(**TAKEN[case]), *given) == [FORWARD, BACKWARD]


def test_odd_numbers_of_tokens(has_cudnn):
    """Which JAX's call refuses to differentiate: they are padded."""
    assert calls(gradient(is_causal=True), *shapes(T=33)) == [FORWARD, BACKWARD]


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason, has_cudnn, monkeypatch):
    keywords, of_shapes = REFUSED[reason]
    given = shapes(**of_shapes)
    with pytest.raises(ValueError, match=f'implementation is "cudnn", but .*{reason}'):
        jax_gluon.explain(*given, implementation="cudnn", **keywords)
    forced = functools.partial(jax_gluon.dot_product_attention, implementation="cudnn", **keywords)
    with pytest.raises(ValueError, match=f"jax_gluon.dot_product_attention: .*{reason}"):
        jax.eval_shape(forced, *given)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    plan = jax_gluon.explain(*given, **keywords)
    assert plan.implementation == "xla"
    assert re.search(reason, plan.reasons[0])


def test_a_refused_problem_runs_in_xla(has_cudnn):
    keywords, of_shapes = REFUSED["no sinks"]
    assert not calls(gradient(**keywords), *shapes(**of_shapes))
    assert not calls(gradient(implementation="xla"), *shapes())


def test_explain_on_a_gpu(has_cudnn, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    plan = jax_gluon.explain(*shapes(), is_causal=True)
    assert (plan.implementation, plan.forward) == ("cudnn", None)


@pytest.mark.parametrize("capability", [7.5, 10.3])
def test_gpus_that_cudnn_does_not_take(capability, has_cudnn, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn._calls, "check_cudnn_version", lambda: 90900)
    has = lambda least: float(least) <= capability  # noqa: E731
    monkeypatch.setattr(cudnn._calls, "check_compute_capability", has)
    plan = jax_gluon.explain(*shapes())
    assert plan.implementation == "xla"
    assert ("8.0" if capability < 8 else "9.11") in plan.reasons[0]


def test_without_cudnn():
    if cudnn.missing() is None:
        pytest.skip("JAX finds cuDNN here")
    with pytest.raises(ValueError, match='implementation is "cudnn", but JAX'):
        jax_gluon.explain(*shapes(), implementation="cudnn")
    assert not calls(gradient(scale=0.122), *shapes())  # traced anew


ROWS, CENTERED = jax_gluon.QuantSpec(), jax_gluon.QuantSpec(center=True)
BLOCKS = jax_gluon.QuantSpec(granularity="block", block_size=128, center=True)


def codes_of(query=ROWS, key=CENTERED):
    return jax_gluon.AttentionQuantization(query, key)


# What the kernel for codes is refused for.
PALLAS_REFUSED = {
    "a query of symmetric INT8 rows without a center, not None": {},
    "without a center, not QuantSpec": {"quantization": codes_of(CENTERED)},
    "INT8 rows or blocks, not QuantSpec": {
        "quantization": codes_of(key=jax_gluon.QuantSpec(symmetric=False))
    },
    "a multiple of 128 keys, not of 32": {
        "quantization": codes_of(key=jax_gluon.QuantSpec(granularity="block"))
    },
    "head dim of 128, not 64": {"quantization": "int8", "H": 64},
    "no window": {"quantization": "int8", "is_causal": True, "local_window_size": 7},
    "no key_value_seq_lengths": {
        "quantization": "int8", "key_value_seq_lengths": np.asarray([48, 5], np.int32)
    },
    "cuDNN takes no sinks": {"quantization": "int8", "sinks": np.zeros(N, np.float32)},
    "bfloat16 and float16, not float32": {"quantization": "int8", "dtype": jnp.float32},
}  # fmt: skip


@pytest.fixture
def has_mosaic(has_cudnn, monkeypatch):
    monkeypatch.setattr(mosaic, "missing", lambda: None)


@pytest.mark.parametrize("reason", PALLAS_REFUSED)
def test_refusals_of_codes(reason, has_mosaic):
    keywords = {"H": 128} | PALLAS_REFUSED[reason]
    given = shapes(keywords.pop("dtype", jnp.bfloat16), H=keywords.pop("H"))
    forced = functools.partial(jax_gluon.dot_product_attention, implementation="pallas", **keywords)
    message = f'dot_product_attention: .*is "pallas", but .*{reason}'
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(forced, *given)
    with pytest.raises(ValueError, match=reason):
        jax_gluon.explain(*given, implementation="pallas", **keywords)


@pytest.mark.parametrize("key", [ROWS, CENTERED, BLOCKS])
def test_explain_of_codes(key, has_mosaic, monkeypatch):
    """Taken where it is asked for, and of many tokens by itself."""
    given = shapes(H=128)
    keywords = dict(quantization=codes_of(key=key), is_causal=True)
    plan = jax_gluon.explain(*given, implementation="pallas", **keywords)
    assert (plan.implementation, plan.forward) == ("pallas", None)
    assert "multiplies codes" in plan.reasons[1]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert jax_gluon.explain(*given, **keywords).implementation == "cudnn"
    many = [jax.ShapeDtypeStruct((1, tokens, 2, 128), jnp.bfloat16) for tokens in (4096, 4095)]
    for query, key, taken in ((0, 0, "pallas"), (0, 1, "cudnn"), (1, 0, "cudnn")):
        plan = jax_gluon.explain(many[query], many[key], many[key], **keywords)
        assert plan.implementation == taken
    assert jax_gluon.explain(*[many[0]] * 3, is_causal=True).implementation == "cudnn"


@pytest.mark.parametrize("capability", ["8.0", "10.0", None])
def test_gpus_that_the_kernel_for_codes_does_not_take(capability, has_cudnn, monkeypatch):
    given = shapes(H=128)
    explain = functools.partial(jax_gluon.explain, *given, quantization="int8")
    if mosaic.missing() is not None:
        with pytest.raises(ValueError, match='is "pallas", but JAX'):
            explain(implementation="pallas")
    gpu = type("Gpu", (), {"compute_capability": capability})()
    monkeypatch.setattr(mosaic, "_is_known", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [gpu])
    with pytest.raises(ValueError, match=f"compute capability 9.0, not {capability}"):
        explain(implementation="pallas")


@pytest.mark.parametrize("bits", [4, 8])
def test_narrow_scales_are_rounded_where_a_cast_would_be_dropped(bits):
    """XLA drops a cast to bfloat16 and back on GPUs, and codes would be of another scale."""
    spec = jax_gluon.QuantSpec(bits=bits, granularity="block")
    quantize = functools.partial(jax_gluon.quantize, spec=spec, implementation="xla")
    text = jax.jit(quantize).lower(jnp.ones((1, 64, 1, 8))).as_text()
    assert "reduce_precision" in text


def test_nobody_misses_the_plugin_where_programs_run_elsewhere(monkeypatch):
    monkeypatch.setattr(_native, "has_plugin", lambda: False)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert not calls(gradient(scale=0.123), *shapes(jnp.float32))
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")

    def missing():
        raise ImportError("no plugin")

    monkeypatch.setattr(_native, "plugin", missing)
    with pytest.raises(ImportError, match="no plugin"):
        calls(gradient(scale=0.124), *shapes(jnp.float32))


SMALL = dataclasses.replace(xla.GPU, rows=16, keys=32, scores=B * N * 16 * 32, kept=2**13)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("not_finite", [None, "hidden keys", "cotangent of a hidden row"])
def test_large_tiles(dtype, is_causal, not_finite):
    """Of GPUs: 16-bit operands multiplied as they are, unless one is not finite."""
    rng = np.random.default_rng(3)
    q, k, v, d_out = (
        rng.standard_normal(shape, np.float32).astype(dtype)
        for shape in ((B, T + 1, N, 24), (B, S, K, 24), (B, S, K, 24), (B, T + 1, N, 24))
    )
    lengths, of_queries = np.asarray([40, 17], np.int32), np.asarray([T, 21], np.int32)
    exact = numpy_oracle.attention(
        q, k, v, is_causal=is_causal, key_value_seq_lengths=lengths, d_out=d_out,
        query_seq_lengths=of_queries,
    )  # fmt: skip
    if not_finite == "hidden keys":
        hidden = np.arange(S) >= lengths[:, None]
        k, v = (np.where(hidden[..., None, None], np.asarray(np.nan, dtype), x) for x in (k, v))
    elif not_finite:
        d_out = np.where(
            (np.arange(T + 1) >= of_queries[:, None])[..., None, None],
            np.asarray(np.nan, dtype),
            d_out,
        )
    problem = AttentionProblem(24**-0.5, is_causal=is_causal)

    @jax.jit
    def run(q, k, v, d_out, lengths, of_queries):
        operands = AttentionOperands(
            q, k, v, query_seq_lengths=of_queries, key_value_seq_lengths=lengths
        )
        _, residuals = xla.forward(problem, q.dtype, operands, SMALL)
        return residuals.out, *xla.backward(problem, residuals, d_out, None, SMALL)

    given = [placed(x) for x in (q, k, v, d_out, lengths, of_queries)]
    if dtype == "bfloat16" and not not_finite:
        # Without optimizations XLA's CPU has no such product: tests/cuda runs it.
        text = run.lower(*given).as_text()
        assert re.search(r"dot_general.*bf16>, tensor<\w+xbf16>\) -> tensor<\w+xf32>", text)
        return
    found = run(*given)
    for x, y in zip(found, (exact.out, *exact[2:5]), strict=True):
        error = np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)
        assert error <= (3e-6 if dtype == "float32" else 7e-3)
