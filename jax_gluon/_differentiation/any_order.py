"""Attention with derivatives of every mode and order.

`jax.custom_jvp` runs forward and binds what it keeps to primitives that are linear in tangents and
cotangents. Derivatives of the primitives themselves are those of a formula in XLA. Where output and
tangent are both wanted, the primitive makes both in one pass over the keys: forward's own call is
left without a reader, and XLA drops it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import custom_derivatives
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad

from jax_gluon import _lowering
from jax_gluon._differentiation.primitives import (
    DIFFERENTIABLE,
    KEPT,
    Form,
    Kept,
    bind,
    cotangent_p,
    fused_p,
    instantiated,
    is_zero,
    tangent_p,
    tangents_of,
)
from jax_gluon._kernels import PassKernels
from jax_gluon._operands import with_codes
from jax_gluon._primitive import Primitive
from jax_gluon._problem import AttentionProblem, Operands, compute_dtype
from jax_gluon._quantization.formats import QuantizedTensor
from jax_gluon._xla import implementation as xla


@_lowering.jit(0, 1)
def attend(
    problem: AttentionProblem, differentiates_log_sum_exp: bool, operands: Operands
) -> tuple[jax.Array, jax.Array]:
    """Output and natural log-sum-exp, finite in empty rows."""
    given = [
        jax.lax.stop_gradient(x) if isinstance(x, QuantizedTensor) else None for x in operands[:3]
    ]
    kept, _ = _forward(problem, with_codes(operands, given))
    log_sum_exp = kept.log_sum_exp
    if not differentiates_log_sum_exp:
        log_sum_exp = jax.lax.stop_gradient(log_sum_exp)
    return kept.out, log_sum_exp


@functools.partial(cast(Any, jax.custom_jvp), nondiff_argnums=(0,))
def _with_derivatives(problem: AttentionProblem, operands: Operands) -> tuple[Kept, Any]:
    log_sum_exp, residuals = _lowering.forward(problem, operands.query.dtype, operands)
    kept = Kept(residuals.out, log_sum_exp, residuals.row_maximum, residuals.log_sum)
    codes = [
        None if spec is None else x
        for x, spec in zip(residuals.operands[:3], problem.quantization, strict=True)
    ]
    return kept, codes


_forward = cast(
    Callable[[AttentionProblem, Operands], tuple[Kept, list[QuantizedTensor | None]]],
    _with_derivatives,
)


def _forward_jvp(
    problem: AttentionProblem, primals: tuple[Operands], tangents: tuple[Operands]
) -> tuple[Any, Any]:
    (operands,), (tangent,) = primals, tangents
    kept, codes = _named(problem, operands, *_forward(problem, operands))
    given = {
        name: x
        for name in DIFFERENTIABLE
        if isinstance(x := getattr(tangent, name), jax.Array) and not isinstance(x, SymbolicZero)
    }
    of_codes = [
        jax.tree.map(functools.partial(_mark, name in given), x)
        for name, x in zip(DIFFERENTIABLE, codes, strict=False)
    ]
    if not given:
        return (kept, codes), (jax.tree.map(_zero, kept), of_codes)
    form, leaves = Form.of(problem, kept, with_codes(operands, codes), tangents_of(given))
    results = bind(fused_p, form, *leaves)
    kept, (d_out, d_log_sum_exp) = Kept(*results[:KEPT]), results[KEPT:]
    # Of a row's two parts only the sum counts. The formula reads them, in base e.
    d_kept = Kept(d_out, d_log_sum_exp, _zero(kept.row_maximum), d_log_sum_exp)
    return (kept, codes), (d_kept, of_codes)


_with_derivatives.defjvp(_forward_jvp, symbolic_zeros=True)


def _named(
    problem: AttentionProblem, operands: Operands, kept: Kept, codes: list[QuantizedTensor | None]
) -> tuple[Kept, list[QuantizedTensor | None]]:
    """Where a policy of `jax.checkpoint` sees the names: outside of what has derivatives."""
    residuals = kept.residuals(with_codes(operands, codes))
    log_sum_exp, residuals = _lowering.with_names(problem, kept.log_sum_exp, residuals)
    kept = Kept(residuals.out, log_sum_exp, residuals.row_maximum, residuals.log_sum)
    named = [
        None if code is None else cast(QuantizedTensor, x)
        for code, x in zip(codes, residuals.operands[:3], strict=True)
    ]
    return kept, named


def _zero(x: jax.Array) -> Any:
    return cast(Any, custom_derivatives).zero_from_primal(x, symbolic_zeros=True)


def _mark(is_perturbed: bool, part: jax.Array) -> Any:
    """The tangent of a part of codes: it has none, but second derivatives can see one of zeros."""
    if is_perturbed and jnp.issubdtype(part.dtype, jnp.floating):
        return jnp.zeros_like(part)
    return _zero(part)


# The same as formulas that JAX differentiates as often as is asked for, in O(T) memory. They find
# anew what forward kept, since that depends on the operands.


def _in_xla(form: Form, operands: Operands) -> tuple[AttentionProblem, Operands, Kept]:
    problem = replace(
        form.problem,
        implementation="xla",
        kernels=PassKernels(),
        quantization=(None, None, None),
    )
    floats = xla.compute_operands(operands)
    kept, _ = _forward(problem, floats)
    return problem, floats, kept


def _tangent_formula(form: Form, *leaves: Any) -> list[Any]:
    kept, operands, tangents = form.read(leaves)
    dtype = compute_dtype(operands.query.dtype)
    tangents = jax.tree.map(
        functools.partial(jax.lax.convert_element_type, new_dtype=dtype), tangents
    )
    problem, floats, found = _in_xla(form, operands)
    d_out, d_log_sum_exp = xla.tangent(problem, found.residuals(floats), tangents)
    return [d_out.astype(kept.out.dtype), d_log_sum_exp]


def _cotangent_formula(form: Form, *leaves: Any) -> list[Any]:
    _, operands, cotangents = form.read(leaves)
    problem, floats, found = _in_xla(form, operands)
    residuals = found.residuals(floats)
    zeros = {name: jnp.zeros_like(getattr(floats, name)) for name in form.wanted}

    def tangent(given: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return xla.tangent(problem, residuals, tangents_of(given))

    (out, log_sum_exp), transpose = cast(Any, jax.vjp)(tangent, zeros)
    d_log_sum_exp = cotangents.log_sum_exp
    if d_log_sum_exp is None:
        d_log_sum_exp = jnp.zeros_like(log_sum_exp)
    (gradients,) = transpose((cotangents.out.astype(out.dtype), d_log_sum_exp))
    return [gradients[name].astype(getattr(operands, name).dtype) for name in form.wanted]


# Derivatives.


def _jvp(
    primitive: Primitive,
    formula: Callable[..., list[Any]],
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    form: Form,
) -> tuple[list[Any], list[Any]]:
    results = bind(primitive, form, *primals)
    of_fixed, of_linear = tangents[: form.fixed_leaves], tangents[form.fixed_leaves :]
    if all(map(is_zero, of_fixed)):
        linear = map(instantiated, of_linear)
        return results, bind(primitive, form, *primals[: form.fixed_leaves], *linear)
    _refuse_codes(form, of_fixed)
    # Kept numbers are functions of the operands, which the formula knows.
    moving = [i for i, x in enumerate(tangents) if i >= KEPT and not is_zero(x)]

    def of_moving(*values: Any) -> list[Any]:
        leaves = list(primals)
        for i, value in zip(moving, values, strict=True):
            leaves[i] = value
        return form.map(functools.partial(formula, form))(*leaves)

    _, derivative = jax.jvp(
        of_moving, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving)
    )
    return results, derivative


def _refuse_codes(form: Form, of_fixed: Sequence[Any]) -> None:
    _, operands = form.fixed.unflatten(of_fixed)
    for name in ("query", "key", "value"):
        x = getattr(operands, name)
        if isinstance(x, QuantizedTensor) and not is_zero(x.scale):
            raise NotImplementedError(
                f"jax_gluon: {name} is quantized on the fly where second derivatives are asked "
                "for, of which codes are all that is kept; allowed: quantization=None, of "
                f"`x + stop_gradient(jax_gluon.quantize(x, spec).dequantize() - x)` as {name}."
            )


def _fused_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, form: Form
) -> tuple[list[Any], list[Any]]:
    results = bind(fused_p, form, *primals)
    _, derivative = _jvp(tangent_p, _tangent_formula, primals, tangents, form=form)
    return results, [*tangents[:KEPT], *derivative]


ad.primitive_jvps[fused_p] = _fused_jvp
ad.primitive_jvps[tangent_p] = functools.partial(_jvp, tangent_p, _tangent_formula)
ad.primitive_jvps[cotangent_p] = functools.partial(_jvp, cotangent_p, _cotangent_formula)
