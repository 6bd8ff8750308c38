"""Which blocks of keys each device sees, and the way that they take around the ring.

Device q has the q-th block of rows and of keys. At distance d it computes with the keys of device
q - d; blocks move forward for positive distances, and backward for negative ones.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from jax_gluon._context_parallel.token_layouts import Stretch, TokenLayout, stretches

Window = tuple[int, int]


@dataclass(frozen=True)
class Sight:
    """Who may see whom, as far as it is known when a program is traced.

    `tokens` are those of a device, query's and key's. `is_known` is False where positions are
    arrays: then every row may see every key.
    """

    layout: TokenLayout
    shards: int
    tokens: tuple[int, int]
    is_causal: bool
    window: Window | None
    is_known: bool

    def blocks(self) -> tuple[tuple[bool, ...], ...]:
        """Whether any row of device q (outer) may see any key of device k (inner)."""
        return _blocks(self)

    def pairs(self) -> list[list[int]]:
        """How many pairs of row and key are visible, for each q (outer) and k (inner)."""

        def count(q: int, k: int) -> int:
            rows, keys = self._stretches(q, k)
            return sum(self._count(a, b) for a in rows for b in keys)

        shards = range(self.shards)
        return [[count(q, k) for k in shards] for q in shards]

    def _stretches(self, q: int, k: int) -> tuple[list[Stretch], list[Stretch]]:
        T, S = self.tokens
        return (
            stretches(self.layout, q, self.shards, T),
            stretches(self.layout, k, self.shards, S),
        )

    def reach(self) -> tuple[int | None, int | None]:
        """How many positions before and after its own a row sees; None: all."""
        left, right = self.window or (None, None)
        return left, 0 if self.is_causal else right

    def sees(self, q: int, k: int) -> bool:
        """Whether any row of device q may see any key of device k."""
        rows, keys = self._stretches(q, k)
        return not self.is_known or any(self._may_see(a, b) for a in rows for b in keys)

    def _may_see(self, rows: Stretch, keys: Stretch) -> bool:
        left, right = self.reach()
        is_after = left is not None and keys.last < rows.start - left
        is_before = right is not None and keys.start > rows.last + right
        return not (is_after or is_before)

    def _count(self, rows: Stretch, keys: Stretch) -> int:
        left, right = self.reach()
        row = rows.start + rows.step * np.arange(rows.size, dtype=np.int64)
        end = np.full_like(row, keys.size)
        begin = np.zeros_like(row)
        if right is not None:
            end = np.clip((row + right - keys.start) // keys.step + 1, 0, keys.size)
        if left is not None:
            begin = np.clip(-((keys.start - row + left) // keys.step), 0, keys.size)
        return int(np.sum(np.maximum(end - begin, 0)))


@functools.lru_cache(maxsize=256)
def _blocks(sight: Sight) -> tuple[tuple[bool, ...], ...]:
    shards = range(sight.shards)
    return tuple(tuple(sight.sees(q, k) for k in shards) for q in shards)


@dataclass(frozen=True)
class Step:
    """What a device computes with at a time: keys of the device `distance` before it.

    `senders` are the devices that send their block on for it, to the next device in the direction;
    none where the block is their own. `seers` are those that may see any of its keys.
    """

    distance: int
    senders: tuple[int, ...]
    seers: tuple[bool, ...]

    @property
    def direction(self) -> int:
        return (self.distance > 0) - (self.distance < 0)


@functools.lru_cache(maxsize=256)
def route(sight: Sight) -> tuple[Step, ...]:
    """The steps of a ring: of its own block, of those from before, of those from after it.

    It is the shortest that brings every device what it may see. A block is sent no further than to
    the last device of its way that sees any of it.
    """
    P, blocks = sight.shards, sight.blocks()
    wanted = {(q - k) % P for q in range(P) for k in range(P) if q != k and blocks[q][k]}
    # As many hops forward as the first gap allows, all others from the other side.
    forward, backward = min(
        (
            (
                max((d for d in wanted if d <= most), default=0),
                max((P - d for d in wanted if d > most), default=0),
            )
            for most in range(P)
        ),
        key=lambda hops: (sum(hops), hops[1]),
    )
    steps = [_step(blocks, 0, 0)]
    steps += [_step(blocks, d, forward) for d in range(1, forward + 1)]
    steps += [_step(blocks, -d, backward) for d in range(1, backward + 1)]
    return tuple(steps)


def _step(blocks: tuple[tuple[bool, ...], ...], distance: int, hops: int) -> Step:
    P = len(blocks)
    sign = 1 if distance >= 0 else -1

    def is_needed(origin: int) -> bool:
        """From this distance on."""
        ways = range(abs(distance), hops + 1)
        return any(blocks[(origin + sign * d) % P][origin] for d in ways)

    sender = [(origin + distance - sign) % P for origin in range(P) if is_needed(origin)]
    return Step(
        distance,
        tuple(sorted(sender)) if distance else (),
        tuple(blocks[q][(q - distance) % P] for q in range(P)),
    )
