"""Problems at sizes that reach every tail of the kernels, their operands and their bars."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401 -- NumPy knows bfloat16 by it
import numpy as np

from tests.support.arrays import placed

_RNG = np.random.default_rng(5)


def _mask(B, N, T, S):
    mask = _RNG.random((B, N, T, S)) < 0.6
    mask[0, 0, T // 2] = False
    mask[:, :, : T // 3, 64:200] = False  # whole subtiles and whole groups of rows
    return mask


def _mask_in_blocks(B, N, T, S):
    """Blocks that show all, none or some of their keys; of no size that a kernel has."""
    kinds = _RNG.integers(0, 3, (B, N, -(-T // 45), -(-S // 75)))
    kinds = kinds.repeat(45, -2)[:, :, :T].repeat(75, -1)[..., :S]
    return (kinds == 1) | ((kinds == 2) & (_RNG.random((B, N, T, S)) < 0.7))


def _bias(*shape):
    return _RNG.standard_normal(shape, np.float32)


# Every rule, for every pipeline. Sizes around the tiles (4, 6 or 12 rows; 8, 16 or 32 keys), the
# subtiles (64 and 96 keys), the blocks (96 rows, 192 and 256 keys) and the tasks.
RULES: dict[str, dict[str, Any]] = {
    "blocks": dict(T=200, S=530, N=2, K=1, H=64, V=64),
    "odd": dict(T=71, S=267, H=22, V=26),
    "one_key": dict(T=70, S=1),
    "causal": dict(T=270, S=270, N=2, is_causal=True),
    "causal_T_over_S": dict(T=400, S=270, N=2, is_causal=True),
    "causal_S_over_T": dict(T=150, S=300, N=2, is_causal=True),
    "window": dict(T=200, S=330, N=2, local_window_size=(20, 5)),
    "window_left_of_causal": dict(T=400, S=400, N=2, is_causal=True, local_window_size=(33, 0)),
    "window_past_the_keys": dict(T=500, S=260, N=2, local_window_size=(3, 3)),
    "lengths": dict(
        T=110, S=600, N=2,
        query_seq_lengths=np.array([0, 105], np.int32),
        key_value_seq_lengths=np.array([599, 65], np.int32),
    ),
    "bias": dict(T=100, S=300, bias=_bias(2, 4, 100, 300)),
    "bias_keys": dict(T=100, S=270, bias=_bias(1, 4, 1, 270)),
    "bias_rows": dict(T=100, S=270, bias=_bias(2, 1, 100, 1)),
    "mask": dict(T=100, S=300, mask=_mask(2, 4, 100, 300)),
    "mask_in_blocks": dict(
        B=1, T=171, S=1170, N=2, K=1, H=16, V=16, mask=_mask_in_blocks(1, 1, 171, 1170)
    ),
    "mask_in_blocks_of_heads": dict(
        T=130, S=290, is_causal=True, query_offset=170, mask=_mask_in_blocks(1, 4, 130, 290),
        query_segment_ids=np.arange(130) // 75, key_value_segment_ids=np.arange(290) // 160,
        key_value_seq_lengths=np.array([290, 221], np.int32),
    ),
    # Ranges alone, which fall back to the first key of each sequence; and ranks within ranges.
    "packed": dict(
        T=310, S=310, N=2, is_causal=True, query_segment_ids=np.arange(310) // 130,
        key_value_segment_ids=np.arange(310) // 130,
    ),
    "scattered": dict(
        T=130, S=310, N=2, local_window_size=(90, 30),
        query_segment_ids=_RNG.integers(0, 3, (2, 130)),
        key_value_segment_ids=_RNG.integers(0, 3, (2, 310)),
        query_positions=_RNG.permutation(130), key_value_positions=_RNG.permutation(310),
    ),
    # Padding at the left alone, and within: ranges, and ranks.
    "padded": dict(
        T=150, S=310, N=2, query_offset=160, is_causal=True,
        key_value_mask=np.arange(310) >= np.array([[200], [3]]),
    ),
    "holes": dict(T=110, S=310, N=2, key_value_mask=_RNG.integers(0, 3, (2, 310))),
    "soft_cap": dict(T=100, S=290, N=2, scale=1.0, logits_soft_cap=2.0),
    "sinks": dict(T=110, S=290, sinks=np.array([1.5, -9.0, 6.0, -np.inf], np.float32)),
    "everything": dict(
        T=150, S=370, is_causal=True, local_window_size=(120, 9), logits_soft_cap=4.0, scale=-0.4,
        bias=_bias(2, 1, 150, 370), mask=_mask(2, 4, 150, 370),
        key_value_seq_lengths=np.array([360, 100], np.int32),
    ),
}  # fmt: skip
# What the pipelines walk through in ways of their own.
WALKS: dict[str, dict[str, Any]] = {
    "many_blocks": dict(B=1, T=300, S=1500, N=1, K=1, H=16, V=16),
    "many_rows": dict(B=1, T=4300, S=70, N=1, K=1, H=8, V=8),
    "many_heads": dict(B=1, T=100, S=300, N=12, K=1, H=16, V=16),
    "one_column": dict(T=100, S=257, N=2, H=2, V=1),
    "wide": dict(B=1, T=20, S=140, N=2, K=1, H=258, V=130),
    "one_key_more": dict(T=97, S=257, N=2),
    "no_keys": dict(T=70, S=100, key_value_seq_lengths=np.array([0, 100], np.int32)),
    "bias_large": dict(T=133, S=300, bias=1e4 * _bias(1, 1, 133, 300)),
    "negative_scale": dict(T=70, S=290, scale=-0.7),
}
# Head dims, few rows, and small heads: one pipeline, or kernels of their own.
SHAPES: dict[str, dict[str, Any]] = {
    "mask_blocks": dict(
        T=120, S=600, N=2, mask=np.broadcast_to(np.arange(600) // 256 == 1, (2, 1, 1, 600)).copy()
    ),
    "head_dim_1": dict(T=20, S=70, H=1, V=1),
    "head_dim_257": dict(B=1, T=20, S=260, H=257, V=3),
    "one_row": dict(T=1, S=700, N=2),
    "five_rows": dict(T=5, S=700, N=2),
    "multi_query": dict(T=100, S=100, K=1),
    # Heads of few keys, all at once: one of either, odd sizes of both, a key past whole vectors and
    # several blocks of rows, each rule, and what a row's range of keys does not say.
    "one": dict(T=1, S=1, N=4, K=4),
    "small": dict(T=77, S=54, N=3, K=1, H=20, V=100),
    "small_rows": dict(T=150, S=129, N=2, K=2, H=1, V=9, is_causal=True),
    "small_everything": dict(
        T=101, S=110, is_causal=True, local_window_size=(60, 9), logits_soft_cap=4.0, scale=-0.4,
        bias=_bias(2, 1, 101, 110), mask=_mask(2, 4, 101, 110),
        key_value_seq_lengths=np.array([97, 5], np.int32),
        query_seq_lengths=np.array([100, 101], np.int32),
    ),
    "small_scattered": dict(
        T=49, S=49, N=2, bias=_bias(1, 2, 49, 49), sinks=np.array([1.5, -9.0], np.float32),
        query_segment_ids=_RNG.integers(0, 3, (2, 49)), query_positions=_RNG.permutation(49),
        key_value_segment_ids=_RNG.integers(0, 3, (2, 49)), local_window_size=(30, 20),
        key_value_positions=_RNG.permutation(49),
    ),
    # Few rows of many heads, stacked.
    "stacked": dict(T=3, S=250, N=39, K=3, is_causal=False),
    "stacked_everything": dict(
        T=5, S=230, N=44, K=2, local_window_size=(2, 210), logits_soft_cap=4.0,
        bias=_bias(2, 44, 5, 230), mask=_mask(2, 44, 5, 230),
        query_seq_lengths=np.array([4, 5], np.int32),
    ),
    "many_chunks": dict(B=1, T=60, S=2500, N=1, K=1, H=16, V=16),
}  # fmt: skip
CASES = RULES | WALKS | SHAPES

# Relative L2, forward and gradients: the design's bars for float32 operands and for 8-bit
# probabilities, and for 16-bit operands twice and three times what plain jnp of their type makes,
# which tests/cpu/test_kernels.py measures.
BARS = {
    "float32": (2e-6, 3e-6),
    "bfloat16": (7e-3, 1e-2),
    "float16": (8e-4, 1.2e-3),
    "int8": (8e-3, 1e-2),
}


class Operands(NamedTuple):
    """What a case is computed from: arrays, keyword arguments and cotangents."""

    arrays: tuple[Any, ...]  # query, key, value and, where there is one, bias
    keywords: dict[str, Any]
    d_out: Any
    d_log_sum_exp: Any


def operands(case, dtype="float32", seed=3) -> Operands:
    """Random operands of a case: the sizes that it does not give are small."""
    rng = np.random.default_rng(seed)
    size = {"B": 2, "N": 4, "K": 2, "H": 24, "V": 24} | case
    B, T, S, N, K, H, V = (size[letter] for letter in "BTSNKHV")

    def draw(*shape):
        # In NumPy, for which nothing is compiled.
        return rng.standard_normal(shape, np.float32).astype(dtype)

    # Keys off center, so that removing their center matters.
    arrays = [draw(B, T, N, H), draw(B, S, K, H) + np.asarray(0.5, dtype), draw(B, S, K, V)]
    if "bias" in case:
        arrays.append(case["bias"])
    keywords = {name: x for name, x in case.items() if len(name) > 1 and name != "bias"}
    d_log_sum_exp = rng.standard_normal((B, T, N)).astype(np.float32)
    d_out = draw(B, T, N, V)
    arrays, d_out, d_log_sum_exp = jax.tree.map(placed, (tuple(arrays), d_out, d_log_sum_exp))
    return Operands(arrays, keywords, d_out, d_log_sum_exp)
