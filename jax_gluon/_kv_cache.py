"""`QuantizedKVCache`: the codes of the keys and values so far, to which tokens are appended."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_gluon import _attention as plain_attention
from jax_gluon import _lowering
from jax_gluon._arguments import KEYWORDS, CheckedArguments, Implementation, check_arguments
from jax_gluon._errors import Checker
from jax_gluon._meshes import on_meshes, vary_like
from jax_gluon._quantization.codes import power_cells, to_bits, unrotated, without_center
from jax_gluon._quantization.formats import (
    CENTER_TOKENS,
    PRESETS,
    AttentionQuantization,
    Operand,
    Preset,
    QuantizedTensor,
    QuantSpec,
    preset,
)
from jax_gluon._ragged_tokens import whole_blocks, with_tokens
from jax_gluon._sharding.partitioned import partitioned
from jax_gluon._sharding.split import LENGTHS, QUERY, Split
from jax_gluon._typing import Array, Float, Float32, Int32, Integer, Real
from jax_gluon._xla.quantize import divide_large_tokens, ordinary_norm

_GRANULARITIES = ("row", "group", "block", "channel_block")
_CREATE, _APPEND, _ATTENTION = (
    Checker(f"QuantizedKVCache.{name}") for name in ("create", "append", "attention")
)
_ARRAYS = ("key", "value", "key_head", "value_head", "key_tail", "value_tail", "length", "dropped")
# The cache itself knows where tokens stand, and which keys a query sees.
_OWN = (
    "is_causal", "key_value_seq_lengths", "local_window_size", "query_offset", "query_positions",
    "key_value_positions", "query_segment_ids", "key_value_segment_ids", "layout",
)  # fmt: skip
_KEYWORDS = tuple(name for name in KEYWORDS if name not in _OWN)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=_ARRAYS,
    meta_fields=("query", "window", "dtype"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedKVCache:
    """Codes of the keys and values of up to `capacity` tokens, made by `create`.

    A pytree, which `jit`, `vmap`, `scan` and donation take; donated or carried through a scan, it
    is updated in place. No gradient flows through it.

    - `key`, `value`: `QuantizedTensor`s `[B, capacity, K, H]` and `[B, capacity, K, V]`; entries
      that no token has reached mean nothing.
    - `key_head`, `value_head`: float32 `[B, 32, K, H]` and `[B, 32, K, V]`, the tokens that the
      center is taken from (in whole blocks), where the format has one; else None.
    - `key_tail`, `value_tail`: float32 `[B, block, K, H]` and `[B, block, K, V]`, the tokens of the
      unfinished block, where the format shares scales between tokens; else None.
    - `length`: int32 `[B]`, tokens stored; with a window, tokens seen.
    - `dropped`: int32 `[B]`, tokens that found no room.
    - `query`: how `attention` quantizes float queries, or None.
    - `window`: None, or how many keys a query sees, its own included. The cache is then a ring:
      token p is in slot `p % capacity`, over the token `capacity` before it.
    - `dtype`: what the codes stand for.

    >>> import jax, jax_gluon
    >>> cache = jax_gluon.QuantizedKVCache.create(2, 128, 4, 64, quantization="int4")
    >>> key, value = jax.random.normal(jax.random.key(0), (2, 2, 40, 4, 64))
    >>> cache = cache.append(key, value)
    >>> query = jax.random.normal(jax.random.key(1), (2, 1, 8, 64))
    >>> cache.attention(query).shape, cache.length.tolist()
    ((2, 1, 8, 64), [40, 40])
    """

    key: Float[QuantizedTensor, "B capacity K H"]
    value: Float[QuantizedTensor, "B capacity K V"]
    key_head: Float32[Array, "B head K H"] | None
    value_head: Float32[Array, "B head K V"] | None
    key_tail: Float32[Array, "B key_block K H"] | None
    value_tail: Float32[Array, "B value_block K V"] | None
    length: Int32[Array, " B"]
    dropped: Int32[Array, " B"]
    query: QuantSpec | None
    window: int | None
    dtype: np.dtype[Any]

    @staticmethod
    def create(
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        quantization: Preset | AttentionQuantization = "int8",
        dtype: DTypeLike = jnp.float32,
        window: int | None = None,
    ) -> QuantizedKVCache:
        """An empty cache.

        **Arguments:**

        - `batch`, `capacity`, `kv_heads`, `head_dim`: B, tokens of each entry of the batch, K, H.
          The capacity must be a multiple of the token blocks of both formats, and with a window at
          least that plus the larger block (1 for row and group).
        - `value_dim`: V, default H.
        - `quantization`: `"int8"`, `"int4"` or an `AttentionQuantization` with key and value, both
          of granularity row, group, block or channel_block. Where it has a query, as the presets
          do, `attention` quantizes float queries so, and products are made of integers; else they
          are made of floats, which is slower and as exact as the cache.
        - `dtype`: a float dtype, that of `key.dequantize()`; the codes do not depend on it.
        - `window`: keys that a query sees, its own included; None is all.

        **Raises:** `ValueError` or `TypeError` that names the argument, what was found and what is
        allowed.

        >>> import jax_gluon
        >>> cache = jax_gluon.QuantizedKVCache.create(1, 128, 4, 64, window=100)
        >>> cache.capacity, cache.key.shape, cache.nbytes
        (128, (1, 128, 4, 64), 103432)
        """
        batch, kv_heads = _size("batch", batch), _size("kv_heads", kv_heads)
        capacity, head_dim = _size("capacity", capacity), _size("head_dim", head_dim)
        value_dim = head_dim if value_dim is None else _size("value_dim", value_dim)
        window = None if window is None else _size("window", window)
        query_spec, key_spec, value_spec = _specs(quantization, head_dim, value_dim)
        blocks = key_spec.token_block, value_spec.token_block
        whole = math.lcm(*blocks)
        if capacity % whole:
            allowed = f"a multiple of {whole}, whole blocks of tokens"
            _CREATE.value_error("capacity", f"{capacity}", allowed)
        if window is not None and capacity < window + max(blocks):
            allowed = f"at least {window + max(blocks)}, the window and a block of tokens"
            _CREATE.value_error("capacity", f"{capacity}", allowed)
        stands_for = _CREATE.float_dtype("dtype", dtype)

        def empty(spec: QuantSpec, width: int) -> QuantizedTensor:
            # Zeros stand for 0 in every format. No float array of this size is ever made.
            x = jax.ShapeDtypeStruct((batch, capacity, kv_heads, width), jnp.float32)
            parts = jax.eval_shape(functools.partial(_lowering.quantize, spec, "xla"), x, None)
            parts = jax.eval_shape(functools.partial(jax.tree.map, to_bits), parts)
            return dataclasses.replace(_zeros(parts), dtype=stands_for)

        def head(spec: QuantSpec, width: int) -> jax.Array | None:
            if not spec.center:
                return None
            tokens = -(-CENTER_TOKENS // spec.token_block) * spec.token_block
            return jnp.zeros((batch, tokens, kv_heads, width), jnp.float32)

        def tail(spec: QuantSpec, width: int) -> jax.Array | None:
            if spec.token_block == 1:
                return None
            return jnp.zeros((batch, spec.token_block, kv_heads, width), jnp.float32)

        # Two arrays of zeros: one can't be donated twice.
        length, dropped = (jnp.zeros((batch,), jnp.int32) for _ in range(2))
        return QuantizedKVCache(
            empty(key_spec, head_dim), empty(value_spec, value_dim),
            head(key_spec, head_dim), head(value_spec, value_dim),
            tail(key_spec, head_dim), tail(value_spec, value_dim),
            length, dropped, query_spec, window, stands_for,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"QuantizedKVCache(key={self.key}, value={self.value}, window={self.window})"

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.key.shape[-3]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        leaves: list[jax.Array] = jax.tree.leaves(self)
        return sum(x.size * x.dtype.itemsize for x in leaves)

    def append(
        self,
        key: Float[ArrayLike, "B T K H"],
        value: Float[ArrayLike, "B T K V"],
        lengths: Integer[ArrayLike, " B"] | None = None,
    ) -> QuantizedKVCache:
        """The cache with T more tokens, each behind those of its entry of the batch.

        Codes are those of all tokens quantized at once; those of an unfinished block change as it
        fills. Without a window, tokens past the capacity are counted in `dropped` and nothing is
        overwritten for them; a query for one sees all that is stored.

        Where a format is centered, the first 32 tokens of an entry are its center; until they are
        there, the codes of the fewer change with each append.

        **Arguments:**

        - `key`, `value`: `[B, T, K, H]` and `[B, T, K, V]`, float of any dtype, T at least 1.
        - `lengths`: integers `[B]`, clamped to `[0, T]`: how many of the T tokens are real; those
          behind them are ignored. Default T.

        **Raises:** `ValueError` or `TypeError` that names the argument, what was found and what is
        allowed; `ImportError` where the plugin is needed and can't be loaded.

        >>> import jax.numpy as jnp, jax_gluon
        >>> cache = jax_gluon.QuantizedKVCache.create(2, 16, 4, 64)
        >>> cache = cache.append(jnp.ones((2, 9, 4, 64)), jnp.ones((2, 9, 4, 64)), [9, 4])
        >>> cache.append(jnp.ones((2, 9, 4, 64)), jnp.ones((2, 9, 4, 64))).length.tolist()
        [16, 13]
        """
        new_key = _tokens("key", key, self.key)
        new_value = _tokens("value", value, self.value)
        T = new_key.shape[1]
        if new_value.shape[1] != T:
            _APPEND.value_error("value", f"of {new_value.shape[1]} tokens", f"key's, {T}")
        if lengths is None:
            count = jnp.full_like(self.length, T)
        else:
            count = _APPEND.lengths("lengths", lengths, self.length.shape, T)
        return on_meshes(_append, (), self, self, new_key, new_value, count)

    def attention(
        self,
        query: Float[Operand, "B T N H"],
        *,
        scale: Real[ArrayLike, ""] | Real[ArrayLike, " N"] | None = None,
        logits_soft_cap: float | None = None,
        implementation: Implementation | None = None,
        **keywords: Any,
    ) -> Float[Array, "B T N V"]:
        """Attention of the last T tokens over the cache, each up to its own position.

        Row t belongs to the token T - t before the end, whatever `lengths` its append had: the last
        T real ones of each entry, so rows of ragged queries stand at the right. Rows before the
        first token give 0. Float queries are quantized as the cache was told to. With a window, the
        ring must still have what the first of the T sees: T may be up to
        `capacity - window - block + 2`, with the larger token block.

        **Arguments:** `query`: `[B, T, N, H]`, appended before. The rest, `query_seq_lengths`,
        `quantization` (of the query, in place of the cache's), `sinks` and `kernel` included, as
        `jax_gluon.dot_product_attention`.

        **Returns:** `[B, T, N, V]` of query's dtype.

        **Raises:** as `jax_gluon.dot_product_attention`.

        >>> import jax.numpy as jnp, jax_gluon
        >>> cache = jax_gluon.QuantizedKVCache.create(1, 64, 1, 8)
        >>> cache = cache.append(jnp.ones((1, 5, 1, 8)), jnp.ones((1, 5, 1, 8)))
        >>> cache.attention(jnp.ones((1, 5, 2, 8))).shape
        (1, 5, 2, 8)
        """
        _ATTENTION.keywords(keywords, _KEYWORDS)
        q = query if isinstance(query, QuantizedTensor) else jnp.asarray(query)
        if q.ndim != 4:
            _ATTENTION.value_error("query", f"of rank {q.ndim}", "rank 4 (BTNH)")
        T, window = q.shape[1], self.window
        if window is not None:
            block = max(x.spec.token_block for x in (self.key, self.value))
            most = self.capacity - window - block + 2
            if most < T:
                allowed = f"at most {most}, for which this ring keeps all keys that they see"
                _ATTENTION.value_error("query", f"of {T} tokens", allowed)
        if self.query is not None:
            keywords.setdefault("quantization", AttentionQuantization(query=self.query))
        arguments = check_arguments(
            _ATTENTION, q, self.key, self.value, None, None,
            scale=scale, logits_soft_cap=logits_soft_cap, implementation=implementation,
            is_causal=True, key_value_seq_lengths=self.length, **keywords,
        )  # fmt: skip
        first = self.length + self.dropped - T
        if window is None:
            return _attend(arguments, first, self.length)[0]
        # A ring's slots hold two laps, and positions in each of them follow the slots: the lap that
        # is being written from `base` on, and what is left of the one before.
        arguments = dataclasses.replace(
            arguments,
            problem=dataclasses.replace(arguments.problem, local_window=(window - 1, 0)),
        )
        base = jnp.maximum(self.length - 1, 0) // self.capacity * self.capacity
        older = jnp.minimum(base, self.capacity)  # 0 in the first lap
        newer = _attend(arguments, first - base, self.length - base)
        # The sinks are among the terms of one lap.
        operands = arguments.operands._replace(sinks=None)
        arguments = dataclasses.replace(arguments, operands=operands)
        return _merge(newer, _attend(arguments, first - base + self.capacity, older))


def _attend(
    arguments: CheckedArguments, query_offset: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    operands = arguments.operands._replace(query_offset=query_offset, key_value_seq_lengths=lengths)
    return plain_attention.run(dataclasses.replace(arguments, operands=operands), True)


@_lowering.jit()
def _merge(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The output over both parts of the keys, of output and log-sum-exp over each."""
    (out_a, log_a), (out_b, log_b) = a, b
    # Finite where a row sees nothing, and far below all else.
    largest = jnp.maximum(log_a, log_b)
    weight_a, weight_b = (jnp.exp(log - largest)[..., None] for log in (log_a, log_b))
    total = weight_a + weight_b
    merged = out_a * (weight_a / total) + out_b * (weight_b / total)
    return merged.astype(out_a.dtype)


@_lowering.jit()
def _append(
    cache: QuantizedKVCache, key: jax.Array, value: jax.Array, count: jax.Array
) -> QuantizedKVCache:
    letters: Any = dict.fromkeys(_ARRAYS, QUERY) | {"length": LENGTHS, "dropped": LENGTHS}
    axes = dataclasses.replace(cache, **letters)
    operands = jax.lax.stop_gradient((cache, key, value, count))
    return partitioned(_append_to_part, (), (axes, QUERY, QUERY, LENGTHS), axes, *operands)


def _append_to_part(
    split: Split, cache: QuantizedKVCache, key: jax.Array, value: jax.Array, count: jax.Array
) -> QuantizedKVCache:
    del split  # all that is done is of one entry and head
    stored = count
    if cache.window is None:
        stored = jnp.minimum(count, cache.capacity - cache.length)
    append = functools.partial(_stored, length=cache.length, count=stored)
    new_key, key_head, key_tail = append(cache.key, cache.key_head, cache.key_tail, key)
    new_value, value_head, value_tail = append(
        cache.value, cache.value_head, cache.value_tail, value
    )
    return dataclasses.replace(
        cache, key=new_key, value=new_value, key_head=key_head, value_head=value_head,
        key_tail=key_tail, value_tail=value_tail,
        length=cache.length + stored, dropped=cache.dropped + (count - stored),
    )  # fmt: skip


def _stored(
    cached: QuantizedTensor,
    head: jax.Array | None,
    tail: jax.Array | None,
    new: jax.Array,
    length: jax.Array,
    count: jax.Array,
) -> tuple[QuantizedTensor, jax.Array | None, jax.Array | None]:
    """The first `count` of the new tokens behind `length` others: codes, and the floats kept."""
    spec = cached.spec
    block = spec.token_block
    x = new.astype(jnp.float32)
    center, recoded = cached.center, None
    if head is not None:
        head = with_tokens(head, x, length, count)
        recoded = _recoded(cached, head, length, count)
        center = recoded.center
    offset = length % block
    if tail is not None:
        x, tail = whole_blocks(tail, x, offset, count)
    x = _centered(cached, x, center)
    cells = None
    if spec.token_powers:
        first_tokens = _centered(cached, cast(Any, head), center)
        seen = jnp.arange(first_tokens.shape[1], dtype=jnp.int32)[None, :]
        ordinary = ordinary_norm(first_tokens, seen < (length + count)[:, None])
        x, powers = divide_large_tokens(x, ordinary)
        real = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] < (offset + count)[:, None]
        cells = power_cells(jnp.where(real[:, :, None, None], powers, 0), spec)
    plain = dataclasses.replace(spec, center=False, token_powers=False)
    fresh = _lowering.quantize(plain, None, x, None)
    if cells is not None:
        fresh = dataclasses.replace(fresh, scale=jnp.concatenate([fresh.scale, cells], axis=-1))
    first = length // block
    end = jnp.where(count > 0, -(-(length + count) // block), 0)

    def scatter(name: str, size: int) -> Any:
        """`size` entries a block. Past the end is the beginning, in a ring; else nothing is."""
        old = getattr(cached, name)
        if old is None:
            return None
        entries = to_bits(getattr(fresh, name))
        place = (first * size)[:, None] + jnp.arange(entries.shape[1], dtype=jnp.int32)[None, :]
        if recoded is not None:
            again = to_bits(getattr(recoded, name))
            entries = jnp.concatenate([again, entries], axis=1)
            early = jnp.arange(again.shape[1], dtype=jnp.int32)[None, :]
            # A final center leaves these codes what they are.
            early = jnp.where((length < CENTER_TOKENS)[:, None], early, -1)
            place = jnp.concatenate([early, place], axis=1)
        last = (end * size)[:, None]
        # More than a ring holds: of entries for the same slot, only the last is written.
        is_kept = (place >= 0) & (place < last) & (place >= last - old.shape[1])
        target = jnp.where(is_kept, place % old.shape[1], old.shape[1])
        entry = jnp.arange(old.shape[0], dtype=jnp.int32)[:, None]
        return old.at[entry, target].set(entries, mode="drop")

    codes = dataclasses.replace(
        cached, data=scatter("data", block), scale=scatter("scale", 1),
        zero_point=scatter("zero_point", 1), minimum=scatter("minimum", 1), center=center,
    )  # fmt: skip
    return codes, head, tail


def _recoded(
    cached: QuantizedTensor, head: jax.Array, length: jax.Array, count: jax.Array
) -> QuantizedTensor:
    """Codes of the first tokens, and the center, where it is not final; zeros in their place."""
    B, tokens = head.shape[:2]
    is_open = length < CENTER_TOKENS

    def code() -> QuantizedTensor:
        token = jnp.arange(tokens, dtype=jnp.int32)[None, :]
        visible = jnp.broadcast_to(token < (length + count)[:, None], (B, tokens))
        return _lowering.quantize(cached.spec, None, head, visible)

    codes = cast(Any, jax.lax.cond)(
        jnp.any(is_open), code, lambda: vary_like(head, _zeros(cast(Any, jax.eval_shape)(code)))
    )
    center = jnp.where(is_open[:, None, None, None], codes.center, cast(Any, cached.center))
    return dataclasses.replace(codes, center=center)


def _centered(cached: QuantizedTensor, x: jax.Array, center: jax.Array | None) -> jax.Array:
    """`x` less its center, which the cache keeps rotated where the format is."""
    if center is None:
        return x
    return without_center(x, unrotated(center) if cached.spec.rotate else center)


def _zeros(parts: QuantizedTensor) -> QuantizedTensor:
    def zeros(x: Any) -> jax.Array:
        return jnp.zeros(x.shape, x.dtype)

    return jax.tree.map(zeros, parts)


def _size(name: str, x: Any) -> int:
    return _CREATE.integer(name, x, 1, "an int of at least 1")


def _specs(
    quantization: Any, head_dim: int, value_dim: int
) -> tuple[QuantSpec | None, QuantSpec, QuantSpec]:
    names = ", ".join(f'"{name}"' for name in PRESETS)
    allowed = f"{names}, an AttentionQuantization with key and value"
    if not isinstance(quantization, str | AttentionQuantization):
        found = f"a {type(quantization).__name__}"
        _CREATE.type_error("quantization", found, allowed)
    if isinstance(quantization, str) and quantization not in PRESETS:
        _CREATE.value_error("quantization", f'"{quantization}"', allowed)
    both = preset(quantization) or AttentionQuantization()

    def spec_of(name: str, argument: str, width: int) -> QuantSpec:
        spec: QuantSpec | None = getattr(both, name)
        if spec is None:
            _CREATE.value_error("quantization", f"without {name}", allowed)
        if spec.granularity not in _GRANULARITIES:
            found = f'of granularity "{spec.granularity}" for {name}'
            granularities = ", ".join(_GRANULARITIES)
            _CREATE.value_error("quantization", found,
                f"{granularities} (a scale over all tokens can't be appended to)",
            )  # fmt: skip
        if spec.bits == 4 and width % 2:
            _CREATE.value_error(argument, f"{width}", "an even one, which 4 bits need")
        return spec

    query: QuantSpec | None = both.query
    if query is not None and query.bits == 4 and head_dim % 2:
        _CREATE.value_error("head_dim", f"{head_dim}", "an even one, which 4 bits need")
    return query, spec_of("key", "head_dim", head_dim), spec_of("value", "value_dim", value_dim)


def _tokens(name: str, x: Any, cached: QuantizedTensor) -> jax.Array:
    if isinstance(x, QuantizedTensor):
        _APPEND.type_error(name, "a QuantizedTensor", "a float array")
    array = _APPEND.float_array(name, x)
    B, _, K, H = cached.shape
    if array.ndim != 4 or array.shape[1] < 1 or array.shape != (B, array.shape[1], K, H):
        allowed = f"[{B}, T, {K}, {H}] with T at least 1"
        _APPEND.value_error(name, f"of shape {list(array.shape)}", allowed)
    return array
