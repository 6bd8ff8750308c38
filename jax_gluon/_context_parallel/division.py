"""How whole arrays are divided over a mesh: the specs of all arguments, checked."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jax_gluon._errors import Checker
from jax_gluon._quantization.formats import QuantizedTensor

Axis = str | tuple[str, ...]

_OF_TOKENS = (
    "query_positions", "query_segment_ids", "key_value_positions", "key_value_segment_ids",
    "key_value_mask",
)  # fmt: skip
_OF_BATCH = ("query_seq_lengths", "key_value_seq_lengths", "query_offset")
_OF_HEADS = ("sinks", "scale")
_OF_LOGITS = ("bias", "mask")
_ROWS = ("query", "key", "value")

# Younger than the oldest JAX that is supported; its checks need `jax.lax.pcast`.
_shard_map: Any = getattr(jax, "shard_map", None)
if _shard_map is None:
    from jax.experimental import shard_map as _module

    _shard_map = functools.partial(cast(Any, _module).shard_map, check_rep=False)
elif not hasattr(jax.lax, "pcast"):
    _shard_map = functools.partial(_shard_map, check_vma=False)
# Of arrays on Explicit axes, which say how they are sharded.
_reshard: Any = getattr(jax, "reshard", None) or getattr(jax.sharding, "reshard", None)


@dataclass(frozen=True)
class Division:
    """Axes of the mesh for tokens, batch entries and heads.

    `batch_rank` is the number of the caller's batch axes, the first of which may be sharded.
    """

    check: Checker
    mesh: Any
    tokens: Axis
    batch: Axis | None
    heads: Axis | None
    is_head_major: bool
    batch_rank: int

    @staticmethod
    def of(
        check: Checker, mesh: Any, axes: dict[str, Any], arrays: dict[str, Any], layout: Any
    ) -> Division:
        """Of the arguments `axis`, `batch_axis` and `head_axis`; arrays that fit them."""
        if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
            check.type_error("mesh", f"a {type(mesh).__name__}", "a jax.sharding.Mesh")
        known = ", ".join(f'"{name}"' for name in mesh.axis_names)
        taken: list[str] = []
        for argument, axis in axes.items():
            if axis is None and argument != "axis":
                continue
            if not isinstance(axis, str) and not _is_tuple_of_names(axis):
                found, allowed = f"{axis!r}", "a name of the mesh's axes, or a tuple of them"
                check.type_error(argument, found, allowed)
            for name in _names(axis):
                if name not in mesh.axis_names:
                    check.value_error(argument, f"{axis!r}", f"axes of the mesh: {known}")
                if name in taken:
                    check.value_error(argument, f"{axis!r}, which is taken", f"another of {known}")
                taken.append(name)
        for name in _ROWS:
            x = arrays[name]
            if isinstance(x, QuantizedTensor):
                allowed = "a float array: each device quantizes its part as quantization says"
                check.type_error(name, "a QuantizedTensor", allowed)
            if x.ndim < 3:
                check.value_error(name, f"of rank {x.ndim}", "rank 3 or more, [..., T, N, H]")
        division = Division(
            check, mesh, axes["axis"], axes["batch_axis"], axes["head_axis"],
            layout == "BNTH", arrays["query"].ndim - 3,
        )  # fmt: skip
        for name in _ROWS:
            division._check_rows(name, arrays[name])
        return division

    def _check_rows(self, name: str, x: Any) -> None:
        what = {self.tokens: "tokens", self.batch: "batch entries", self.heads: "heads"}
        for extent, axis in zip(x.shape, self.spec(name, x.shape), strict=False):
            size = self.size_of(axis)
            if extent % size:
                found = f"of {extent} {what[axis]} along {size} devices of {axis!r}"
                self.check.value_error(name, found, f"a multiple of {size}")
        sharding = getattr(x, "sharding", None)
        at = x.ndim - (2 if self.is_head_major else 3)
        if isinstance(sharding, NamedSharding) and at < len(sharding.spec):
            placed = _names(sharding.spec[at])
            if placed and placed != _names(self.tokens):
                found = f"sharded along {sharding.spec[at]!r} by tokens"
                self.check.value_error(name, found, f"along axis, {self.tokens!r}, or along none")

    def spec(self, name: str, shape: tuple[int, ...]) -> Any:
        """How the argument of this name and shape is divided."""
        if name in _ROWS:
            middle = (self.heads, self.tokens) if self.is_head_major else (self.tokens, self.heads)
            return PartitionSpec(*self._of_batch(self.batch_rank), *middle, None)
        whole: tuple[Any, ...] = ()
        if name in _OF_LOGITS:
            whole = (*self._of_batch(self.batch_rank), self.heads, self.tokens, None)
        elif name in _OF_TOKENS:
            whole = (*self._of_batch(self.batch_rank), self.tokens)
        elif name in _OF_BATCH:
            whole = self._of_batch(self.batch_rank)
        elif name in _OF_HEADS:
            whole = (self.heads,)
        axes = whole[len(whole) - len(shape) :]
        return PartitionSpec(
            *(None if extent == 1 else axis for extent, axis in zip(shape, axes, strict=False))
        )

    def _of_batch(self, rank: int) -> tuple[Any, ...]:
        axes: tuple[Any, ...] = (self.batch,) if rank else ()
        return axes + (None,) * (rank - 1)

    def place(self) -> tuple[Any, Any]:
        """Numbers of a device's part of the batch entries and of the heads, among all parts."""

        def index(axis: Axis | None) -> Any:
            return 0 if axis is None else jax.lax.axis_index(axis)

        return index(self.batch), index(self.heads)

    def spec_of_statistics(self) -> Any:
        """Of a number for each row."""
        return PartitionSpec(*tuple(self.spec("query", ()))[:-1])

    def size_of(self, axis: Axis | None) -> int:
        """Devices along axes."""
        return math.prod(self.mesh.shape[name] for name in _names(axis))

    def shapes_of_device(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """What a device has of arrays of these shapes."""

        def part(name: str, x: Any) -> Any:
            axes = (*self.spec(name, x.shape), *[None] * x.ndim)
            extents = [n // self.size_of(axis) for n, axis in zip(x.shape, axes, strict=False)]
            return jax.ShapeDtypeStruct(tuple(extents), x.dtype)

        return {name: part(name, x) for name, x in arrays.items()}

    def mapped(self, function: Callable[..., Any], arrays: dict[str, Any], results: Any) -> Any:
        """`function(name=shard, ...)` of the arrays' shards, on every device."""
        names = tuple(arrays)
        specs = tuple(self.spec(name, arrays[name].shape) for name in names)

        def local(*shards: Any) -> Any:
            return function(dict(zip(names, shards, strict=True)))

        mapped = _shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=results)
        if _has_explicit_axes(self.mesh):
            shardings = [NamedSharding(self.mesh, spec) for spec in specs]
            return mapped(*map(_reshard, arrays.values(), shardings))
        return mapped(*arrays.values())


def _has_explicit_axes(mesh: Any) -> bool:
    kind: Any = getattr(jax.sharding, "AxisType", None)
    return kind is not None and kind.Explicit in mesh.axis_types


def _is_tuple_of_names(axis: Any) -> bool:
    return isinstance(axis, tuple) and all(isinstance(x, str) for x in cast(Any, axis))


def _names(axis: Axis | None) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
