"""Flax linen's multi-head attention with all that this package's attention has.

`flax.linen.MultiHeadDotProductAttention` takes `jax_gluon.flax.attention_fn` as it is; the module
here is for what a function of dense keys and values cannot do: decode into a `QuantizedKVCache`,
arguments of one call such as segments, sinks that are a parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

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

_linen = framework("flax.linen", "flax")

_CHECK = Checker("linen.MultiHeadDotProductAttention")


class MultiHeadDotProductAttention(_linen.MultiHeadDotProductAttention):
    """`flax.linen.MultiHeadDotProductAttention` with this package's attention, a quantized cache.

    **Arguments:** those of `flax.linen.MultiHeadDotProductAttention`, whose parameters it has, so
    that its checkpoints fit. Windows, soft caps, quantization and the rest are options of
    `attention_fn=jax_gluon.flax.attention_fn(...)`, which has none by default. And:

    - `cache_quantization`: `"int8"`, `"int4"` or an `AttentionQuantization`: with `decode`, keys
      and values are kept in a `QuantizedKVCache` of this format, `quantized_cache` of the
      collection `"cache"`. `init`, given inputs `[..., max_length, features]`, makes it empty.
      Default None: Flax's own cache of floats.
    - `sinks`: whether there is a trainable sink for each head, the parameter `sinks`, 0 at first.

    It is called as Flax's. A call may also have `bias`, `key_value_mask`, lengths, segments,
    positions and `query_offset`, as `jax_gluon.dot_product_attention`. A call that decodes into a
    quantized cache takes any number of tokens (a prompt, then one at a time) and, as `lengths`
    `[...]`, how many of them are real; no mask. A window of the `attention_fn` makes the cache a
    ring, into which a prompt goes that leaves room for the window.

    **Raises:** `ValueError` or `TypeError` that names the argument, what was found and what is
    allowed.

    >>> import jax, jax.numpy as jnp, jax_gluon.linen
    >>> module = jax_gluon.linen.MultiHeadDotProductAttention(
    ...     4, decode=True, cache_quantization="int8"
    ... )
    >>> variables = module.init(jax.random.key(0), jnp.ones((2, 128, 64)))
    >>> out, state = module.apply(variables, jnp.ones((2, 40, 64)), mutable="cache")
    >>> cache = state["cache"]
    >>> out.shape, cache["quantized_cache"].length.tolist()
    ((2, 40, 64), [40, 40])
    """

    attention_fn: Callable[..., Any] = attention_fn()
    cache_quantization: Preset | AttentionQuantization | None = None
    sinks: bool = False

    @_linen.compact
    def __call__(
        self,
        inputs_q: Float[Array, "*B T features"],
        inputs_k: Float[Array, "*B S features"] | None = None,
        inputs_v: Float[Array, "*B S features"] | None = None,
        *,
        mask: Shaped[Array, "*#BNTS"] | BlockMask | None = None,
        lengths: Integer[Array, "*B"] | None = None,
        **keywords: Any,
    ) -> Float[Array, "*B T features"]:
        """Attention, or a step of decoding; the class says the rest."""
        is_attention_fn(_CHECK, self.attention_fn)
        check_format(_CHECK, self.cache_quantization)
        module: Any = self
        sinks = None
        if self.sinks:
            sinks = module.param("sinks", _linen.initializers.zeros, (module.num_heads,))
        of_flax: Any = _linen.MultiHeadDotProductAttention.__call__
        if not module.decode or self.cache_quantization is None:
            check_no_lengths(_CHECK, lengths)
            of_call = call_arguments(_CHECK, mask, keywords, sinks, module.decode)
            return of_flax(self, inputs_q, inputs_k, inputs_v, mask=of_call, **keywords)

        is_initialized = module.has_variable("cache", "quantized_cache")
        of_both = keywords.get("inputs_kv")
        keys = of_both if of_both is not None else inputs_q if inputs_k is None else inputs_k
        heads = module.num_heads, (module.qkv_features or inputs_q.shape[-1]) // module.num_heads
        window = getattr(self.attention_fn, "local_window_size", None)
        variable = module.variable(
            "cache", "quantized_cache", cache_of,
            keys.shape, heads, self.cache_quantization, window, module.dtype or jnp.float32,
        )  # fmt: skip
        # Flax's own call asks the field whether to keep a cache of its own.
        without = copy.copy(self)
        object.__setattr__(without, "decode", False)
        if not is_initialized:
            of_call = call_arguments(_CHECK, mask, keywords, sinks, False)
            return of_flax(without, inputs_q, inputs_k, inputs_v, mask=of_call, **keywords)
        call = decoding_arguments(_CHECK, mask, keywords, lengths, sinks, variable.value)
        out = of_flax(without, inputs_q, inputs_k, inputs_v, mask=call, **keywords)
        variable.value = call.cache
        return out


class MultiHeadAttention(MultiHeadDotProductAttention):
    """`MultiHeadDotProductAttention` by Flax's other name, which names its parameters too."""
