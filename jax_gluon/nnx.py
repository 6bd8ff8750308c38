"""Flax nnx's multi-head attention with all that this package's attention has.

`flax.nnx.MultiHeadAttention` takes `jax_gluon.flax.attention_fn` as it is; the module here is for
what a function of dense keys and values cannot do: decode into a `QuantizedKVCache`, arguments of
one call such as segments, sinks that are a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_gluon._block_mask import BlockMask
from jax_gluon._errors import Checker
from jax_gluon._flax_calls import (
    cache_of,
    call_arguments,
    check_format,
    check_no_lengths,
    decoding_arguments,
)
from jax_gluon._frameworks import framework
from jax_gluon._quantization.formats import AttentionQuantization, Preset
from jax_gluon._typing import Array, Float, Integer, Shaped
from jax_gluon.flax import attention_fn, is_attention_fn

_nnx = framework("flax.nnx", "flax")

_CHECK = Checker("nnx.MultiHeadAttention")
# Of later Flax: an attribute that may hold arrays.
_data: Callable[[Any], Any] = getattr(_nnx, "data", lambda x: x)


class MultiHeadAttention(_nnx.MultiHeadAttention):
    """`flax.nnx.MultiHeadAttention` with this package's attention and a quantized cache.

    **Arguments:** those of `flax.nnx.MultiHeadAttention`, whose parameters it has, so that its
    checkpoints fit. Windows, soft caps, quantization and the rest are options of
    `attention_fn=jax_gluon.flax.attention_fn(...)`, which has none by default. And, by keyword:

    - `cache_quantization`: `"int8"`, `"int4"` or an `AttentionQuantization`: with `decode`, keys
      and values are kept in a `QuantizedKVCache` of this format, which `init_cache` makes. Default
      None: Flax's own cache of floats.
    - `sinks`: whether there is a trainable sink for each head, `sinks`, 0 at first.

    It is called as Flax's. A call may also have `bias`, `key_value_mask`, lengths, segments,
    positions and `query_offset`, as `jax_gluon.dot_product_attention`. A call that decodes into a
    quantized cache takes any number of tokens (a prompt, then one at a time) and, as `lengths`
    `[...]`, how many of them are real; no mask. A window of the `attention_fn` makes the cache a
    ring, into which a prompt goes that leaves room for the window.

    **Raises:** `ValueError` or `TypeError` that names the argument, what was found and what is
    allowed.

    >>> import jax.numpy as jnp, jax_gluon.nnx
    >>> from flax import nnx
    >>> module = jax_gluon.nnx.MultiHeadAttention(
    ...     4, 64, decode=True, cache_quantization="int8", rngs=nnx.Rngs(0)
    ... )
    >>> module.init_cache((2, 128, 64))
    >>> module(jnp.ones((2, 40, 64))).shape, module(jnp.ones((2, 1, 64))).shape
    ((2, 40, 64), (2, 1, 64))
    """

    def __init__(
        self,
        *arguments: Any,
        attention_fn: Any = attention_fn(),  # noqa: B008, a value
        cache_quantization: Preset | AttentionQuantization | None = None,
        sinks: bool = False,
        **keywords: Any,
    ) -> None:
        is_attention_fn(_CHECK, attention_fn)
        check_format(_CHECK, cache_quantization)
        super().__init__(*arguments, attention_fn=attention_fn, **keywords)
        self.cache_quantization: Any = cache_quantization
        self.sinks = _nnx.Param(jnp.zeros((self.num_heads,))) if sinks else _data(None)
        self.quantized_cache = _data(None)

    def __call__(
        self,
        inputs_q: Float[Array, "*B T features"],
        inputs_k: Float[Array, "*B S features"] | None = None,
        inputs_v: Float[Array, "*B S features"] | None = None,
        *,
        mask: Shaped[Array, "*#BNTS"] | BlockMask | None = None,
        lengths: Integer[Array, "*B"] | None = None,
        decode: bool | None = None,
        **keywords: Any,
    ) -> Float[Array, "*B T features"]:
        """Attention, or a step of decoding; the class says the rest."""
        of_flax: Any = super()
        attend = of_flax.__call__
        decode = self.decode if decode is None else decode
        sinks = None if self.sinks is None else _value(self.sinks)
        if not decode or self.cache_quantization is None:
            check_no_lengths(_CHECK, lengths)
            of_call = call_arguments(_CHECK, mask, keywords, sinks, bool(decode))
            return attend(inputs_q, inputs_k, inputs_v, mask=of_call, decode=decode, **keywords)
        if self.quantized_cache is None:
            _CHECK.value_error("decode", "True without a cache", "a call of init_cache before")
        cache = _value(self.quantized_cache)
        call = decoding_arguments(_CHECK, mask, keywords, lengths, sinks, cache)
        out = attend(inputs_q, inputs_k, inputs_v, mask=call, decode=False, **keywords)
        if hasattr(self.quantized_cache, "set_value"):
            self.quantized_cache.set_value(call.cache)
        else:
            self.quantized_cache.value = call.cache
        return out

    def init_cache(self, input_shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> None:
        """An empty cache for up to `input_shape[-2]` tokens, by `[..., max_length, features]`.

        One of `cache_quantization` has room for whole blocks of tokens, and for a window.
        """
        if self.cache_quantization is None:
            super().init_cache(input_shape, dtype)
            return
        heads = getattr(self, "num_kv_heads", self.num_heads), self.head_dim
        window = self.attention_fn.local_window_size
        cache = cache_of(input_shape, heads, self.cache_quantization, window, dtype)
        self.quantized_cache = _nnx.Cache(cache)


def _value(variable: Any) -> Any:
    return variable.get_value() if hasattr(variable, "get_value") else variable.value
