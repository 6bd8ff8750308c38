"""Bad arguments of `QuantizedKVCache`: an error names each, what was found and what is allowed."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import AttentionQuantization, QuantizedKVCache, QuantSpec

B, N, K, H, V, CAPACITY, WINDOW = 2, 4, 2, 16, 12, 64, 20


def create(quantization="int8", **keywords):
    return QuantizedKVCache.create(
        B, CAPACITY, K, H, value_dim=V, quantization=quantization, **keywords
    )


BAD = {
    "capacity": (dict(capacity=0), ValueError, "capacity is 0; allowed: an int of at least 1"),
    "capacity_type": (dict(capacity=6.5), TypeError, "capacity is 6.5; allowed: an int of at le"),
    "batch": (dict(batch=-1), ValueError, "batch is -1; allowed: an int of at least 1"),
    "kv_heads": (dict(kv_heads=0), ValueError, "kv_heads is 0; allowed: an int of at least 1"),
    "head_dim": (dict(head_dim=True), TypeError, "head_dim is True; allowed: an int of at least"),
    "value_dim": (dict(value_dim=0), ValueError, "value_dim is 0; allowed: an int of at least 1"),
    "window": (dict(window=0), ValueError, "window is 0; allowed: an int of at least 1"),
    "window_type": (dict(window=(8, 0)), TypeError, "window is (8, 0); allowed: an int of at l"),
    "ring": (dict(window=32), ValueError, "capacity is 32; allowed: at least 33, the window and"),
    "ring_of_blocks": (
        dict(window=1, quantization="int4"), ValueError, "capacity is 32; allowed: at least 33,",
    ),
    "blocks": (
        dict(capacity=33, quantization="int4"), ValueError,
        "capacity is 33; allowed: a multiple of 32",
    ),
    "two_blocks": (
        dict(quantization=AttentionQuantization(
            None, QuantSpec(granularity="block", block_size=4),
            QuantSpec(granularity="block", block_size=6),
        )),
        ValueError, "capacity is 32; allowed: a multiple of 12",
    ),
    "odd_key": (
        dict(head_dim=7, value_dim=8, quantization="int4"), ValueError,
        "head_dim is 7; allowed: an even one",
    ),
    "odd_value": (
        dict(value_dim=7, quantization="int4"), ValueError, "value_dim is 7; allowed: an even one",
    ),
    "dtype": (dict(dtype=jnp.int8), TypeError, "dtype is <class 'jax.numpy.int8'>; allowed: floa"),
    "dtype_name": (dict(dtype="half a float"), TypeError, "dtype is 'half a float'; allowed: flo"),
    "dtype_none": (dict(dtype=None), TypeError, "dtype is None; allowed: float32, bfloat16"),
    "name": (dict(quantization="int2"), ValueError, 'quantization is "int2"; allowed: "int8", "i'),
    "none": (dict(quantization=None), TypeError, "quantization is a NoneType; allowed: \"int8\""),
    "no_value": (
        dict(quantization=AttentionQuantization(key=QuantSpec())), ValueError,
        "quantization is without value; allowed",
    ),
    "no_key": (
        dict(quantization=AttentionQuantization(value=QuantSpec())), ValueError,
        "quantization is without key; allowed",
    ),
} | {
    granularity: (
        dict(quantization=AttentionQuantization(
            None, QuantSpec(), QuantSpec(granularity=granularity)
        )),
        ValueError,
        f'quantization is of granularity "{granularity}" for value; allowed: row, group, block, ch',
    )
    for granularity in ("tensor", "head", "channel")
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_argument_of_create(case):
    changed, error, complaint = BAD[case]
    arguments = dict(batch=2, capacity=32, kv_heads=2, head_dim=16) | changed
    with pytest.raises(
        error, match=rf"^jax_gluon\.QuantizedKVCache\.create: {re.escape(complaint)}"
    ):
        QuantizedKVCache.create(**arguments)


KEY, VALUE = (B, 3, K, H), (B, 3, K, V)


@pytest.mark.parametrize(
    ("key", "value", "lengths", "error", "complaint"),
    [
        (np.ones((B, 3, K, H + 1)), np.ones(VALUE), None, ValueError,
         "key is of shape [2, 3, 2, 17]; allowed: [2, T, 2, 16] with T at least 1"),
        (np.ones((1, 3, K, H)), np.ones(VALUE), None, ValueError, "key is of shape [1, 3, 2, 16]"),
        (np.ones(KEY), np.ones((B, 3, K + 1, V)), None, ValueError,
         "value is of shape [2, 3, 3, 12]; allowed: [2, T, 2, 12] with T at least 1"),
        (np.ones(KEY), np.ones((B, 4, K, V)), None, ValueError,
         "value is of 4 tokens; allowed: key's, 3"),
        (np.ones((B, 0, K, H)), np.ones((B, 0, K, V)), None, ValueError, "key is of shape [2, 0,"),
        (np.ones((3, K, H)), np.ones((3, K, V)), None, ValueError, "key is of shape [3, 2, 16]"),
        (np.ones(KEY, np.int32), np.ones(VALUE), None, TypeError,
         "key is of dtype int32; allowed: float32, bfloat16"),
        (np.ones(KEY), np.ones(VALUE), [1, 2, 3], ValueError,
         "lengths is of shape [3]; allowed: shape [B] = [2]"),
        (np.ones(KEY), np.ones(VALUE), 3, ValueError, "lengths is of shape []; allowed"),
        (np.ones(KEY), np.ones(VALUE), [1.0, 2.0], TypeError,
         "lengths is of dtype float64; allowed: an integer dtype"),
    ],
)  # fmt: skip
def test_bad_argument_of_append(key, value, lengths, error, complaint):
    with pytest.raises(
        error, match=rf"^jax_gluon\.QuantizedKVCache\.append: {re.escape(complaint)}"
    ):
        create().append(key, value, lengths)


def test_appending_codes():
    codes = jax_gluon.quantize(np.ones(KEY, np.float32), QuantSpec())
    with pytest.raises(TypeError, match="append: key is a QuantizedTensor; allowed: a float array"):
        create().append(codes, np.ones(VALUE, np.float32))


@pytest.mark.parametrize(
    ("quantization", "T", "keywords", "error", "complaint"),
    [
        ("int8", 46, {}, ValueError, "query is of 46 tokens; allowed: at most 45, for which this"),
        ("int4", 15, {}, ValueError, "query is of 15 tokens; allowed: at most 14, for which this"),
        ("int8", None, {}, ValueError, "query is of rank 3; allowed: rank 4 (BTNH)"),
        ("int8", 1, dict(is_causal=True), TypeError, 'unexpected keyword argument "is_causal"; al'),
        ("int8", 1, dict(query_offset=2), TypeError, 'unexpected keyword argument "query_offset"'),
        ("int8", 1, dict(mask=None), TypeError, 'unexpected keyword argument "mask"; allowed: sca'),
    ],
)
def test_bad_argument_of_attention(quantization, T, keywords, error, complaint):
    query = np.ones((B, N, H) if T is None else (B, T, N, H), np.float32)
    pattern = rf"^jax_gluon\.QuantizedKVCache\.attention: {re.escape(complaint)}"
    with pytest.raises(error, match=pattern):
        create(quantization, window=WINDOW).attention(query, **keywords)
