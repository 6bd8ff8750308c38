"""The one description of attention over tokens that several devices share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax

from jax_gluon._context_parallel.routes import Sight
from jax_gluon._problem import AttentionProblem
from jax_gluon._quantization.formats import QuantizedTensor

#: How keys and values, or heads, come to the devices that need them.
Strategy = Literal["ring", "all_gather", "all_to_all"]


@dataclass(frozen=True)
class ContextProblem:
    """The static part: that of attention, and how it is divided.

    `problem.quantization` is how the float operands are quantized before they are sent. `wish` is
    the caller's kernel, of which each block's is chosen.
    """

    problem: AttentionProblem
    strategy: Strategy
    axis_name: Any
    sight: Sight
    wish: Any
    function: str

    @property
    def shards(self) -> int:
        return self.sight.shards

    @property
    def is_by_position(self) -> bool:
        """Whether it matters where tokens stand."""
        return self.problem.is_causal or self.problem.local_window is not None


Index = int | jax.Array


class Place(NamedTuple):
    """A block: the shard of its rows, 0 where they are all, and that of its keys.

    `is_own` says whether these are the same; None: it is not known when a program is traced.
    """

    rows: Index
    keys: Index
    is_own: bool | None = None


class Rows(NamedTuple):
    """What stays on its device, or moves with the query's heads.

    query `[B, T, N, H]`; bias and mask `[b, n, t, s]`, of which s is 1 or that of all keys;
    `lengths` int32 `[B]`, of all rows and of all keys, in the order of the sequence; `offset`
    int32 `[B]`; positions and segment ids int32 `[B, T]`; sinks `[1, N]`; `dropout_seeds`.
    """

    query: Any
    bias: jax.Array | None = None
    mask: jax.Array | None = None
    lengths: jax.Array | None = None
    key_value_lengths: jax.Array | None = None
    offset: jax.Array | None = None
    positions: jax.Array | None = None
    segment_ids: jax.Array | None = None
    sinks: jax.Array | None = None
    dropout_seeds: jax.Array | None = None


class Keys(NamedTuple):
    """A block of keys, which moves: key and value, and int32 or bool `[B, S]` of their tokens."""

    key: Any
    value: Any
    positions: jax.Array | None = None
    segment_ids: jax.Array | None = None
    mask: jax.Array | None = None


class Partial(NamedTuple):
    """Attention of rows over some of their keys.

    The output is of the dtype that is computed in; the parts of the log-sum-exp are as those that
    `jax_gluon._lowering.forward` leaves, in the base of the implementation.
    """

    out: jax.Array
    maximum: jax.Array
    log_sum: jax.Array


class Cotangents(NamedTuple):
    """What backward has of each row: `d_log_sum_exp` is that of the natural one, less D."""

    d_out: jax.Array
    d_log_sum_exp: jax.Array


class Gradients(NamedTuple):
    """Of a block, in the dtype that is computed in; bias: of the columns of the block."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None


Codes = jax.Array | QuantizedTensor
