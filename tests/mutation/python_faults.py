"""Faults of the XLA implementation, of formats, caches, dropout and ring attention."""

from tests.mutation.fault import (
    BITS,
    FACTOR,
    GROUP,
    HEAD,
    INDEX,
    OFF_BY_ONE,
    RESCALE,
    ROUNDING,
    SIGN,
    STALE,
    TAIL,
    TERM,
    Fault,
)

_XLA = ("tests/package/test_xla.py",)
_QUANTIZE = ("tests/package/test_quantization.py", "tests/package/test_quantized_tensor.py")
_DROPOUT = ("tests/package/test_dropout.py",)
_SINKS = ("tests/package/test_sinks.py",)
_SEGMENTS = ("tests/package/test_segments_and_positions.py",)
_CACHE = ("tests/package/test_kv_cache.py",)
_ENTRIES = ("tests/package/test_kv_cache_entries.py",)
_RING = ("tests/package/test_several_devices.py",)

ATTENTION, TILES = "jax_gluon/_xla/attention.py", "jax_gluon/_xla/tiles.py"
QUANTIZE, CODES = "jax_gluon/_xla/quantize.py", "jax_gluon/_quantization/codes.py"
DROPOUT, STORAGE = "jax_gluon/_dropout.py", "jax_gluon/_caches/storage.py"
MERGING, RING = "jax_gluon/_context_parallel/merging.py", "jax_gluon/_context_parallel/ring.py"
LAYOUTS = "jax_gluon/_context_parallel/token_layouts.py"

FAULTS = (
    Fault(
        RESCALE, ATTENTION,
        "total = total * decay + jnp.sum(p, axis=-1, keepdims=True)",
        "total = total + jnp.sum(p, axis=-1, keepdims=True)", _XLA,
    ),
    Fault(
        RESCALE, ATTENTION,
        "return weighted * decay + products, raised, total",
        "return weighted + products, raised, total", _XLA,
    ),
    Fault(
        STALE, ATTENTION,
        "return weighted * decay + products, raised, total",
        "return weighted * decay + products, maximum, total", _XLA,
    ),
    Fault(
        SIGN, ATTENTION,
        "d_scores = tile.p * (tile.d_p - arrange(rows.delta, order))",
        "d_scores = tile.p * (tile.d_p + arrange(rows.delta, order))", _XLA,
    ),
    Fault(
        SIGN, ATTENTION,
        "delta -= tiles.rows(cotangent.d_log_sum_exp[..., None], i)",
        "delta += tiles.rows(cotangent.d_log_sum_exp[..., None], i)", _XLA,
    ),
    Fault(
        TERM, ATTENTION,
        "        d_scores *= tile.slope\n",
        "        d_scores *= jnp.ones_like(tile.slope)\n", _XLA,
    ),
    Fault(
        FACTOR, ATTENTION,
        "swap_tokens_and_heads((problem.scale * d_key).astype(out.dtype))",
        "swap_tokens_and_heads(d_key.astype(out.dtype))", _XLA,
    ),
    Fault(
        FACTOR, ATTENTION,
        "d_p = jnp.where(kept, d_p, 0.0) / (1.0 - tiles.problem.dropout_rate)",
        "d_p = jnp.where(kept, d_p, 0.0)", _DROPOUT,
    ),
    Fault(
        SIGN, ATTENTION,
        "divisor = total + jnp.exp(sinks - maximum)",
        "divisor = total + jnp.exp(maximum - sinks)", _SINKS,
    ),
    Fault(
        TERM, ATTENTION,
        "first = keys_first(jnp.exp((tiles.sinks - rows.maximum) - rows.log_sum))",
        "first = keys_first(jnp.zeros_like(rows.log_sum))", _SINKS,
    ),
    Fault(
        TERM, ATTENTION,
        "p = hide(jnp.exp(logits - raised), visible)",
        "p = jnp.exp(logits - raised)", _XLA,
    ),
    Fault(
        OFF_BY_ONE, TILES,
        "conditions.append(key_position <= position)",
        "conditions.append(key_position < position)", _XLA,
    ),
    Fault(
        OFF_BY_ONE, TILES,
        "conditions.append(lowered(position, left) <= key_position)",
        "conditions.append(lowered(position, left) < key_position)", _XLA,
    ),
    Fault(
        OFF_BY_ONE, TILES,
        "conditions.append(lowered(key_position, right) <= position)",
        "conditions.append(lowered(key_position, right) < position)", _XLA,
    ),
    Fault(
        OFF_BY_ONE, TILES,
        "conditions.append(key < self.key_value_seq_lengths",
        "conditions.append(key <= self.key_value_seq_lengths", _XLA,
    ),
    Fault(
        INDEX, TILES,
        "conditions.append(of_row == of_key)",
        "conditions.append(of_row <= of_key)", _SEGMENTS,
    ),
    Fault(
        TAIL, TILES,
        "end = (jnp.maximum(end, 0) + keys - 1) // keys",
        "end = jnp.maximum(end, 0) // keys", _XLA,
    ),
    Fault(
        TAIL, TILES,
        "begin = jnp.maximum(first_position - left, 0) // keys",
        "begin = jnp.maximum(first_position - left, 0) // keys + 1", _XLA,
    ),
    Fault(
        TAIL, TILES,
        "conditions.append((first <= largest) & (least <= last))",
        "conditions.append((first < largest) & (least < last))", _SEGMENTS,
    ),
    Fault(SIGN, TILES, "logits += arrange(bias, order)", "logits -= arrange(bias, order)", _XLA),
    Fault(
        FACTOR, TILES,
        "logits, slope = cap * tanh, 1.0 - tanh * tanh",
        "logits, slope = cap * tanh, 1.0 - tanh", _XLA,
    ),
    Fault(
        HEAD, TILES,
        "return x.reshape(b, *((1, 1) if n == 1 else self.groups), t, s)",
        "return x[:, ::-1].reshape(b, *((1, 1) if n == 1 else self.groups), t, s)", _XLA,
    ),
    Fault(
        SIGN, QUANTIZE,
        "scale = jnp.maximum(-least, most) / highest",
        "scale = jnp.maximum(least, most) / highest", _QUANTIZE,
    ),
    Fault(
        INDEX, QUANTIZE,
        "at = jnp.maximum(number - 1, 0) // 2",
        "at = number // 2", _QUANTIZE,
    ),
    Fault(
        SIGN, QUANTIZE,
        "codes = jnp.round(x / divisor) + zero",
        "codes = jnp.round(x / divisor) - zero", _QUANTIZE,
    ),
    Fault(
        ROUNDING, QUANTIZE,
        "rounded = jnp.where(narrow < x, above, narrow)",
        "rounded = narrow", _QUANTIZE,
    ),
    Fault(
        FACTOR, QUANTIZE,
        "reached = norms >= ordinary * jnp.asarray(16.0**power, norms.dtype)",
        "reached = norms >= ordinary * jnp.asarray(4.0**power, norms.dtype)", _QUANTIZE,
    ),
    Fault(
        TERM, QUANTIZE,
        "x = jnp.where(hidden, jnp.full_like(x, neutral), x)",
        "x = jnp.where(hidden, x, x)", _QUANTIZE,
    ),
    Fault(
        GROUP, CODES,
        "cells = jnp.repeat(cells, spec.head_block, axis=-1)[..., :H]",
        "cells = jnp.tile(cells, spec.head_block)[..., :H]", _QUANTIZE,
    ),
    Fault(
        GROUP, CODES,
        "cells = jnp.repeat(cells, spec.token_block, axis=-3)[..., :T, :, :]",
        "cells = jnp.concatenate([cells] * spec.token_block, axis=-3)[..., :T, :, :]", _QUANTIZE,
    ),
    Fault(
        INDEX, CODES,
        "low, high = biased[..., 0::2], biased[..., 1::2]",
        "low, high = biased[..., 1::2], biased[..., 0::2]", _QUANTIZE,
    ),
    Fault(
        INDEX, CODES,
        "powers = bits[..., None] >> _places(bits.ndim + 1) & 7",
        "powers = bits[..., None] >> _places(bits.ndim + 1) & 3", (*_QUANTIZE, *_CACHE),
    ),
    Fault(
        SIGN, CODES,
        "return rotation_signs(head_dim)[:, None] * blocks",
        "return rotation_signs(head_dim)[None, :] * blocks", _QUANTIZE,
    ),
    Fault(BITS, DROPOUT, "_ROUNDS = 7", "_ROUNDS = 6", _DROPOUT),
    Fault(
        BITS, DROPOUT,
        "head = seeds[:, 3] + jnp.arange(heads, dtype=jnp.uint32)[:, None, None] * seeds[:, 4]",
        "head = seeds[:, 3] + jnp.zeros(heads, jnp.uint32)[:, None, None] * seeds[:, 4]", _DROPOUT,
    ),
    Fault(
        BITS, DROPOUT,
        "return bits >= np.uint32(threshold_of(rate))",
        "return bits > np.uint32(threshold_of(rate))", _DROPOUT,
    ),
    Fault(
        BITS, DROPOUT,
        "first_key = first_key + seeds[0, 6]",
        "first_key = first_key + 0 * seeds[0, 6]", (*_DROPOUT, *_RING),
    ),
    Fault(
        HEAD, DROPOUT,
        "return seeds.at[:, 3].add(first * seeds[:, 4])",
        "return seeds.at[:, 3].add(0 * first * seeds[:, 4])", (*_DROPOUT, *_RING),
    ),
    Fault(
        GROUP, STORAGE,
        "    first = length // block\n    end",
        "    first = (length + block - 1) // block\n    end", _CACHE,
    ),
    Fault(
        TERM, STORAGE,
        "visible = jnp.broadcast_to(token < (length + count)[:, None], (B, tokens))",
        "visible = jnp.broadcast_to(token < length[:, None], (B, tokens))", _CACHE,
    ),
    Fault(
        TERM, STORAGE,
        "early = jnp.where((length < CENTER_TOKENS)[:, None], early, -1)",
        "early = jnp.full_like(early, -1)", _CACHE,
    ),
    Fault(
        TAIL, STORAGE,
        "    start = length // block * block\n    new = None",
        "    start = length // block * block - block\n    new = None", _ENTRIES,
    ),
    Fault(
        FACTOR, MERGING,
        "exponent = ((x.maximum - maximum) + x.log_sum) * unit",
        "exponent = (x.maximum - maximum) + x.log_sum", _RING,
    ),
    Fault(
        INDEX, MERGING,
        "out = _times(a.out, of_a / safe) + _times(b.out, of_b / safe)",
        "out = _times(a.out, of_b / safe) + _times(b.out, of_a / safe)", _RING,
    ),
    Fault(
        STALE, MERGING,
        "maximum = jnp.where(a_is_empty, b.maximum, jnp.where(b_is_empty, a.maximum, larger))",
        "maximum = jnp.where(a_is_empty, a.maximum, jnp.where(b_is_empty, a.maximum, larger))",
        _RING,
    ),
    Fault(
        INDEX, LAYOUTS,
        "index < chunk, index + shard * chunk, index + (2 * shards - 2 - shard) * chunk",
        "index < chunk, index + shard * chunk, index + (2 * shards - 3 - shard) * chunk", _RING,
    ),
    Fault(
        INDEX, RING,
        "origin = (rank - (first + direction * index)) % context.shards",
        "origin = (rank + (first + direction * index)) % context.shards", _RING,
    ),
    Fault(
        TERM, RING,
        "d_key, d_value, both = d_key + home[0], d_value + home[1], None",
        "d_key, d_value, both = d_key + home[0], d_value, None", _RING,
    ),
    Fault(
        INDEX, RING,
        "home = _shifted(both, context, -turn.distance)",
        "home = _shifted(both, context, turn.distance)", _RING,
    ),
)  # fmt: skip
