"""The primitives of `differentiation="any"`: how they run, their shapes, vmap and transposes.

`attention_tangent` is linear in tangents of the operands, and `attention_cotangent`, backward, in
cotangents of the results: each is the other's transpose. `attention_fused` is forward and tangent
in one pass over the keys, of which JAX keeps `attention_tangent` alone where it linearizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe

from jax_gluon import _lowering
from jax_gluon._primitive import Primitive
from jax_gluon._problem import (
    AttentionOperands,
    AttentionProblem,
    Operands,
    Residuals,
    Tangents,
)

#: Operands that have tangents and gradients.
DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")


class Kept(NamedTuple):
    """What forward keeps beside its operands."""

    out: jax.Array
    log_sum_exp: jax.Array
    row_maximum: jax.Array
    log_sum: jax.Array

    def residuals(self, operands: Operands) -> Residuals:
        return Residuals(operands, self.out, self.row_maximum, self.log_sum)


KEPT = len(Kept._fields)

instantiated: Callable[[Any], Any] = cast(Any, ad).instantiate_zeros


def is_zero(tangent: Any) -> bool:
    """Whether it is symbolically so; those of integers always are."""
    return isinstance(tangent, ad.Zero) or tangent.dtype == jax.dtypes.float0


@dataclass(frozen=True)
class Form:
    """How the flat operands of a primitive are read: those that are fixed, then the linear ones.

    Fixed are `(Kept, Operands)`; linear are tangents, an `AttentionOperands` with None where there
    is none, or `Cotangents`. `wanted` are the operands whose gradients are asked for. `mapped` has
    for each vmap, the outermost first, which of the flat operands it maps, along axis 0.
    """

    problem: AttentionProblem
    fixed: Any
    linear: Any
    wanted: tuple[str, ...] = ()
    mapped: tuple[tuple[bool, ...], ...] = ()

    @staticmethod
    def of(
        problem: AttentionProblem, kept: Kept, operands: Operands, linear: Any
    ) -> tuple[Form, list[Any]]:
        """The form of these, and their leaves."""
        fixed, structure = cast(tuple[list[Any], Any], jax.tree.flatten((kept, operands)))
        form, leaves = Form(problem, structure, None).with_linear(linear)
        return form, [*fixed, *leaves]

    @property
    def fixed_leaves(self) -> int:
        return self.fixed.num_leaves

    def read(self, leaves: Sequence[Any]) -> tuple[Kept, Operands, Any]:
        kept, operands = self.fixed.unflatten(leaves[: self.fixed_leaves])
        return kept, operands, self.linear.unflatten(leaves[self.fixed_leaves :])

    def with_linear(self, linear: Any, wanted: tuple[str, ...] = ()) -> tuple[Form, list[Any]]:
        """The form of the same fixed operands with these linear ones, and their leaves."""
        leaves, structure = cast(tuple[list[Any], Any], jax.tree.flatten(linear))
        mapped = tuple(
            (*of_all[: self.fixed_leaves], *(True,) * len(leaves)) for of_all in self.mapped
        )
        return replace(self, linear=structure, wanted=wanted, mapped=mapped), leaves

    def map(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, of flat operands, under the vmaps."""
        for of_all in reversed(self.mapped):
            function = jax.vmap(function, [0 if is_mapped else None for is_mapped in of_all])
        return function


class Cotangents(NamedTuple):
    """Those of the output and of the natural log-sum-exp; None: zero."""

    out: jax.Array
    log_sum_exp: jax.Array | None


def tangents_of(given: Mapping[str, jax.Array]) -> Tangents:
    """Of those operands; None elsewhere."""
    return cast(Any, AttentionOperands)(
        **{name: given.get(name) for name in AttentionOperands._fields}
    )


def bind(primitive: Primitive, form: Form, *leaves: Any) -> list[Any]:
    return cast(Any, primitive).bind(*leaves, form=form)


# What the primitives compute, of flat operands.


def _run_fused(form: Form, *leaves: Any) -> list[Any]:
    kept, operands, tangents = form.read(leaves)
    residuals = kept.residuals(operands)
    log_sum_exp, residuals, *tangent = _lowering.tangent(
        form.problem, kept.log_sum_exp, residuals, tangents
    )
    kept = Kept(residuals.out, log_sum_exp, residuals.row_maximum, residuals.log_sum)
    return [*kept, *tangent]


def _run_tangent(form: Form, *leaves: Any) -> list[Any]:
    return _run_fused(form, *leaves)[KEPT:]


def _run_cotangent(form: Form, *leaves: Any) -> list[Any]:
    kept, operands, (d_out, d_log_sum_exp) = form.read(leaves)
    given = (form.problem, kept.residuals(operands), d_out, d_log_sum_exp)
    gradients: dict[str, jax.Array] = {}
    if any(name in form.wanted for name in ("query", "key", "value")):
        gradients.update(zip(("query", "key", "value"), _lowering.backward(*given), strict=True))
    if "bias" in form.wanted:
        gradients["bias"] = _lowering.backward_bias(*given)
    if "sinks" in form.wanted:
        gradients["sinks"] = _lowering.backward_sinks(*given)
    return [gradients[name].astype(getattr(operands, name).dtype) for name in form.wanted]


# Results without their numbers.


def _shape_of_fused(form: Form, *leaves: Any) -> list[Any]:
    kept, _, _ = form.read(leaves)
    return [jnp.zeros_like(x) for x in (*kept, kept.out, kept.log_sum_exp)]


def _shape_of_tangent(form: Form, *leaves: Any) -> list[Any]:
    return _shape_of_fused(form, *leaves)[KEPT:]


def _shape_of_cotangent(form: Form, *leaves: Any) -> list[Any]:
    kept, operands, _ = form.read(leaves)
    wanted = [getattr(operands, name) for name in form.wanted]
    return [jnp.zeros_like(kept.out, x.dtype, x.shape) for x in wanted]


fused_p = Primitive("attention_fused")
tangent_p = Primitive("attention_tangent")
cotangent_p = Primitive("attention_cotangent")
#: Its results are its operands, as forward kept them.
passed_p = Primitive("attention_passed")


def _define(
    primitive: Primitive,
    run: Callable[..., list[Any]],
    shape: Callable[..., list[Any]],
    batch: Callable[..., Any],
) -> None:
    primitive.multiple_results = True

    def of_form(function: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def whole(*leaves: Any, form: Form) -> list[Any]:
            return form.map(functools.partial(function, form))(*leaves)

        return whole

    def shapes(*avals: Any, form: Form) -> list[Any]:
        function = functools.partial(of_form(shape), form=form)
        return cast(Any, jax.make_jaxpr(function)(*avals)).out_avals

    primitive.def_impl(jax.jit(of_form(run), static_argnames=("form",)))
    primitive.def_abstract_eval(shapes)
    mlir.register_lowering(primitive, mlir.lower_fun(of_form(run), multiple_results=True))
    batching.primitive_batchers[primitive] = functools.partial(batch, primitive)


def _batch(
    primitive: Primitive, leaves: Sequence[Any], axes: Sequence[Any], *, form: Form
) -> tuple[list[Any], list[Any]]:
    size = next(x.shape[axis] for x, axis in zip(leaves, axes, strict=True) if axis is not None)

    def move(index: int, x: Any, axis: Any) -> Any:
        if axis is not None:
            return jnp.moveaxis(x, axis, 0)
        # The transpose's results are all mapped.
        return x if index < form.fixed_leaves else jnp.broadcast_to(x, (size, *x.shape))

    moved = [move(i, x, axis) for i, (x, axis) in enumerate(zip(leaves, axes, strict=True))]
    mapped = tuple(axis is not None or i >= form.fixed_leaves for i, axis in enumerate(axes))
    results = bind(primitive, replace(form, mapped=(mapped, *form.mapped)), *moved)
    return results, [0] * len(results)


def _batch_fused(
    primitive: Primitive, leaves: Sequence[Any], axes: Sequence[Any], *, form: Form
) -> tuple[list[Any], list[Any]]:
    if any(axis is not None for axis in axes[: form.fixed_leaves]):
        return _batch(primitive, leaves, axes, form=form)
    # Of many tangents at one point: the point's own results are no batch.
    tangents, mapped = _batch(tangent_p, leaves, axes, form=form)
    return [*leaves[:KEPT], *tangents], [*axes[:KEPT], *mapped]


_define(fused_p, _run_fused, _shape_of_fused, _batch_fused)
_define(tangent_p, _run_tangent, _shape_of_tangent, _batch)
_define(cotangent_p, _run_cotangent, _shape_of_cotangent, _batch)


# Transposes.


def _transpose_tangent(cotangents: Sequence[Any], *leaves: Any, form: Form) -> list[Any]:
    d_out, d_log_sum_exp = cotangents[-2:]
    fixed, linear = leaves[: form.fixed_leaves], leaves[form.fixed_leaves :]
    names = [name for name in DIFFERENTIABLE if getattr(form.read(leaves)[2], name) is not None]
    of_linear: list[Any] = [None] * len(linear)
    if not (is_zero(d_out) and is_zero(d_log_sum_exp)):
        wanted = tuple(
            name for name, x in zip(names, linear, strict=True) if ad.is_undefined_primal(x)
        )
        given = Cotangents(
            instantiated(d_out),
            None if is_zero(d_log_sum_exp) else d_log_sum_exp,
        )
        of_form, given = form.with_linear(given, wanted)
        gradients = dict(zip(wanted, bind(cotangent_p, of_form, *fixed, *given), strict=True))
        of_linear = [gradients.get(name) for name in names]
    return [None] * form.fixed_leaves + of_linear


def _transpose_cotangent(cotangents: Sequence[Any], *leaves: Any, form: Form) -> list[Any]:
    tangents = tangents_of(dict(zip(form.wanted, map(instantiated, cotangents), strict=True)))
    of_form, given = form.with_linear(tangents)
    results = bind(tangent_p, of_form, *leaves[: form.fixed_leaves], *given)
    return [None] * form.fixed_leaves + results[: len(leaves) - form.fixed_leaves]


ad.primitive_transposes[fused_p] = _transpose_tangent
ad.primitive_transposes[tangent_p] = _transpose_tangent
ad.primitive_transposes[cotangent_p] = _transpose_cotangent


# Where what is known is told from what is linear.


def _partial_eval_fused(trace: Any, *tracers: Any, form: Form) -> list[Any]:
    if all(tracer.is_known() for tracer in tracers[: form.fixed_leaves]) and not all(
        tracer.is_known() for tracer in tracers
    ):
        tangent = trace.default_process_primitive(tangent_p, tracers, {"form": form})
        return [*tracers[:KEPT], *tangent]
    return trace.default_process_primitive(fused_p, tracers, {"form": form})


def _partial_eval_fused_equation(
    saveable: Any, is_unknown: Sequence[bool], is_instantiated: Sequence[bool], equation: Any
) -> tuple[Any, Any, list[bool], list[bool], list[Any]]:
    """For `jax.checkpoint`: what is known is not computed again, but passed on."""
    del saveable
    form: Form = equation.params["form"]
    needed = [
        x
        for x, has in zip(equation.invars, is_instantiated, strict=True)
        if not has and not hasattr(x, "val")  # literals have a value
    ]
    results = len(equation.outvars)
    if any(is_unknown[: form.fixed_leaves]):
        return None, equation, [True] * results, [True] * results, needed
    if not any(is_unknown):
        return equation, equation, [False] * results, [True] * results, needed
    known = equation.replace(
        primitive=passed_p,
        params={},
        invars=equation.invars[:KEPT],
        outvars=equation.outvars[:KEPT],
    )
    unknown = [False] * KEPT + [True] * (results - KEPT)
    return known, equation, unknown, [True] * results, needed


pe.custom_partial_eval_rules[fused_p] = _partial_eval_fused
pe.partial_eval_jaxpr_custom_rules[fused_p] = _partial_eval_fused_equation


def _pass(*kept: Any) -> list[Any]:
    return list(kept)


passed_p.multiple_results = True
passed_p.def_impl(_pass)
passed_p.def_abstract_eval(_pass)
mlir.register_lowering(passed_p, mlir.lower_fun(_pass, multiple_results=True))


def _pass_with_tangents(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
    return cast(Any, passed_p).bind(*primals), list(tangents)


def _pass_back(cotangents: Any, *_: Any) -> list[Any]:
    return list(cotangents)


def _pass_batch(kept: Any, axes: Any) -> tuple[list[Any], Any]:
    return cast(Any, passed_p).bind(*kept), axes


ad.primitive_jvps[passed_p] = _pass_with_tangents
ad.primitive_transposes[passed_p] = _pass_back
batching.primitive_batchers[passed_p] = _pass_batch
