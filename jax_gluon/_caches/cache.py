"""What all caches of keys and values have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_gluon import _attention as plain_attention
from jax_gluon import _lowering
from jax_gluon._arguments import KEYWORDS, CheckedArguments, Implementation, check_arguments
from jax_gluon._caches import state
from jax_gluon._caches.arguments import mask_of_rows, rewound_of, rows_of, tokens_of
from jax_gluon._caches.storage import Cached
from jax_gluon._errors import Checker
from jax_gluon._meshes import on_meshes
from jax_gluon._quantization.formats import (
    AttentionQuantization,
    Operand,
    QuantizedTensor,
    QuantSpec,
)
from jax_gluon._ragged_tokens import without_padding
from jax_gluon._sharding.partitioned import partitioned
from jax_gluon._sharding.split import Split
from jax_gluon._typing import Array, Bool, Float, Float32, Int32, Integer, Real, UInt8

# The cache itself knows where tokens stand, and which keys a query sees.
_OWN = (
    "is_causal", "key_value_seq_lengths", "local_window_size", "query_offset", "query_positions",
    "key_value_positions", "query_segment_ids", "key_value_segment_ids", "layout",
)  # fmt: skip
_KEYWORDS = tuple(name for name in KEYWORDS if name not in _OWN)


class KVCache:
    """Fields and methods of `QuantizedKVCache` and `PagedKVCache`."""

    key: QuantizedTensor
    value: QuantizedTensor
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

    def __repr__(self) -> str:
        return f"{type(self).__name__}(key={self.key}, value={self.value}, window={self.window})"

    @property
    def capacity(self) -> int:
        """Tokens that an entry of the batch has room for."""
        raise NotImplementedError

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
        starts: Integer[ArrayLike, " B"] | None = None,
    ) -> Self:
        """The cache with T more tokens, each behind those of its entry of the batch.

        Codes are those of all tokens quantized at once; those of an unfinished block change as it
        fills. Tokens for which there is no room are counted in `dropped` and nothing is overwritten
        for them, but by the ring of a window; a query for one sees all that is stored, or what its
        window leaves of it.

        Where a format is centered, the first 32 tokens of an entry are its center; until they are
        there, the codes of the fewer change with each append.

        **Arguments:**

        - `key`, `value`: `[B, T, K, H]` and `[B, T, K, V]`, float of any dtype, T at least 1.
        - `lengths`: integers `[B]`, clamped to `[0, T]`: tokens from there on are padding. Default
          T.
        - `starts`: integers `[B]`, clamped to `[0, T]`: tokens before are padding. Default 0.
          Padding is ignored and takes no place: token `starts[b]` is the next of entry b.

        **Raises:** `ValueError` or `TypeError` that names the argument, what was found and what is
        allowed; `ImportError` where the plugin is needed and can't be loaded.

        >>> import jax.numpy as jnp, jax_gluon
        >>> cache = jax_gluon.QuantizedKVCache.create(2, 16, 4, 64)
        >>> cache = cache.append(jnp.ones((2, 9, 4, 64)), jnp.ones((2, 9, 4, 64)), [9, 4])
        >>> cache.append(jnp.ones((2, 9, 4, 64)), jnp.ones((2, 9, 4, 64))).length.tolist()
        [16, 13]
        >>> cache.append(jnp.ones((2, 5, 4, 64)), jnp.ones((2, 5, 4, 64)), starts=[3, 0]).length
        Array([11,  9], dtype=int32)
        """
        check = self._check("append")
        B = self.length.shape[0]
        new_key = tokens_of(check, "key", key, self.key, B)
        new_value = tokens_of(check, "value", value, self.value, B)
        T = new_key.shape[1]
        if new_value.shape[1] != T:
            check.value_error("value", f"of {new_value.shape[1]} tokens", f"key's, {T}")
        if lengths is None:
            count = jnp.full_like(self.length, T)
        else:
            count = check.lengths("lengths", lengths, self.length.shape, T)
        if starts is not None:
            start = check.lengths("starts", starts, self.length.shape, T)
            new_key, new_value = (without_padding(x, start) for x in (new_key, new_value))
            count = jnp.maximum(count - start, 0)
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

        Row t belongs to the token T - t before the end, whatever padding its append had: the last
        T real ones of each entry, so rows of ragged queries stand at the right, as they do behind
        padding at the left. Rows before the first token give 0. Float queries are quantized as the
        cache was told to. With a window, a ring must still have what the first of the T sees: T may
        be up to `capacity - window - block + 2`, with the larger token block.

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
        check = self._check("attention")
        check.keywords(keywords, _KEYWORDS)
        q = query if isinstance(query, QuantizedTensor) else check.array("query", query)
        if q.ndim != 4:
            check.value_error("query", f"of rank {q.ndim}", "rank 4 (BTNH)")
        if self.query is not None:
            keywords.setdefault("quantization", AttentionQuantization(query=self.query))
        key, value = self._in_one_piece()
        arguments = check_arguments(
            check, q, key, value, None, None,
            scale=scale, logits_soft_cap=logits_soft_cap, implementation=implementation,
            is_causal=True, key_value_seq_lengths=self.length, **keywords,
        )  # fmt: skip
        return self._attend(arguments, q.shape[1])

    def reset(
        self, rows: Integer[ArrayLike, ""] | Integer[ArrayLike, " n"] | Bool[ArrayLike, " B"]
    ) -> Self:
        """The cache without the tokens of some entries, which others may take the place of.

        **Arguments:** `rows`: the number of an entry of the batch, numbers `[n]`, or bool `[B]`.

        **Raises:** `ValueError` or `TypeError` that names what was found and what is allowed;
        numbers that are traced and of no entry are ignored.

        >>> import jax.numpy as jnp, jax_gluon
        >>> cache = jax_gluon.QuantizedKVCache.create(2, 64, 1, 8)
        >>> cache = cache.append(jnp.ones((2, 5, 1, 8)), jnp.ones((2, 5, 1, 8)))
        >>> cache.reset(1).length.tolist()
        [5, 0]
        """
        is_reset = mask_of_rows(self._check("reset"), rows, self.length.shape[0])
        counts = {
            name: jnp.where(is_reset, 0, getattr(self, name))
            for name in ("length", "dropped", "longest")
        }
        return cast(Any, dataclasses.replace)(self, **counts)

    def rewind(self, tokens: Integer[ArrayLike, ""] | Integer[ArrayLike, " B"]) -> Self:
        """The cache without the last tokens of each entry, as speculative decoding takes them back.

        What is left is as if they had never come, bit for bit; where pages that others share have
        to be written and none is free, its last block alone is not.

        **Arguments:** `tokens`: an int, or integers `[B]`: at most `rewindable`, to which traced
        ones are clamped. An entry of fewer tokens is left with none. What was overwritten while an
        entry was longer is gone: rewinds in a row end where the first of them could have. The ring
        of a window then keeps all keys of as many queries less as tokens were taken back.

        **Raises:** `ValueError` or `TypeError` that names what was found and what is allowed.

        >>> import jax.numpy as jnp, jax_gluon
        >>> cache = jax_gluon.QuantizedKVCache.create(2, 64, 1, 8)
        >>> cache = cache.append(jnp.ones((2, 5, 1, 8)), jnp.ones((2, 5, 1, 8)))
        >>> cache.rewind([2, 0]).length.tolist()
        [3, 5]
        """
        check, B = self._check("rewind"), self.length.shape[0]
        count = rewound_of(check, tokens, B, self.rewindable)
        least = self._least_length()
        left = jnp.maximum(self.length - jnp.maximum(count - self.dropped, 0), 0)
        is_known = not any(isinstance(x, cast(Any, Tracer)) for x in (left, least))
        lost = np.flatnonzero(np.asarray(left < least)).tolist() if is_known else []
        for entry in lost[:1]:
            found = f"{count[entry]} of the {self.length[entry]} tokens of entry {entry}"
            allowed = f"at least {least[entry]} left: of fewer parts were overwritten"
            check.value_error("tokens", found, allowed)
        most = jnp.where(least > 0, self.length + self.dropped - least, self.rewindable)
        return on_meshes(_rewind, (), self, self, jnp.clip(count, 0, jnp.maximum(most, 0)))

    def _least_length(self) -> jax.Array:
        """The fewest tokens `[B]` that an entry can be rewound to: what others need is kept."""
        least = jnp.zeros_like(self.longest)
        for each in self._cached():
            if each.tail is not None:
                block = each.codes.spec.token_block
                kept_from = self.longest - each.tail.shape[1]
                least = jnp.maximum(least, -(-kept_from // block) * block)
        return least

    @property
    def rewindable(self) -> int:
        """Tokens that `rewind` can take back: a block of those that share scales, or all."""
        parts = (each.rewindable for each in self._cached())
        return min((self.capacity, *(x for x in parts if x is not None)))

    def select(self, rows: Integer[ArrayLike, " n"]) -> Self:
        """The cache of those entries of the batch, as beam search keeps some several times.

        **Arguments:** `rows`: numbers `[n]` of entries; n need not be B.

        **Raises:** `ValueError` or `TypeError` that names what was found and what is allowed;
        numbers that are traced are clamped.

        >>> import jax.numpy as jnp, jax_gluon
        >>> cache = jax_gluon.QuantizedKVCache.create(2, 64, 1, 8)
        >>> cache = cache.append(jnp.ones((2, 5, 1, 8)), jnp.ones((2, 5, 1, 8)), [5, 3])
        >>> cache.select([1, 1, 0]).length.tolist()
        [3, 3, 5]
        """
        numbers = rows_of(self._check("select"), rows, self.length.shape[0])
        return self._of_rows(numbers)

    def state_dict(self) -> dict[str, UInt8[Array, " bytes"] | Any]:
        """The cache as a tree of dicts of arrays, which is all that it takes to make it again.

        Nothing in it is but arrays, so that Orbax, `flax.serialization.msgpack_serialize` and
        others store it, and restore it without a target.

        >>> import jax_gluon
        >>> cache = jax_gluon.QuantizedKVCache.create(2, 64, 1, 8)
        >>> restored = jax_gluon.QuantizedKVCache.from_state_dict(cache.state_dict())
        >>> restored.capacity, restored.key.spec == cache.key.spec
        (64, True)
        """
        return state.to_state(self)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> Self:
        """The cache that `state_dict` was called of.

        **Raises:** `ValueError` or `TypeError` that names what was found and what is allowed.
        """
        return state.from_state(cls._check("from_state_dict"), cls, state_dict)

    @classmethod
    def _check(cls, method: str) -> Checker:
        return Checker(f"{cls.__name__}.{method}")

    def _cached(self) -> tuple[Cached, Cached]:
        return (
            Cached(self.key, self.key_head, self.key_tail),
            Cached(self.value, self.value_head, self.value_tail),
        )

    def _with(self, key: Cached, value: Cached, **others: Any) -> Self:
        return cast(Any, dataclasses.replace)(
            self, key=key.codes, key_head=key.head, key_tail=key.tail,
            value=value.codes, value_head=value.head, value_tail=value.tail, **others,
        )  # fmt: skip

    def _in_one_piece(self) -> tuple[QuantizedTensor, QuantizedTensor]:
        """Keys and values as attention takes them, or their shapes."""
        return self.key, self.value

    def _attend(self, arguments: CheckedArguments, T: int) -> jax.Array:
        raise NotImplementedError

    def _of_rows(self, rows: jax.Array) -> Self:
        raise NotImplementedError

    def _appended(self, key: jax.Array, value: jax.Array, count: jax.Array) -> Self:
        """With tokens of which the first `count` are real."""
        raise NotImplementedError

    def _rewound(self, tokens: jax.Array) -> Self:
        """Without so many of the last tokens."""
        raise NotImplementedError

    def _axes(self) -> tuple[Any, str, str]:
        """Letters of the axes of the cache, of new tokens and of a number for each entry."""
        raise NotImplementedError


def attend(
    arguments: CheckedArguments, query_offset: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of rows that stand from `query_offset` on."""
    operands = arguments.operands._replace(query_offset=query_offset, key_value_seq_lengths=lengths)
    return plain_attention.run(dataclasses.replace(arguments, operands=operands), True)


@_lowering.jit()
def _append(cache: Any, key: jax.Array, value: jax.Array, count: jax.Array) -> Any:
    axes, tokens, lengths = cache._axes()
    operands = jax.lax.stop_gradient((cache, key, value, count))
    return partitioned(_append_to_part, (), (axes, tokens, tokens, lengths), axes, *operands)


def _append_to_part(
    split: Split, cache: Any, key: jax.Array, value: jax.Array, count: jax.Array
) -> Any:
    del split  # all that is done is of a head
    return cache._appended(key, value, count)


@_lowering.jit()
def _rewind(cache: Any, tokens: jax.Array) -> Any:
    axes, _, lengths = cache._axes()
    operands = jax.lax.stop_gradient((cache, tokens))
    return partitioned(_rewind_part, (), (axes, lengths), axes, *operands)


def _rewind_part(split: Split, cache: Any, tokens: jax.Array) -> Any:
    del split
    return cache._rewound(tokens)
