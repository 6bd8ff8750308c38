"""A function of which each device of a mesh computes its part of the batch and of the heads.

Under `jax.jit` only XLA's partitioner knows how arrays are sharded. It does not know what a custom
call computes, and gathers what one reads; `custom_partitioning` lets it ask. That has no rule for
vmap: here is a primitive that has one, and is such a call where it is lowered for a mesh.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import batching, mlir
from jax.interpreters import partial_eval as pe

from jax_gluon._meshes import is_manual
from jax_gluon._primitive import Primitive, jaxpr_as_fun
from jax_gluon._sharding.placement import Placement
from jax_gluon._sharding.split import WHOLE, Split

_Result = TypeVar("_Result")

_partitioned_p = Primitive("attention_partitioned")


def partitioned(
    function: Callable[..., _Result],
    static: tuple[Any, ...],
    axes: tuple[Any, ...],
    result_axes: Any,
    *operands: Any,
) -> _Result:
    """`function(*static, split, *operands)`, of the whole or, on a mesh, of each device's part.

    `axes` are letters for the operands' axes, a tree of strings for each that is a prefix of it,
    and `result_axes` those of the result: see `split`. The function is told over which axes of the
    mesh its operands are split, and sums over them what every part adds to.
    """
    whole = functools.partial(function, *static, WHOLE)
    if is_manual() or cast(Any, jax.config).jax_disable_jit:
        return whole(*operands)
    jaxpr, shape = cast(Any, jax.make_jaxpr)(whole, return_shape=True)(*operands)
    leaves, structure = cast(tuple[list[Any], Any], jax.tree.flatten(operands))
    call = _Call(function, static, structure, _spread(axes, operands), _spread(result_axes, shape))
    results = cast(Any, _partitioned_p).bind(*leaves, jaxpr=jaxpr, call=call)
    return cast(_Result, jax.tree.unflatten(cast(Any, jax.tree.structure(shape)), results))


def _spread(axes: Any, tree: Any) -> tuple[str, ...]:
    """The letters of each leaf of `tree`, of which `axes` is a prefix."""
    spread: list[str] = []

    def add(letters: str, part: Any) -> None:
        spread.extend([letters] * len(jax.tree.leaves(part)))

    jax.tree.map(add, axes, tree)
    return tuple(spread)


@dataclass(frozen=True)
class _Call:
    """The function, of flat operands, and the axes of these and of its flat results.

    `used` are those of the results that are asked for; None: all. `mapped` has for each vmap, the
    outermost first, which of the operands it maps, along axis 0.
    """

    function: Callable[..., Any]
    static: tuple[Any, ...]
    structure: Any
    axes: tuple[str, ...]
    result_axes: tuple[str, ...]
    used: tuple[bool, ...] | None = None
    mapped: tuple[tuple[bool, ...], ...] = ()

    def on(self, split: Split) -> Callable[..., list[Any]]:
        """What a device computes of its part."""

        def flat(*leaves: Any) -> list[Any]:
            operands = self.structure.unflatten(leaves)
            return self._asked_for(jax.tree.leaves(self.function(*self.static, split, *operands)))

        for of_all in reversed(self.mapped):
            flat = jax.vmap(flat, [0 if is_mapped else None for is_mapped in of_all])
        return flat

    def _asked_for(self, results: Sequence[_Result]) -> list[_Result]:
        return list(results if self.used is None else itertools.compress(results, self.used))

    def using(self, used: Sequence[bool]) -> _Call:
        """The call for some of the results that were asked for."""
        left = iter(used)
        before = self.used or (True,) * len(self.result_axes)
        return replace(self, used=tuple(is_used and next(left) for is_used in before))

    def placement(self, jaxpr: Any) -> Placement:
        """Of operands and results: an axis that vmap added is another along which to split."""
        levels = [str(level) for level in range(len(self.mapped))]
        of_operands = [
            (*(x for x, of_all in zip(levels, self.mapped, strict=True) if of_all[i]), *axes)
            for i, axes in enumerate(self.axes)
        ]
        of_results = [(*levels, *axes) for axes in self._asked_for(self.result_axes)]

        def named(axes: Sequence[tuple[str, ...]], avals: Sequence[Any]) -> Any:
            return [(each, aval.shape) for each, aval in zip(axes, avals, strict=True)]

        return Placement(named(of_operands, jaxpr.in_avals), named(of_results, jaxpr.out_avals))


_partitioned_p.multiple_results = True


@functools.partial(jax.jit, static_argnames=("jaxpr", "call"))
def _run(*leaves: Any, jaxpr: Any, call: _Call) -> list[Any]:
    del call
    return jaxpr_as_fun(jaxpr)(*leaves)


_partitioned_p.def_impl(_run)


@_partitioned_p.def_abstract_eval
def _shapes(*_: Any, jaxpr: Any, call: _Call) -> list[Any]:
    del call
    return jaxpr.out_avals


def _batch(
    leaves: Sequence[Any], axes: Sequence[Any], *, jaxpr: Any, call: _Call
) -> tuple[list[Any], list[int]]:
    moved = [
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(leaves, axes, strict=True)
    ]
    mapped = tuple(axis is not None for axis in axes)
    call = replace(call, mapped=(mapped, *call.mapped))
    jaxpr = cast(Any, jax.make_jaxpr)(call.on(WHOLE))(*moved)
    results = cast(Any, _partitioned_p).bind(*moved, jaxpr=jaxpr, call=call)
    return results, [0] * len(results)


cast(Any, batching.primitive_batchers)[_partitioned_p] = _batch


def _without_unused(used: Sequence[bool], *given: Any) -> tuple[list[bool], Any]:
    equation = given[-1]  # JAX 0.12 gives what inputs are live before it
    if not any(used):
        return [False] * len(equation.invars), None
    closed = equation.params["jaxpr"]
    jaxpr, _ = cast(Any, pe.dce_jaxpr)(closed.jaxpr, list(used), instantiate=True)
    params = {"jaxpr": closed.replace(jaxpr=jaxpr), "call": equation.params["call"].using(used)}
    results: list[Any] = list(itertools.compress(equation.outvars, used))
    return [True] * len(equation.invars), equation.replace(params=params, outvars=results)


cast(Any, pe.dce_rules)[_partitioned_p] = _without_unused


def _lower(context: Any, *values: Any, jaxpr: Any, call: _Call) -> Any:
    module = context.module_context
    function: Any = jaxpr_as_fun(jaxpr)
    devices = _devices(module)
    if devices is not None:
        function = _on_parts(call, call.placement(jaxpr), devices, jaxpr.out_avals)
        axis_context = replace(module.axis_context, device_assignment=devices)
        context = context.replace(module_context=module.replace(axis_context=axis_context))
    return cast(Any, mlir.lower_fun)(function, multiple_results=True)(context, *values)


mlir.register_lowering(_partitioned_p, _lower)


def _devices(module: Any) -> tuple[Any, ...] | None:
    """The devices that XLA's partitioner is to split a program over; None where it is not.

    JAX tells a lowering of them for its own primitives alone. Which ones they are is the same to
    the program, that numbers them.
    """
    given: Any = module.axis_context
    # A program that is exported can't ask the process that it came from.
    if not hasattr(given, "device_assignment") or module.lowering_parameters.for_export:
        return None
    devices: tuple[Any, ...] = given.device_assignment
    if not devices:
        devices = tuple(cast(Any, jax.devices)()[: given.num_devices])
    return devices if 1 < len(devices) == given.num_devices else None


def _on_parts(
    call: _Call, placement: Placement, devices: tuple[Any, ...], results: Sequence[Any]
) -> Callable[..., list[Any]]:
    """The call as a function that the partitioner asks how to split; `results` are its shapes."""

    def infer(_: Any, operands: Any, results: Any) -> Any:
        del results
        return placement.on(devices, operands).results

    def partition(_: Any, operands: Any, results: Any) -> Any:
        placed = placement.on(devices, operands, results)
        return placed.mesh, call.on(placed.split), placed.results, placed.operands

    @custom_partitioning
    def on_parts(*_: Any) -> Any:
        # Only shapes count: on several devices a program has what `partition` says.
        return [jnp.zeros(x.shape, x.dtype) for x in results]

    has_shardy = getattr(jax.config, "jax_use_shardy_partitioner", False)
    cast(Any, on_parts).def_partition(
        partition,
        infer_sharding_from_operands=infer,
        decode_shardings=False,
        **({"sharding_rule": placement.rule()} if has_shardy else {}),
    )
    return on_parts
