"""Forward of INT8 codes on Hopper: Q K^T of integers by the tensor cores, P and V in 16 bits.

A block is three or four warpgroups. One brings keys and values into shared memory, a chunk ahead;
each of the others has 64 rows: it multiplies codes, makes P of a chunk and multiplies it with the
values. What bounds it, more than arithmetic, is how often keys and values come from the L2 cache:
with 128 rows for each time they take 5 TB/s of an H200's, with 192 two thirds of that.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_gluon._cuda import mosaic
from jax_gluon._dimensions import ceil_div

HEAD_DIM = 128
#: Keys of a chunk, which share a scale where tokens share them.
KEYS = 128
# Rows of a warpgroup: those of one wgmma instruction.
_ROWS = 64
# Where a row's codes are all 0, its factor must still be a positive number.
_MIN_FACTOR = 2.0**-126


class Way(NamedTuple):
    """How the rows of a block are worked on.

    `rows`: warpgroups with rows; `stages`: chunks in shared memory. Where they take turns (two of
    them), one multiplies while the other makes exponentials, as in FlashAttention-3
    (https://arxiv.org/abs/2407.08608): better where masks take registers, of which three warpgroups
    have 160 a thread.
    """

    rows: int = 3
    stages: int = 2
    takes_turns: bool = False


def way_of(is_masked: bool) -> Way:
    """The fastest where some chunks are masked, and where none is."""
    return Way(rows=2, takes_turns=True) if is_masked else Way()


class Codes(NamedTuple):
    """Codes `[B, T, N, H]`, and their scales `[B, N, T]`, or `[B, N, blocks]` of whole chunks."""

    data: jax.Array
    scale: jax.Array


def forward(
    query: Codes,
    key: Codes,
    value: jax.Array,
    *,
    factor: float,
    is_causal: bool,
    chunks_of_scale: int = 0,
    way: Way | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output `[B, T, N, H]`, of value's dtype, and the log-sum-exp to base 2, `[B, N, T]`.

    Logits to base 2 are products of the codes by their scales and `factor`; `value` is of 16-bit
    floats. `chunks_of_scale` chunks of keys share a scale; 0: each key has one.
    """
    pl, plgpu = mosaic.modules()
    B, T, N, H = query.data.shape
    _, S, K, _ = key.data.shape
    way = way or way_of(is_causal or S % KEYS != 0)
    rows = way.rows * _ROWS
    blocks = ceil_div(T, rows)
    # Copies end at the last token, where tokens are whole tiles of 8 and at least a slice.
    codes = _padded(query.data, max(_ROWS, ceil_div(T, 8) * 8))
    row_scales = _padded(query.scale, blocks * rows, -1)
    scales = key.scale if chunks_of_scale else _padded(key.scale, ceil_div(S, KEYS) * KEYS, -1)
    keys, values = (_padded(x, max(KEYS, ceil_div(S, 8) * 8)) for x in (key.data, value))

    bytes_8 = (plgpu.TilingTransform((8, H)), plgpu.SwizzleTransform(H))
    bytes_16 = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    shared = dict(
        query=plgpu.SMEM((way.rows, _ROWS, H), jnp.int8, transforms=bytes_8),
        row_scale=plgpu.SMEM((way.rows, _ROWS), jnp.float32),
        out=plgpu.SMEM((way.rows, _ROWS, H), value.dtype, transforms=bytes_16),
        sums=plgpu.SMEM((way.rows, _ROWS), jnp.float32),
        key=plgpu.SMEM((way.stages, KEYS, H), jnp.int8, transforms=bytes_8),
        scale=plgpu.SMEM((way.stages, KEYS), jnp.float32),
        value=plgpu.SMEM((way.stages, KEYS, H), value.dtype, transforms=bytes_16),
        # Of rows: codes and scales. Of keys: codes, and scales where each has one.
        rows_ready=plgpu.Barrier(num_arrivals=2, num_barriers=way.rows),
        keys_ready=plgpu.Barrier(num_arrivals=1 if chunks_of_scale else 2, num_barriers=way.stages),
        values_ready=plgpu.Barrier(num_barriers=way.stages),
        keys_read=plgpu.Barrier(num_arrivals=way.rows, num_barriers=way.stages),
        values_read=plgpu.Barrier(num_arrivals=way.rows, num_barriers=way.stages),
        turn=plgpu.Barrier(num_arrivals=way.rows),
    )
    task = _Task(is_causal, T, S, N // K, factor, chunks_of_scale, way)

    def body(*memory: Any) -> None:
        def run(**kept: Any) -> None:
            _Block(task, _Global(*memory), kept).run()

        pl.run_scoped(run, **shared, collective_axes="warpgroup")

    out, sums = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(codes.shape, value.dtype),
            jax.ShapeDtypeStruct((B, N, blocks * rows), jnp.float32),
        ),
        grid=(blocks, N, B),
        grid_names=("rows", "head", "batch"),
        num_threads=way.rows + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(codes, row_scales, keys, scales, values)
    return out[:, :T], sums[..., :T]


def _padded(x: jax.Array, extent: int, axis: int = 1) -> jax.Array:
    """With as many tokens along an axis."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = 0, extent - x.shape[axis]
    return jnp.pad(x, pads)


class _Task(NamedTuple):
    is_causal: bool
    T: int
    S: int
    group: int
    factor: float
    chunks_of_scale: int
    way: Way


class _Global(NamedTuple):
    """What is in the memory of the device."""

    query: Any
    row_scale: Any
    key: Any
    scale: Any
    value: Any
    out: Any
    sums: Any


class _Block:
    """Rows of a head: what the warpgroups of a block do."""

    def __init__(self, task: _Task, memory: _Global, shared: dict[str, Any]):
        self.pl, self.plgpu = mosaic.modules()
        self.task, self.memory, self.shared = task, memory, shared
        self.warpgroup = lax.axis_index("warpgroup")
        self.batch, self.head = lax.axis_index("batch"), lax.axis_index("head")
        self.kv_head = lax.div(self.head, np.int32(task.group))
        block = lax.axis_index("rows")
        if task.is_causal:  # those of most keys first
            block = lax.axis_size("rows") - 1 - block
        rows = task.way.rows * _ROWS
        self.first = block * rows
        self.chunks: Any = ceil_div(task.S, KEYS)
        if task.is_causal:
            self.chunks = self.chunks_to(self.first + rows)

    def chunks_to(self, row: jax.Array) -> jax.Array:
        """Chunks of the keys before a row."""
        end = jnp.minimum(row, np.int32(self.task.S))
        return lax.div(end + (KEYS - 1), np.int32(KEYS))

    def slot(self, i: Any) -> Any:
        """Where chunk i is in shared memory."""
        return lax.rem(i, np.int32(self.task.way.stages))

    def run(self) -> None:
        when, rows = self.pl.when, self.task.way.rows
        when(self.warpgroup == rows)(self.bring)
        when(self.warpgroup < rows)(self.attend)

    # The warpgroup that copies.

    def bring(self) -> None:
        way, shared = self.task.way, self.shared
        self.plgpu.set_max_registers(40 if way.rows == 2 else 24, action="decrease")
        copy, at = self.plgpu.copy_gmem_to_smem, (self.batch, self.kv_head)

        def keys(i: Any, slot: Any) -> None:
            tokens, ready = self.pl.ds(i * KEYS, KEYS), shared["keys_ready"].at[slot]
            copy(self.memory.key.at[at[0], tokens, at[1]], shared["key"].at[slot], ready)
            if not self.task.chunks_of_scale:
                copy(self.memory.scale.at[*at, tokens], shared["scale"].at[slot], ready)

        def values(i: Any, slot: Any) -> None:
            tokens, ready = self.pl.ds(i * KEYS, KEYS), shared["values_ready"].at[slot]
            copy(self.memory.value.at[at[0], tokens, at[1]], shared["value"].at[slot], ready)

        @self.pl.loop(0, self.chunks)
        def _(i: Any) -> None:
            slot = self.slot(i)
            for copy_chunk, read in ((keys, "keys_read"), (values, "values_read")):

                @self.pl.when(i >= way.stages)
                def _(read: str = read) -> None:
                    self.plgpu.barrier_wait(shared[read].at[slot])

                copy_chunk(i, slot)

    # Those with rows.

    def attend(self) -> None:
        pl, plgpu, shared, memory = self.pl, self.plgpu, self.shared, self.memory
        task, w = self.task, self.warpgroup
        plgpu.set_max_registers(232 if task.way.rows == 2 else 160, action="increase")
        first = self.first + w * _ROWS
        rows, ready, query = pl.ds(first, _ROWS), shared["rows_ready"].at[w], shared["query"].at[w]
        plgpu.copy_gmem_to_smem(memory.query.at[self.batch, rows, self.head], query, ready)
        source = memory.row_scale.at[self.batch, self.head, rows]
        plgpu.copy_gmem_to_smem(source, shared["row_scale"].at[w], ready)
        plgpu.barrier_wait(ready)

        of_rows = plgpu.Layout.WGMMA.reduce(1)
        factor = plgpu.load(shared["row_scale"].at[w], layout=of_rows)
        factor = jnp.maximum(factor * np.float32(task.factor), np.float32(_MIN_FACTOR))

        def full(shape: tuple[int, ...], x: float, layout: Any) -> Any:
            return plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)

        state: Any = (
            full((_ROWS, HEAD_DIM), 0.0, plgpu.Layout.WGMMA),
            full((_ROWS,), -jnp.inf, of_rows),
            full((_ROWS,), 0.0, of_rows),
        )
        # Chunks that all rows see whole, those of the diagonal or the last, and the others'.
        seen, own = task.S // KEYS, self.chunks
        is_edited = task.is_causal or task.S % KEYS != 0
        if task.is_causal:
            seen = jnp.minimum(np.int32(seen), lax.div(first + 1, np.int32(KEYS)))
            own = jnp.clip(self.chunks_to(first + _ROWS), 1, self.chunks)
        plgpu.barrier_wait(shared["keys_ready"].at[0])
        if task.way.takes_turns:
            pl.when(w == 1)(self.pass_turn)
        step = functools.partial(self.step, query, factor, first, own)
        state = cast(Any, lax).fori_loop(0, seen, functools.partial(step, False), state)
        if is_edited:
            state = cast(Any, lax).fori_loop(seen, own, functools.partial(step, True), state)
        if task.is_causal:  # those of other warpgroups alone

            def passed(i: Any, _: None) -> None:
                slot = self.slot(i)
                plgpu.barrier_arrive(shared["keys_read"].at[slot])
                plgpu.barrier_arrive(shared["values_read"].at[slot])
                if task.way.takes_turns:
                    self.pass_turn()
                    self.pass_turn()

            lax.fori_loop(own, self.chunks, passed, None)
        if task.way.takes_turns:
            pl.when(w == 0)(self.pass_turn)
        self.store(first, *state)

    def pass_turn(self) -> None:
        """Until the other warpgroup comes to its half of the work."""
        self.plgpu.barrier_arrive(self.shared["turn"])
        self.plgpu.barrier_wait(self.shared["turn"])

    def step(
        self, query: Any, factor: Any, first: Any, own: Any, is_edited: bool, i: Any, state: Any
    ) -> Any:
        """A chunk of keys for a warpgroup's rows."""
        pl, plgpu, shared, takes_turns = self.pl, self.plgpu, self.shared, self.task.way.takes_turns
        acc, maximum, total = state
        slot = self.slot(i)

        def products(scores: Any) -> Any:
            plgpu.wgmma(scores, query, shared["key"].at[slot].transpose((1, 0)))
            if takes_turns:
                self.pass_turn()
            return scores[...]

        scores = pl.run_scoped(products, plgpu.ACC((_ROWS, KEYS), jnp.int32))
        limit = self.last_visible(first, i) if is_edited else None
        p, raised, total, decay = self.softmax(scores, factor, limit, i, (maximum, total))
        acc *= lax.broadcast_in_dim(decay, acc.shape, (0,))
        p = p.astype(shared["value"].dtype)
        # What is above ends before the tensor cores are waited for.
        acc, p, raised, total = lax.optimization_barrier((acc, p, raised, total))
        if takes_turns:
            plgpu.barrier_arrive(shared["turn"])
        plgpu.barrier_wait(shared["values_ready"].at[slot])
        if takes_turns:
            plgpu.barrier_wait(shared["turn"])

        def weighted(sums: Any) -> None:
            plgpu.wgmma(sums, p, shared["value"].at[slot])

            @pl.when(i + 1 < own)
            def _() -> None:
                plgpu.barrier_wait(shared["keys_ready"].at[self.slot(i + 1)])

        acc = pl.run_state(weighted)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(shared["values_read"].at[slot])
        return acc, raised, total

    def last_visible(self, first: Any, i: Any) -> Any:
        """Of chunk i the last key that each row sees."""
        end = jnp.full((_ROWS,), self.task.S - 1, jnp.int32)
        if self.task.is_causal:
            of_rows = self.plgpu.Layout.WGMMA.reduce(1)
            row = self.plgpu.broadcasted_iota(jnp.int32, (_ROWS,), 0, layout=of_rows)
            end = jnp.minimum(row + first, end)
        return end - i * KEYS

    def softmax(self, scores: Any, factor: Any, limit: Any, i: Any, state: Any) -> Any:
        """P of chunk i, the new maximum and sum, and by how much all before it decays."""
        plgpu, shared, shape = self.plgpu, self.shared, scores.shape
        maximum, total = state
        slot = self.slot(i)
        x = scores.astype(jnp.float32)
        if chunks := self.task.chunks_of_scale:
            block = lax.div(i, np.int32(chunks))
            factor = factor * self.memory.scale[self.batch, self.kv_head, block]
        else:
            of_keys = plgpu.Layout.WGMMA.reduce(0)
            scale = plgpu.load(shared["scale"].at[slot], layout=of_keys)
            x *= lax.broadcast_in_dim(scale, shape, (1,))
        plgpu.barrier_arrive(shared["keys_read"].at[slot])
        if limit is not None:
            key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
            x = jnp.where(key <= lax.broadcast_in_dim(limit, shape, (0,)), x, -jnp.inf)
        raised = jnp.maximum(maximum, x.max(axis=1) * factor)
        p = jnp.exp2(
            x * lax.broadcast_in_dim(factor, shape, (0,))
            - lax.broadcast_in_dim(raised, shape, (0,))
        )
        decay = jnp.exp2(maximum - raised)
        return p, raised, total * decay + p.sum(axis=1), decay

    def store(self, first: Any, acc: Any, maximum: Any, total: Any) -> None:
        plgpu, w = self.plgpu, self.warpgroup
        out, sums = self.shared["out"].at[w], self.shared["sums"].at[w]
        acc /= lax.broadcast_in_dim(total, acc.shape, (0,))
        out[...] = acc.astype(out.dtype)
        sums[...] = maximum + jnp.log2(total)
        plgpu.commit_smem()
        rows = self.pl.ds(first, _ROWS)
        plgpu.copy_smem_to_gmem(out, self.memory.out.at[self.batch, rows, self.head])
        plgpu.copy_smem_to_gmem(sums, self.memory.sums.at[self.batch, self.head, rows])
        plgpu.wait_smem_to_gmem(0)
