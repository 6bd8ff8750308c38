"""What Flax's modules have no way to hand to an `attention_fn`: arguments of one call, and a cache.

Flax passes `mask` on as it is, so our modules send these in its place.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_gluon._caches.dense import QuantizedKVCache
from jax_gluon._errors import Checker
from jax_gluon._frameworks import OF_A_CALL
from jax_gluon._quantization.formats import (
    PRESETS,
    AttentionQuantization,
    Preset,
    preset,
)


@dataclasses.dataclass
class CallArguments:
    """In the place of a mask.

    With a `cache`, keys and values are appended to it, as many as `lengths` says, and the queries
    see all of it up to themselves; it is then the cache after that.
    """

    mask: Any
    keywords: dict[str, Any]
    cache: QuantizedKVCache | None = None
    lengths: Any = None

    def decode(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        """The attention of the tokens that are new, of any number of batch axes."""
        *batch, T, N, _ = query.shape
        if key.shape[-3] != T:
            found, allowed = f"{key.shape[-3]} tokens beside {T} queries", "as many, while decoding"
            Checker("MultiHeadAttention").value_error("inputs_k", found, allowed)
        q, k, v = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
        cache: Any = self.cache
        lengths = None if self.lengths is None else jnp.reshape(self.lengths, -1)
        cache = self.cache = cache.append(k, v, lengths)
        out = cache.attention(q, **options)
        return out.reshape(*batch, T, N, -1)


def call_arguments(
    check: Checker, mask: Any, keywords: dict[str, Any], sinks: Any, decodes: bool
) -> Any:
    """What goes in the place of a mask, of a call without our cache; the mask itself may do.

    Taken out of the keywords. Where it decodes, Flax combines the mask with that of its own cache.
    """
    own = {name: keywords.pop(name, None) for name in OF_A_CALL} | {"sinks": sinks}
    own = {name: x for name, x in own.items() if x is not None}
    if decodes and own:
        found = "set while decoding into Flax's cache of floats"
        check.value_error(", ".join(own), found, "None, or cache_quantization")
    return CallArguments(mask, own) if own else mask


def check_no_lengths(check: Checker, lengths: Any) -> None:
    """Raises for lengths of tokens that go into no cache of ours."""
    if lengths is not None:
        check.value_error("lengths", "given", "None, but where it decodes into a QuantizedKVCache")


def decoding_arguments(
    check: Checker,
    mask: Any,
    keywords: dict[str, Any],
    lengths: Any,
    sinks: Any,
    cache: QuantizedKVCache,
) -> CallArguments:
    """Those of a step of decoding: the cache itself knows who sees whom."""
    for name, x in {"mask": mask, **{name: keywords.pop(name, None) for name in OF_A_CALL}}.items():
        if x is not None:
            allowed = (
                "None: a QuantizedKVCache is causal by itself, and lengths says which are real"
            )
            check.value_error(name, "given while decoding", allowed)
    return CallArguments(None, {} if sinks is None else {"sinks": sinks}, cache, lengths)


def check_format(check: Checker, quantization: Any) -> None:
    """Raises for what is no format of a cache."""
    if not isinstance(quantization, AttentionQuantization):
        others = ("an AttentionQuantization with key and value",)
        check.name("cache_quantization", quantization, tuple(PRESETS), *others)


def cache_of(
    shape: tuple[int, ...],
    heads: tuple[int, int],
    quantization: Preset | AttentionQuantization,
    window: int | tuple[int, int] | None,
    dtype: DTypeLike,
) -> QuantizedKVCache:
    """An empty cache for inputs of shape `[..., max_length, features]`: K and H are `heads`."""
    *batch, tokens, _ = shape
    specs = preset(quantization) or AttentionQuantization()
    blocks = [spec.token_block for spec in (specs.key, specs.value) if spec is not None] or [1]
    sees = None
    if window is not None:
        sees = (window if isinstance(window, int) else window[0]) + 1
        tokens = max(tokens, sees + max(blocks))
    whole = math.lcm(*blocks)
    return QuantizedKVCache.create(
        math.prod(batch), -(-tokens // whole) * whole, *heads,
        quantization=quantization, window=sees, dtype=dtype,
    )  # fmt: skip
