"""Operands that live on a mesh, as `jax.shard_map`'s checks and Explicit axes want them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from jax.core import Tracer

_Result = TypeVar("_Result")
_Tree = TypeVar("_Tree")

# Younger than the oldest JAX that is supported: without them no array knows of such a mesh.
_typeof: Any = getattr(jax, "typeof", None)
_pcast: Any = getattr(jax.lax, "pcast", None)
_HAS_MESHES = _typeof is not None and _pcast is not None
_NamedSharding: Any = jax.sharding.NamedSharding


def on_meshes(
    function: Callable[..., _Result], static: tuple[Any, ...], like: Any, *given: Any
) -> _Result:
    """`function(*static, *given)`, where the operands' mesh would not let it run as it is.

    In `shard_map` all operands get the union of the manual axes over which they vary, which a
    `custom_vjp` needs: what this adds is summed over in the gradient. Explicit axes of a mesh are
    Auto ones to `function`. A result is then sharded like `like` (an array, or a tree of them that
    is a prefix of the result) along the axes whose extents they share.
    """
    operands: tuple[Any, ...] = vary_alike(*given)
    if _explicit_mesh(operands) is None:
        return function(*static, *operands)
    return cast(Any, _on_auto_axes)(function, static, like, *operands)


def vary_alike(*operands: _Tree) -> tuple[_Tree, ...]:
    """The operands with the union of the manual axes over which they vary."""
    axes = _varying_axes(operands)
    return operands if not axes else vary_over(axes, operands)


def vary_over(axes: frozenset[str], tree: _Tree) -> _Tree:
    """The arrays of `tree`, as values that vary over those manual axes too."""

    def cast_up(x: Any) -> Any:
        missing = tuple(sorted(axes - _varying_axes(x)))
        return _pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast_up, tree)


def vary_like(operands: Any, tree: _Tree) -> _Tree:
    """The arrays of `tree`, which were made without looking at them, as varying as `operands`."""
    axes = _varying_axes(operands)
    return vary_over(axes, tree) if axes else tree


def _varying_axes(tree: Any) -> frozenset[str]:
    if not _HAS_MESHES:
        return frozenset()
    axes: frozenset[str] = frozenset()
    for x in jax.tree.leaves(tree):
        if isinstance(x, Tracer):
            kind: Any = _typeof(x)
            # The attribute's name before JAX 0.10, and since.
            axes |= kind.vma if hasattr(kind, "vma") else kind.mat.varying
    return axes


def _explicit_mesh(tree: Any) -> Any:
    if not _HAS_MESHES:
        return None
    for x in jax.tree.leaves(tree):
        if isinstance(x, Tracer) or isinstance(getattr(x, "sharding", None), _NamedSharding):
            mesh: Any = _typeof(x).sharding.mesh
            if not mesh.empty and _explicit_axes(mesh):
                return mesh
    return None


def _explicit_axes(mesh: Any) -> tuple[str, ...]:
    return _axes_of_type(mesh, "Explicit")


def _axes_of_type(mesh: Any, name: str) -> tuple[str, ...]:
    wanted: Any = getattr(jax.sharding.AxisType, name)
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(axis for axis, kind in pairs if kind == wanted)


def is_manual() -> bool:
    """Whether a `shard_map` is being traced, whose arrays are those of one device."""
    if not _HAS_MESHES:
        return False
    mesh: Any = cast(Any, jax.sharding).get_abstract_mesh()
    return not mesh.empty and bool(_axes_of_type(mesh, "Manual"))


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _on_auto_axes(
    function: Callable[..., _Result], static: tuple[Any, ...], like: Any, *operands: Any
) -> _Result:
    mesh = _explicit_mesh(operands)

    def shape(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    run = functools.partial(function, *static)
    results = jax.eval_shape(run, *jax.tree.map(shape, operands))

    def sharding(like: Any, x: Any) -> Any:
        spec = [*_typeof(like).sharding.spec, *(None,) * like.ndim]
        shared = [
            axis if extent == of_like else None
            for axis, extent, of_like in zip(spec, x.shape, like.shape, strict=False)
        ]
        return _NamedSharding(mesh, jax.sharding.PartitionSpec(*shared))

    shardings = jax.tree.map(sharding, cast(Any, jax.tree).broadcast(like, results), results)
    automatic = cast(Any, jax.sharding).auto_axes(
        run, axes=_explicit_axes(mesh), out_sharding=shardings
    )
    return automatic(*operands)
