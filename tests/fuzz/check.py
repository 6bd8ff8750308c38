"""A case run and compared.

The error of a sum is bounded by what was summed: eps times the sum of absolute terms, as oneDNN
bounds it, and never by a sum that may have cancelled. An error of a logit, eps of the terms of its
own sum, multiplies its probability. Floats are compared element by element. Where operands are
codes, whose probabilities and rows may be rounded to 8 bits, the norm of the error is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_gluon
from jax_gluon._doctor.self_test import forced_variant
from tests.fuzz.cases import Case
from tests.support import oracle

_EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}
#: Of codes, which a kernel may round again: relative L2, to what was summed.
_OF_CODES = 3e-2


class Problem(NamedTuple):
    """Operands in NumPy, as the oracle reads them, and the arguments of both."""

    arrays: list[np.ndarray]  # query, key, value and, where there is one, bias
    d_out: np.ndarray
    keywords: dict[str, Any]
    dropout: dict[str, Any]


def build(case: Case) -> Problem:
    """The arrays of a case; NaN where rules hide it from everyone."""
    rng = np.random.default_rng(case.seed + 1)
    B, T, S, N, K = case.B, case.T, case.S, case.N, case.K
    rules = set(case.rules)

    def floats(*shape: int) -> np.ndarray:
        x = rng.standard_normal(shape)
        if case.kind == "outliers":
            x = np.where(rng.random(shape) < 0.01, 30 * x, x)
        elif case.kind == "large":
            x *= 50
        elif case.kind == "tiny":
            x *= 1e-4
        elif case.kind == "integers":
            x = np.round(2 * x)
        elif case.kind == "constant":
            x = np.full(shape, x.flat[0])
        return x.astype(case.dtype)

    query, key, value = floats(B, T, N, case.H), floats(B, S, K, case.H), floats(B, S, K, case.V)
    if case.kind == "peaked":
        query = (8 * query.astype(np.float32)).astype(case.dtype)
    d_out = rng.standard_normal((B, T, N, case.V)).astype(case.dtype)
    keywords: dict[str, Any] = {}
    bias = None

    def some(*shape: int) -> np.ndarray:
        return rng.random(shape) < rng.choice((0.1, 0.5, 0.9))

    def ids(extent: int) -> np.ndarray:
        return np.sort(rng.integers(0, 4, (B, extent)), axis=1).astype(np.int32)

    if "causal" in rules:
        keywords["is_causal"] = True
    if "window" in rules:
        keywords["local_window_size"] = tuple(map(int, rng.integers(0, max(S, 2), 2)))
    if "query_lengths" in rules:
        keywords["query_seq_lengths"] = rng.integers(0, T + 1, B).astype(np.int32)
    if "key_value_lengths" in rules:
        keywords["key_value_seq_lengths"] = rng.integers(0, S + 1, B).astype(np.int32)
    if "offset" in rules:
        keywords["query_offset"] = rng.integers(-T, S + 1, B).astype(np.int32)
    if "segments" in rules:
        keywords |= dict(query_segment_ids=ids(T), key_value_segment_ids=ids(S))
    if "positions" in rules:
        keywords |= dict(
            query_positions=rng.integers(0, T + 1, (B, T)).astype(np.int32),
            key_value_positions=rng.integers(0, S + 1, (B, S)).astype(np.int32),
        )
    if "mask" in rules:
        keywords["mask"] = some(B, N, T, S)
    if "mask_of_keys" in rules:
        keywords["mask"] = some(B, 1, 1, S)
    if "mask_of_rows" in rules:
        keywords["mask"] = some(1, N, T, 1)
    if "key_value_mask" in rules:
        keywords["key_value_mask"] = some(B, S)
    if "bias" in rules:
        bias = rng.standard_normal((B, N, T, S))
    if "bias_of_keys" in rules:
        bias = rng.standard_normal((1, N, 1, S))
    if "bias_of_rows" in rules:
        bias = rng.standard_normal((B, 1, T, 1))
    if "bias_infinite" in rules:
        bias = np.where(some(1, N, T, S), -np.inf, 0.0)
    if "soft_cap" in rules:
        keywords["logits_soft_cap"] = float(rng.choice((0.5, 3.0, 30.0)))
    if "negative_scale" in rules:
        keywords["scale"] = -float(rng.choice((0.01, 0.3, 1.0)))
    if "sinks" in rules:
        sinks = np.where(rng.random(N) < 0.2, -np.inf, 3 * rng.standard_normal(N))
        keywords["sinks"] = sinks.astype(np.float32)
    dropout = {}
    if "dropout" in rules:
        dropout = dict(dropout_rate=0.3, dropout_rng=jax.random.key(case.seed % 1000))
    if "hidden_nan" in rules and not any(case.specs):
        hidden = np.zeros((B, S), bool)
        if "key_value_seq_lengths" in keywords:
            hidden |= np.arange(S) >= keywords["key_value_seq_lengths"][:, None]
        if "key_value_mask" in keywords:
            hidden |= ~keywords["key_value_mask"]
        for x in (key, value):
            x[hidden] = np.nan
    arrays = [query, key, value]
    if bias is not None:
        arrays.append(bias.astype(np.float32))
    return Problem(arrays, d_out, keywords, dropout)


class Refused(Exception):
    """The call said that it does not take the case."""


def failures(case: Case) -> list[str]:
    """What is wrong with the results of a case: nothing, if it is right."""
    problem = build(case)
    try:
        with forced_variant(case.how.get("isa")):
            found, exact_operands = _run(case, problem)
    except ValueError as error:
        if "jax_gluon." in str(error) and "; allowed: " in str(error):
            raise Refused(str(error)) from error
        raise
    dropout = {}
    if problem.dropout:
        shape = case.B, case.N, case.T, case.S
        rate = problem.dropout["dropout_rate"]
        kept = jax_gluon.dropout_mask(problem.dropout["dropout_rng"], shape, rate)
        dropout = dict(kept=np.asarray(kept), dropout_rate=rate)
    operands = [*exact_operands, *(x.astype(np.float64) for x in problem.arrays[3:])]
    given = problem.keywords | dropout
    exact = oracle.attention(*operands, d_out=problem.d_out.astype(np.float64), **given)
    bounds = _bounds(case, operands, problem, given)
    right = exact._asdict()
    if "tangent_out" in found:
        right |= oracle.tangent(*operands, tangents=_tangents(case, problem), **given)._asdict()
    wrong = []
    for name, x in found.items():
        y = np.asarray(right[name], np.float64)
        x = np.asarray(x, np.float64)
        if x.shape != y.shape:
            wrong.append(f"{name} is of shape {x.shape}, not {y.shape}")
            continue
        is_finite = np.isfinite(y)
        if not np.array_equal(np.isfinite(x), is_finite):
            at = np.argwhere(np.isfinite(x) != is_finite)[0]
            wrong.append(f"{name}{list(map(int, at))} is {x[tuple(at)]}, not {y[tuple(at)]}")
            continue
        error = np.where(is_finite, np.abs(x - np.where(is_finite, y, 0)), 0)
        bound = np.broadcast_to(bounds[name], y.shape)
        if any(case.specs):
            excess = np.linalg.norm(error) / np.linalg.norm(bound)
            if excess > 1:
                wrong.append(f"{name} is wrong by {excess:.1f} of its bound")
        elif error.size and (error / bound).max() > 1:
            at = np.unravel_index(np.argmax(error / bound), y.shape)
            of_bound = f"{(error / bound)[at]:.1f} of its bound"
            wrong.append(f"{name}{list(map(int, at))} is {x[at]}, not {y[at]}: {of_bound}")
        # A bound of large terms would let zeros pass.
        large = is_finite & (np.abs(y) > 4 * bound)
        if large.any() and np.mean(x[large] == 0) > 0.01:
            wrong.append(f"{name} is 0 where it should not be")
    return wrong


def _run(case: Case, problem: Problem) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Results by the oracle's names, and query, key and value as they were multiplied."""
    is_head_major = case.how.get("layout") == "BNTH"
    operands: list[Any] = [jnp.asarray(x) for x in problem.arrays]
    for i, spec in enumerate(case.quant_specs()):
        if spec is not None:
            operands[i] = jax_gluon.quantize(operands[i], spec, implementation=_of_codes(case))
    exact = [
        np.asarray(x.dequantize(jnp.float32) if spec is not None else x, np.float64)
        for x, spec in zip(operands[:3], case.specs, strict=True)
    ]

    def swapped(x: Any) -> Any:
        return jnp.swapaxes(x, 1, 2) if is_head_major and isinstance(x, jax.Array) else x

    operands = [*map(swapped, operands[:3]), *operands[3:]]
    floats = [i for i, x in enumerate(operands) if isinstance(x, jax.Array)]
    options = {
        name: case.how[name]
        for name in ("implementation", "kernel", "layout", "differentiation")
        if case.how.get(name) is not None
    }
    numbers = {n: x for n, x in problem.keywords.items() if not isinstance(x, np.ndarray)}
    arrays = {n: jnp.asarray(x) for n, x in problem.keywords.items() if n not in numbers}

    def attention(arrays: dict[str, Any], *given: Any) -> Any:
        every = list(operands)
        for i, x in zip(floats, given, strict=True):
            every[i] = x
        return jax_gluon.dot_product_attention(
            *every, return_residual=True, **arrays, **numbers, **problem.dropout, **options
        )

    @jax.jit
    def results(arrays: dict[str, Any], d_out: Any, *given: Any) -> Any:
        def of(*given: Any) -> Any:
            out, log_sum_exp = attention(arrays, *given)
            return out, log_sum_exp

        out, pullback, log_sum_exp = jax.vjp(of, *given, has_aux=True)
        return out, log_sum_exp, pullback(d_out)

    d_out = swapped(jnp.asarray(problem.d_out))
    out, log_sum_exp, gradients = results(arrays, d_out, *(operands[i] for i in floats))
    names = "d_query", "d_key", "d_value", "d_bias"
    found = {"out": swapped(out), "log_sum_exp": swapped(log_sum_exp)}
    for i, x in zip(floats, gradients, strict=True):
        found[names[i]] = swapped(x) if i < 3 else x
    if case.how.get("differentiation") == "any" and not any(case.specs):
        along = [jnp.asarray(x) for x in _tangents(case, problem).values()]
        along = [*map(swapped, along[:3]), *along[3:]]

        @jax.jit
        def tangent_out(arrays: dict[str, Any], given: Any, along: Any) -> Any:
            return jax.jvp(lambda *x: attention(arrays, *x)[0], given, along)[1]

        found["tangent_out"] = swapped(tangent_out(arrays, tuple(operands), tuple(along)))
    return found, exact


def _tangents(case: Case, problem: Problem) -> dict[str, np.ndarray]:
    """Directions of a forward derivative, by operand."""
    rng = np.random.default_rng(case.seed + 2)
    names = "query", "key", "value", "bias"
    return {
        name: rng.standard_normal(x.shape).astype(x.dtype)
        for name, x in zip(names, problem.arrays, strict=False)
    }


def _of_codes(case: Case) -> str | None:
    return case.how["implementation"] if case.how["implementation"] != "xla" else "xla"


def _bounds(
    case: Case, operands: list[np.ndarray], problem: Problem, given: dict[str, Any]
) -> dict[str, np.ndarray]:
    """How far each element of each result may be off."""
    q, k, v = (np.nan_to_num(x) for x in operands[:3])
    bias = operands[3] if len(operands) > 3 else None
    terms = oracle._softmax(q, k, v, bias, given.get("mask"), **_logit_rules(given))
    p, share, scale = terms.p, terms.share, abs(terms.scale)
    heads = [np.abs(np.swapaxes(x, 1, 2)) for x in (q, k, v, problem.d_out.astype(np.float64))]
    aq, ak, av, ad = heads
    ak, av = (np.repeat(x, case.group, axis=1) for x in (ak, av))
    is_seen = terms.visible
    logits = np.where(is_seen, aq @ np.swapaxes(ak, 2, 3) * scale, 0)
    if bias is not None:
        logits = logits + np.where(np.isfinite(bias) & is_seen, np.abs(bias), 0)
    # Logits are sums in float32, whatever the operands are; P, dS and results are rounded to these.
    wide, own = _EPS["float32"], _EPS[case.dtype]
    row = np.max(logits, axis=-1, keepdims=True, initial=0.0)
    if any(case.specs):
        relative = np.full_like(row, _OF_CODES)
    else:
        relative = 4 * own + 12 * wide + 6 * wide * (row + 4)
    dp = ad @ np.swapaxes(av, 2, 3) * share
    mean = np.sum(p * dp, axis=-1, keepdims=True)
    # A slope near 0 is a difference.
    slope = terms.slope + (0.0 if given.get("logits_soft_cap") is None else 8 * wide / relative)
    ds = p * (dp + mean) * slope
    factor = 3.0

    def over_group(x: np.ndarray) -> np.ndarray:
        B, _, S, W = x.shape
        return np.swapaxes(x.reshape(B, case.K, case.group, S, W).sum(2), 1, 2)

    # Below these numbers are flushed to 0, those that are multiplied by large ones too.
    tiny = 1e-7 if case.dtype == "float16" else 1e-32
    bounds = {
        "out": np.swapaxes(relative * ((p * share) @ av), 1, 2),
        "log_sum_exp": np.swapaxes(
            (relative + own * np.abs(terms.log_sum_exp[..., None]))[..., 0], 1, 2
        ),
        "d_query": np.swapaxes(factor * relative * scale * (ds @ ak), 1, 2),
        "d_key": over_group(
            factor * scale * np.swapaxes(ds * relative, 2, 3) @ aq
        ),
        "d_value": over_group(
            factor * np.swapaxes(p * share * relative, 2, 3) @ ad
        ),
    }  # fmt: skip
    if case.how.get("differentiation") == "any" and not any(case.specs):
        along = {name: np.abs(x, dtype=np.float64) for name, x in _tangents(case, problem).items()}
        dq, dk, dv = (np.swapaxes(along[name], 1, 2) for name in ("query", "key", "value"))
        dk, dv = (np.repeat(x, case.group, axis=1) for x in (dk, dv))
        dx = scale * (dq @ np.swapaxes(ak, 2, 3) + aq @ np.swapaxes(dk, 2, 3))
        dx = (dx + along.get("bias", 0.0)) * slope * is_seen
        mean = np.sum(p * dx, axis=-1, keepdims=True)
        bound = (p * share * (dx + mean)) @ av + (p * share) @ dv
        bounds["tangent_out"] = np.swapaxes(factor * relative * bound, 1, 2)
    bounds = {name: x + tiny for name, x in bounds.items()}
    if bias is not None:
        d_bias = factor * relative * ds
        for axis, extent in enumerate(bias.shape):
            if extent == 1:
                d_bias = d_bias.sum(axis, keepdims=True)
        bounds["d_bias"] = d_bias + tiny
    finite = np.isfinite(bounds["log_sum_exp"])
    bounds["log_sum_exp"] = np.where(finite, bounds["log_sum_exp"], 1.0)
    return bounds


def _logit_rules(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in given.items() if name != "mask"}
