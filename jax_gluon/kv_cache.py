"""`QuantizedKVCache`: keys and values of the tokens so far, as codes, for generating the next."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NoReturn, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_gluon import lowering
from jax_gluon.attention import dot_product_attention
from jax_gluon.formats import PRESETS, AttentionQuantization, QuantizedTensor, QuantSpec, preset

#: Tokens that the first append must bring for their mean to centre this and later ones.
_LEAST_CENTRED = 32
_GRANULARITIES = ("row", "group", "block", "channel_block")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key", "value", "key_tail", "value_tail", "length", "dropped"),
    meta_fields=("window",),
)
@dataclasses.dataclass(frozen=True)
class QuantizedKVCache:
    """Codes of the keys and values of up to `capacity` tokens; a pytree, made by `create`.

    - `key`, `value`: `QuantizedTensor`s `[B, capacity, K, H]` and `[B, capacity, K, V]`.
    - `key_tail`, `value_tail`: float32 `[B, block, K, H]`: the tokens of an unfinished block, where
      the format shares scales between tokens (`"int4"` does for keys), else None.
    - `length`: int32 `[B]`, tokens stored so far; with a window, tokens seen so far.
    - `dropped`: int32 `[B]`, tokens that found no room. Nothing is ever overwritten for them.
    - `window`: keys that a query sees, its own included, or None. With a window the cache is a
      ring: a token takes the place of the one `capacity` tokens before it.

    >>> import jax, jax_gluon
    >>> cache = jax_gluon.QuantizedKVCache.create(2, 128, 4, 64, quantization="int4")
    >>> key, value = jax.random.normal(jax.random.key(0), (2, 2, 40, 4, 64))
    >>> cache = cache.append(key, value)
    >>> query = jax.random.normal(jax.random.key(1), (2, 1, 8, 64))
    >>> cache.attention(query).shape, cache.nbytes
    ((2, 1, 8, 64), 155664)
    """

    key: QuantizedTensor
    value: QuantizedTensor
    key_tail: jax.Array | None
    value_tail: jax.Array | None
    length: jax.Array
    dropped: jax.Array
    window: int | None

    @staticmethod
    def create(
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        quantization: str | AttentionQuantization = "int8",
        dtype: DTypeLike = jnp.float32,
        window: int | None = None,
    ) -> QuantizedKVCache:
        """An empty cache.

        **Arguments:** `quantization` names the formats of key and value, whose granularity is row,
        group, block or channel_block; `dtype` is what the codes stand for; `capacity` must be whole
        blocks of tokens, and with a `window` at least that and one block more.

        **Raises:** `ValueError` or `TypeError` that names the argument, what was found and what is
        allowed.
        """
        value_dim = head_dim if value_dim is None else value_dim
        sizes = dict(
            batch=batch, capacity=capacity, kv_heads=kv_heads, head_dim=head_dim,
            value_dim=value_dim, window=1 if window is None else window,
        )  # fmt: skip
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(cast(Any, size), int):
                _fail(TypeError, "create", name, f"{size!r}", "an int")
            if size < (0 if name == "batch" else 1):
                _fail(ValueError, "create", name, f"{size}", "a positive int")
        specs = _specs(quantization, {"key": head_dim, "value": value_dim})
        block = max(spec.token_block for spec in specs)
        if any(capacity % spec.token_block for spec in specs):
            _fail(
                ValueError, "create", "capacity", f"{capacity}", f"whole blocks of {block} tokens"
            )
        least = 0 if window is None else window + (block if block > 1 else 0)
        if capacity < least:
            _fail(
                ValueError, "create", "capacity", f"{capacity}", f"at least {least} for the window"
            )

        def empty(spec: QuantSpec, width: int) -> QuantizedTensor:
            x = jnp.zeros((batch, capacity, kv_heads, width), dtype)
            return lowering.quantize(spec, None, x, None)

        def tail(spec: QuantSpec, width: int) -> jax.Array | None:
            if spec.token_block == 1:
                return None
            return jnp.zeros((batch, spec.token_block, kv_heads, width), jnp.float32)

        zeros = jnp.zeros((batch,), jnp.int32)
        return QuantizedKVCache(
            empty(specs[0], head_dim), empty(specs[1], value_dim),
            tail(specs[0], head_dim), tail(specs[1], value_dim), zeros, zeros, window,
        )  # fmt: skip

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.key.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        leaves: list[jax.Array] = jax.tree.leaves(self)
        return sum(x.size * x.dtype.itemsize for x in leaves)

    def append(
        self, key: ArrayLike, value: ArrayLike, lengths: ArrayLike | None = None
    ) -> QuantizedKVCache:
        """The cache with T more tokens.

        Tokens that find no room are counted in `dropped` and not stored. Where the key format is
        centred, the mean is that of the first append, if that brings at least 32 tokens (softmax
        does not see which number all keys share), else 0.

        **Arguments:** `key` float `[B, T, K, H]`, `value` float `[B, T, K, V]`; `lengths` int32
        `[B]`: how many of the T tokens are real, default all.

        **Raises:** `ValueError` that names the argument, what was found and what is allowed.
        """
        key, value = jnp.asarray(key), jnp.asarray(value)
        B, _, K, _ = self.key.shape
        for name, x, cached in (("key", key, self.key), ("value", value, self.value)):
            expected = (B, *x.shape[1:2], *cached.shape[2:])
            if x.ndim != 4 or x.shape != expected or x.shape[1] == 0:
                allowed = f"[{B}, T, {K}, {cached.shape[3]}] with T >= 1"
                _fail(ValueError, "append", name, f"of shape {list(x.shape)}", allowed)
        T = key.shape[1]
        if value.shape[1] != T:
            _fail(ValueError, "append", "value", f"of {value.shape[1]} tokens", f"key's, {T}")
        count = jnp.full((B,), T, jnp.int32)
        if lengths is not None:
            array = jnp.asarray(lengths)
            if array.shape != (B,):
                _fail(ValueError, "append", "lengths", f"of shape {array.shape}", f"shape [{B}]")
            count = jnp.clip(array.astype(jnp.int32), 0, T)
        return _append(self, key, value, count)

    def attention(
        self,
        query: ArrayLike,
        *,
        scale: ArrayLike | None = None,
        logits_soft_cap: float | None = None,
        implementation: str | None = None,
    ) -> jax.Array:
        """Attention of the last T tokens appended over the cache, each up to its own position.

        **Arguments:** `query` float `[B, T, N, H]`; the rest as `dot_product_attention`.

        **Returns:** `[B, T, N, V]` of query's dtype.
        """
        query = jnp.asarray(query)
        attend = functools.partial(
            dot_product_attention, scale=scale, logits_soft_cap=logits_soft_cap,
            implementation=implementation,
        )  # fmt: skip
        if query.ndim == 4 and query.shape[1] == 1 and self.window is None:
            return attend(query, self.key, self.value, key_value_seq_lengths=self.length)
        T = query.shape[1]
        slot = jnp.arange(self.capacity, dtype=jnp.int32)[None, None, :]
        length = self.length[:, None, None]
        position = slot
        if self.window is not None:
            # The last token that a slot of the ring got.
            position = length - 1 - (length - 1 - slot) % jnp.int32(self.capacity)
        own = length - jnp.int32(T) + jnp.arange(T, dtype=jnp.int32)[None, :, None]
        visible = (position >= 0) & (position <= own)
        if self.window is not None:
            visible &= position > own - jnp.int32(self.window)
        return attend(query, self.key, self.value, mask=visible[:, None])


# Jitted, so that a call outside of jit is one program.
@lowering.jit()
def _append(
    cache: QuantizedKVCache, key: jax.Array, value: jax.Array, count: jax.Array
) -> QuantizedKVCache:
    stored = count
    if cache.window is None:
        stored = jnp.minimum(count, jnp.int32(cache.capacity) - cache.length)
    new_key, key_tail = _store(cache, cache.key, cache.key_tail, key, stored)
    new_value, value_tail = _store(cache, cache.value, cache.value_tail, value, stored)
    return dataclasses.replace(
        cache, key=new_key, value=new_value, key_tail=key_tail, value_tail=value_tail,
        length=cache.length + stored, dropped=cache.dropped + (count - stored),
    )  # fmt: skip


def _store(
    cache: QuantizedKVCache,
    cached: QuantizedTensor,
    tail: jax.Array | None,
    new: jax.Array,
    count: jax.Array,
) -> tuple[QuantizedTensor, jax.Array | None]:
    """Codes of the first `count` new tokens, behind those that are there."""
    spec, T = cached.spec, new.shape[1]
    new = jax.lax.stop_gradient(new).astype(jnp.float32)
    mean = cached.mean
    if mean is not None:
        if T >= _LEAST_CENTRED:
            first = _mean(new, count)
            mean = jnp.where((cache.length == 0)[:, None, None, None], first, mean)
        new = new - mean
    plain = dataclasses.replace(spec, center=False)
    block = spec.token_block
    offset = cache.length % jnp.int32(block)
    if tail is not None:
        # Whole blocks: what the unfinished one has, then the new tokens; the last real one is
        # repeated to the end, which leaves the extremes of its block alone.
        tokens = -(-(T + block - 1) // block) * block
        place = jnp.arange(tokens, dtype=jnp.int32)[None, :]
        last = jnp.maximum(count - 1, 0)[:, None]
        index = jnp.clip(place - offset[:, None], 0, last)
        behind = jnp.take_along_axis(new, index[:, :, None, None], axis=1)
        before = jnp.pad(tail, [(0, 0), (0, tokens - block), (0, 0), (0, 0)])
        is_old = (place < offset[:, None]) | (count == 0)[:, None]
        new = jnp.where(is_old[:, :, None, None], before, behind)
        start = (offset + count) // jnp.int32(block) * jnp.int32(block)
        window = start[:, None] + jnp.arange(block, dtype=jnp.int32)[None, :]
        window = jnp.clip(window, 0, tokens - 1)
        tail = jnp.take_along_axis(new, window[:, :, None, None], axis=1)
    codes = lowering.quantize(plain, None, new, None)
    first_block = cache.length // jnp.int32(block)
    used = jnp.where(count > 0, offset + count, jnp.zeros_like(count))
    blocks = -(-used // jnp.int32(block))

    def scatter(old: jax.Array, fresh: jax.Array, size: int) -> jax.Array:
        """`size` entries of `fresh` a block, behind the first `first_block` blocks of `old`."""
        entries = old.shape[1]
        place = jnp.arange(fresh.shape[1], dtype=jnp.int32)[None, :]
        target = first_block[:, None] * jnp.int32(size) + place
        if cache.window is not None:
            target = target % jnp.int32(entries)
        target = jnp.where(place < (blocks * jnp.int32(size))[:, None], target, entries)
        rows = jnp.arange(old.shape[0], dtype=jnp.int32)[:, None]
        return old.at[rows, target].set(fresh, mode="drop")

    def updated(name: str, size: int) -> Any:
        old = getattr(cached, name)
        return None if old is None else scatter(old, getattr(codes, name), size)

    stored = dataclasses.replace(
        cached, data=updated("data", block), scale=updated("scale", 1),
        zero_point=updated("zero_point", 1), minimum=updated("minimum", 1), mean=mean,
    )  # fmt: skip
    return stored, tail


def _mean(x: jax.Array, count: jax.Array) -> jax.Array:
    real = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] < count[:, None]
    kept = jnp.where(real[:, :, None, None] & jnp.isfinite(x), x, jnp.zeros_like(x))
    many = jnp.maximum(count, 1).astype(x.dtype)[:, None, None, None]
    return jnp.sum(kept / many, axis=1, keepdims=True)


def _specs(quantization: Any, widths: dict[str, int]) -> list[QuantSpec]:
    names = ", ".join(f'"{name}"' for name in PRESETS)
    allowed = f"{names}, an AttentionQuantization with key and value"
    if isinstance(quantization, str) and quantization not in PRESETS:
        _fail(ValueError, "create", "quantization", f'"{quantization}"', allowed)
    if not isinstance(quantization, str | AttentionQuantization):
        found = f"a {type(quantization).__name__}"
        _fail(TypeError, "create", "quantization", found, allowed)
    both = preset(quantization)
    assert both is not None
    specs: list[QuantSpec] = []
    for name, width in widths.items():
        spec = getattr(both, name)
        if spec is None:
            _fail(ValueError, "create", "quantization", f"without {name}", allowed)
        if spec.granularity not in _GRANULARITIES:
            _fail(
                ValueError, "create", "quantization", f'"{spec.granularity}" for {name}',
                f"{', '.join(_GRANULARITIES)}, whose scales don't span all tokens",
            )  # fmt: skip
        if spec.bits == 4 and width % 2:
            _fail(ValueError, "create", f"{name} dim", f"{width}", "an even one, which 4 bits need")
        specs.append(spec)
    return specs


def _fail(
    error: type[Exception], function: str, argument: str, found: str, allowed: str
) -> NoReturn:
    raise error(
        f"jax_gluon.QuantizedKVCache.{function}: {argument} is {found}; allowed: {allowed}."
    )
