"""`QuantizedKVCache`: the codes of the keys and values so far, to which tokens are appended."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_gluon import _lowering
from jax_gluon._arguments import CheckedArguments
from jax_gluon._caches.arguments import size_of, specs_of
from jax_gluon._caches.cache import KVCache, attend
from jax_gluon._caches.storage import Cached, InOnePiece, Tokens, empty, replayed, stored
from jax_gluon._quantization.formats import (
    AttentionQuantization,
    Preset,
    QuantizedTensor,
    QuantSpec,
)
from jax_gluon._sharding.split import LENGTHS, QUERY
from jax_gluon._typing import Array, Float, Float32, Int32

_ARRAYS = (
    "key", "value", "key_head", "value_head", "key_tail", "value_tail", "length", "dropped",
    "longest",
)  # fmt: skip


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=_ARRAYS,
    meta_fields=("query", "window", "dtype"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedKVCache(KVCache):
    """Codes of the keys and values of up to `capacity` tokens, made by `create`.

    A pytree, which `jit`, `vmap`, `scan` and donation take; donated or carried through a scan, it
    is updated in place. No gradient flows through it.

    - `key`, `value`: `QuantizedTensor`s `[B, capacity, K, H]` and `[B, capacity, K, V]`; entries
      that no token has reached mean nothing.
    - `key_head`, `value_head`: float32 `[B, 32, K, H]` and `[B, 32, K, V]`, the tokens that the
      center is taken from (in whole blocks), where the format has one; else None.
    - `key_tail`, `value_tail`: float32 `[B, 2 * block, K, H]` and `[B, 2 * block, K, V]`, the last
      tokens, token p in slot `p % (2 * block)`, where the format shares scales between tokens; else
      None.
    - `length`: int32 `[B]`, tokens stored; with a window, tokens seen.
    - `dropped`: int32 `[B]`, tokens that found no room.
    - `longest`: int32 `[B]`, the greatest length that an entry has had: what `rewind` finds
      overwritten depends on it.
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
    key_tail: Float32[Array, "B key_tail K H"] | None
    value_tail: Float32[Array, "B value_tail K V"] | None
    length: Int32[Array, " B"]
    dropped: Int32[Array, " B"]
    longest: Int32[Array, " B"]
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
        (128, (1, 128, 4, 64), 103436)
        """
        check = QuantizedKVCache._check("create")
        batch, kv_heads = size_of(check, "batch", batch), size_of(check, "kv_heads", kv_heads)
        capacity, head_dim = (
            size_of(check, "capacity", capacity),
            size_of(check, "head_dim", head_dim),
        )
        value_dim = head_dim if value_dim is None else size_of(check, "value_dim", value_dim)
        window = None if window is None else size_of(check, "window", window)
        query_spec, key_spec, value_spec = specs_of(check, quantization, head_dim, value_dim)
        blocks = key_spec.token_block, value_spec.token_block
        whole = math.lcm(*blocks)
        if capacity % whole:
            allowed = f"a multiple of {whole}, whole blocks of tokens"
            check.value_error("capacity", f"{capacity}", allowed)
        if window is not None and capacity < window + max(blocks):
            allowed = f"at least {window + max(blocks)}, the window and a block of tokens"
            check.value_error("capacity", f"{capacity}", allowed)
        stands_for = check.float_dtype("dtype", dtype)
        rows = batch, capacity, kv_heads
        key = empty(key_spec, batch, (*rows, head_dim), stands_for)
        value = empty(value_spec, batch, (*rows, value_dim), stands_for)
        # Arrays of zeros: one can't be donated twice.
        length, dropped, longest = (jnp.zeros((batch,), jnp.int32) for _ in range(3))
        return QuantizedKVCache(
            key.codes, value.codes, key.head, value.head, key.tail, value.tail,
            length, dropped, longest, query_spec, window, stands_for,
        )  # fmt: skip

    @property
    def capacity(self) -> int:
        """Tokens that an entry of the batch has room for."""
        return self.key.shape[-3]

    @property
    def rewindable(self) -> int:
        """Tokens that `rewind` can take back.

        A block of those that share scales, or all; of a window, those that its ring has kept for.
        """
        limit = super().rewindable
        if self.window is None:
            return limit
        return min(limit, self.capacity - self.window - self._block + 1)

    def _least_length(self) -> jax.Array:
        least = super()._least_length()
        if self.window is None:
            return least
        return jnp.maximum(least, self.longest - (self.capacity - self.window - self._block + 1))

    @property
    def _block(self) -> int:
        return max(x.spec.token_block for x in (self.key, self.value))

    def _axes(self) -> tuple[Any, str, str]:
        letters: Any = dict.fromkeys(_ARRAYS, QUERY)
        letters |= dict.fromkeys(("length", "dropped", "longest"), LENGTHS)
        return dataclasses.replace(self, **letters), QUERY, LENGTHS

    def _of_rows(self, rows: jax.Array) -> QuantizedKVCache:
        def of_entries(x: jax.Array) -> jax.Array:
            return jnp.take(x, rows, axis=0, mode="clip")

        return jax.tree.map(of_entries, self)

    def _appended(self, key: jax.Array, value: jax.Array, count: jax.Array) -> QuantizedKVCache:
        fits = count
        if self.window is None:
            fits = jnp.minimum(count, self.capacity - self.length)
        return self._with(
            *(
                stored(InOnePiece(), each, Tokens(new, self.length, fits))
                for each, new in zip(self._cached(), (key, value), strict=True)
            ),
            length=self.length + fits,
            dropped=self.dropped + (count - fits),
            longest=jnp.maximum(self.longest, self.length + fits),
        )

    def _rewound(self, tokens: jax.Array) -> QuantizedKVCache:
        dropped = jnp.maximum(self.dropped - tokens, 0)
        length = jnp.maximum(self.length - jnp.maximum(tokens - self.dropped, 0), 0)

        def again(each: Cached) -> Cached:
            given = replayed(each, length)
            if given is None:
                return each
            # An entry that nothing was taken from stays what it is.
            count = jnp.where(length < self.length, given.real, 0)
            return stored(InOnePiece(), each, given._replace(real=count))

        return self._with(*map(again, self._cached()), length=length, dropped=dropped)

    def _attend(self, arguments: CheckedArguments, T: int) -> jax.Array:
        window = self.window
        first = self.length + self.dropped - T
        if window is None:
            return attend(arguments, first, self.length)[0]
        most = self.capacity - window - self._block + 2
        if most < T:
            allowed = f"at most {most}, for which this ring keeps all keys that they see"
            arguments.check.value_error("query", f"of {T} tokens", allowed)
        # A ring's slots hold two laps, and positions in each of them follow the slots: the lap that
        # is being written from `base` on, and what is left of the one before.
        arguments = dataclasses.replace(
            arguments,
            problem=dataclasses.replace(arguments.problem, local_window=(window - 1, 0)),
        )
        base = jnp.maximum(self.length - 1, 0) // self.capacity * self.capacity
        older = jnp.minimum(base, self.capacity)  # 0 in the first lap
        newer = attend(arguments, first - base, self.length - base)
        # The sinks are among the terms of one lap.
        operands = arguments.operands._replace(sinks=None)
        arguments = dataclasses.replace(arguments, operands=operands)
        return _merge(newer, attend(arguments, first - base + self.capacity, older))


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
