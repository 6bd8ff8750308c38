"""Which axes of operands and results are split, and over which axes of a mesh."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_gluon._sharding.split import Split

_BATCH, _HEADS, _KV_HEADS, _NEVER = "b", "n", "k", "."
# An array's letters and shape.
_Axes = tuple[tuple[str, ...], tuple[int, ...]]


class Placed(NamedTuple):
    """What the devices of `mesh` have."""

    mesh: Mesh
    split: Split
    operands: tuple[NamedSharding, ...]
    results: list[NamedSharding]


@dataclass(frozen=True)
class Placement:
    """The axes of flat operands and results.

    Batch and heads have their letters (see `split`), and other axes along which parts are
    independent have numbers. An axis of extent 1 is shared by all parts where others are longer.
    """

    operands: Sequence[_Axes]
    results: Sequence[_Axes]

    def _extents(self) -> dict[str, int]:
        extents: dict[str, int] = {}
        for letters, shape in (*self.operands, *self.results):
            for letter, extent in zip(letters, shape, strict=True):
                extents[letter] = max(extents.get(letter, 1), extent)
        return {x: extent for x, extent in extents.items() if x != _NEVER and extent > 1}

    def rule(self) -> str:
        """By which Shardy propagates: query and kv heads are one axis where each has its own."""
        extents = self._extents()
        factors = {letter: f"axis{letter}" for letter in extents}
        if extents.get(_HEADS) == extents.get(_KV_HEADS):
            factors[_KV_HEADS] = factors.get(_HEADS, "")
        numbers = itertools.count()

        def of(arrays: Sequence[_Axes]) -> str:
            return ", ".join(
                " ".join(
                    factors[letter] if extents.get(letter) == extent else f"only{next(numbers)}"
                    for letter, extent in zip(*array, strict=True)
                )
                for array in arrays
            )

        return f"{of(self.operands)} -> {of(self.results)}"

    def on(
        self, devices: Sequence[Any], operands: Sequence[Any], results: Sequence[Any] = ()
    ) -> Placed:
        """How to place them, where the partitioner would place them as their shardings say."""
        extents = self._extents()
        given = [*zip(self.operands, operands, strict=True)]
        given += zip(self.results, results, strict=False)
        mesh, mesh_axes = _understood(devices, [x for _, x in given])
        wishes = [(*axes, over) for (axes, _), over in zip(given, mesh_axes, strict=True)]
        of_kv_heads = _wanted(_KV_HEADS, extents, wishes)
        chosen: dict[str, tuple[str, ...]] = {}
        for letter in (*sorted(x for x in extents if x.isdigit()), _BATCH, _HEADS):
            if letter not in extents:
                continue
            wanted = _wanted(letter, extents, wishes)
            if letter == _HEADS and not wanted:
                wanted = of_kv_heads
            taken = set(itertools.chain.from_iterable(chosen.values()))
            chosen[letter] = _dividing(mesh, wanted, extents[letter], taken)
        heads = chosen.get(_HEADS, ())
        # Kv heads that are on all devices stay there: their gradients would have to be gathered.
        alike = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(heads, of_kv_heads, strict=False)
        )
        along = tuple(axis for axis, _ in alike) or (heads if of_kv_heads else ())
        chosen[_KV_HEADS] = _dividing(mesh, along, extents.get(_KV_HEADS, 1), set())
        split = Split(chosen.get(_BATCH, ()), heads, chosen[_KV_HEADS])

        def sharding(array: _Axes) -> NamedSharding:
            along = [
                chosen.get(letter) or None if extents.get(letter) == extent else None
                for letter, extent in zip(*array, strict=True)
            ]
            return NamedSharding(mesh, PartitionSpec(*along))

        return Placed(
            mesh, split, tuple(map(sharding, self.operands)), list(map(sharding, self.results))
        )


def _wanted(letter: str, extents: dict[str, int], wishes: Sequence[Any]) -> tuple[str, ...]:
    """The axes of the mesh over which the first array is split that is split so."""
    for letters, shape, mesh_axes in wishes:
        for each, extent, over in zip(letters, shape, mesh_axes, strict=True):
            if each == letter and extent == extents.get(letter) and over:
                return over
    return ()


def _dividing(mesh: Mesh, axes: tuple[str, ...], extent: int, taken: set[str]) -> tuple[str, ...]:
    """As many of the axes, from the first on, as cut the extent into equal parts."""
    parts = 1
    for count, axis in enumerate(axes):
        parts *= mesh.shape[axis]
        if axis in taken or extent % parts:
            return axes[:count]
    return axes


def _understood(
    devices: Sequence[Any], arrays: Sequence[Any]
) -> tuple[Mesh, list[list[tuple[str, ...]]]]:
    """A mesh of the devices whose axes can name all parts, and the axes of the arrays' axes.

    Its axes have prime sizes: those of the caller's mesh consist of them, in an order that shows in
    what the devices have.
    """
    understood: list[tuple[Mesh, list[list[tuple[str, ...]]]]] = []
    for sizes in _orders(tuple(_primes(len(devices)))):
        names = [f"part_{number}" for number in range(len(sizes))]
        mesh = Mesh(np.array(devices).reshape(sizes), names)
        understood.append((mesh, [_mesh_axes(mesh, x) for x in arrays]))

    def split_axes(each: tuple[Mesh, list[list[tuple[str, ...]]]]) -> int:
        return sum(map(bool, itertools.chain.from_iterable(each[1])))

    return max(understood, key=split_axes)


@functools.cache
def _orders(sizes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The different orders of the sizes: one of many that are the same."""
    if not sizes:
        return ((),)
    orders: list[tuple[int, ...]] = []
    for first in sorted(set(sizes)):
        at = sizes.index(first)
        orders += [(first, *rest) for rest in _orders(sizes[:at] + sizes[at + 1 :])]
    return tuple(orders)


def _primes(size: int) -> list[int]:
    least = next((x for x in range(2, math.isqrt(size) + 1) if size % x == 0), size)
    return [] if size == 1 else [least, *_primes(size // least)]


def _mesh_axes(mesh: Mesh, x: Any) -> list[tuple[str, ...]]:
    """The axes of the mesh over which each axis of an array is split, the slowest first.

    None, as far as one is split otherwise.
    """
    whole: list[tuple[str, ...]] = [() for _ in x.shape]
    if x.sharding is None or x.sharding.is_fully_replicated:
        return whole
    try:
        parts = x.sharding.devices_indices_map(x.shape)
    except ValueError:  # of unequal parts
        return whole
    begins = np.array(
        [[part.start or 0 for part in parts[device]] for device in mesh.devices.flat], np.int64
    ).reshape(*mesh.devices.shape, len(x.shape))
    return [_axes_of(mesh, begins[..., i], extent) for i, extent in enumerate(x.shape)]


def _axes_of(mesh: Mesh, begins: Any, extent: int) -> tuple[str, ...]:
    """Those along which the first index of a part changes."""
    origin = (0,) * begins.ndim
    steps = [int(begins[(*origin[:i], 1, *origin[i + 1 :])]) for i in range(begins.ndim)]
    axes = sorted((i for i, step in enumerate(steps) if step), key=lambda i: -steps[i])
    length, index = extent, cast(Any, np.indices)(begins.shape)
    expected = [np.zeros_like(begins)]
    for i in axes:
        length //= begins.shape[i]
        expected.append(index[i] * length)
    return tuple(mesh.axis_names[i] for i in axes) if np.array_equal(begins, sum(expected)) else ()
