"""Keys and values in pages: bit for bit attention over the same codes in one piece."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import AttentionQuantization, QuantSpec, debug
from jax_gluon import _attention as plain_attention
from jax_gluon._arguments import check_arguments
from jax_gluon._errors import Checker
from jax_gluon._quantization.formats import PRESETS, preset

plugin = pytest.importorskip("jax_gluon._plugin")
pytestmark = pytest.mark.usefixtures("poison")

MINIMUM = dict(symmetric=False, float_minimum=True)
FLOATS = {name: dataclasses.replace(each, query=None) for name, each in PRESETS.items()}
FORMATS = {
    "int8": "int8",
    "int4": "int4",
    "int8_of_float_queries": FLOATS["int8"],
    "int4_of_float_queries": FLOATS["int4"],
    "zero_points": AttentionQuantization(
        QuantSpec(), QuantSpec(symmetric=False, center=True), QuantSpec(4, symmetric=False)
    ),
    "groups_and_blocks": AttentionQuantization(
        None,
        QuantSpec(4, granularity="group", block_size=10, **MINIMUM),
        QuantSpec(granularity="block", block_size=8, symmetric=False),
    ),
}
# Pages are shorter than a subtile of keys, as long, and longer; S is more than a chunk.
B, N, S = 2, 6, 768
# Of heads whose groups fill no vector, and of one head, whose rows are read in place.
HEADS = {"three_heads": (3, 20, 28), "one_head": (1, 64, 96)}
LENGTHS = np.array([S - 5, 301], np.int32)
KEYWORDS = {
    "causal": dict(is_causal=True),
    "window": dict(local_window_size=(130, 0)),
    "rules": dict(is_causal=True, logits_soft_cap=3.0, sinks=np.linspace(-1, 1, N)),
}


@functools.cache
def codes_of(name, heads):
    K, H, V = HEADS[heads]
    rng = np.random.default_rng(K)
    both = preset(FORMATS[name])
    key, value = (rng.standard_normal((B, S, K, width)).astype(np.float32) for width in (H, V))
    return tuple(
        jax_gluon.quantize(x + 2, spec, lengths=LENGTHS)
        for x, spec in ((key, both.key), (value, both.value))
    )


def in_pages(codes, tokens, table, pages):
    """The same codes on the pages that a table says, all others full of what must not be read."""

    def spread(part):
        size = part.shape[1] * tokens // S
        part = np.asarray(part.view(jnp.uint16) if part.dtype == jnp.bfloat16 else part)
        # NaN, as a scale; so are the bits of 16.
        unread = np.nan if part.dtype == np.float32 else np.array(-1).astype(part.dtype)
        pool = np.full((pages, size, *part.shape[2:]), unread, part.dtype)
        pool[table] = part.reshape(*table.shape, size, *part.shape[2:])
        return jnp.asarray(pool)

    spread_codes = jax.tree.map(spread, dataclasses.replace(codes, center=None))
    return dataclasses.replace(spread_codes, center=codes.center)


@functools.cache
def run(T, heads, name, keywords, tokens):
    """Attention compiled for one piece (tokens 0) or for pages, whichever kernels run it."""

    def attend(query, key, value, offset, table):
        whole = jax.eval_shape(lambda: codes_of(name, heads))
        arguments = check_arguments(
            Checker("test"), query, *whole, None, None, quantization=query_of(name),
            key_value_seq_lengths=LENGTHS, query_offset=offset, implementation="cpu",
            **KEYWORDS[keywords],
        )  # fmt: skip
        operands = arguments.operands._replace(key=key, value=value, page_table=table)
        return plain_attention.run(dataclasses.replace(arguments, operands=operands), True)

    return jax.jit(attend)


def query_of(name):
    return AttentionQuantization(query=preset(FORMATS[name]).query)


def ran(attend, *operands):
    """The kernel that ran, output and log-sum-exp."""
    results = jax.block_until_ready(attend(*operands))
    return debug.kernels()[-1], *results


def compare(T, heads, name, keywords, tokens):
    H = HEADS[heads][1]
    query = np.random.default_rng(T).standard_normal((B, T, N, H)).astype(np.float32)
    codes, offset = codes_of(name, heads), LENGTHS - T
    expected = ran(run(T, heads, name, keywords, 0), query, *codes, offset, None)
    P = S // tokens
    table = np.random.default_rng(1).permutation(B * P + 3)[: B * P].reshape(B, P)
    pages = [in_pages(x, tokens, table, B * P + 3) for x in codes]
    # Pages past the last key that is seen are not read, whatever stands there.
    unused = np.setdiff1d(np.arange(B * P + 3), table)[0]
    table = np.where(np.arange(P) * tokens >= LENGTHS[:, None], unused, table)
    table = jnp.asarray(table, jnp.int32)
    out = ran(run(T, heads, name, keywords, tokens), query, *pages, offset, table)
    assert out[0] == expected[0]
    assert np.isfinite(expected[1]).all()
    for x, y in zip(out[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(x, y)


def _sizes(name):
    """A page holds whole blocks of tokens."""
    both = preset(FORMATS[name])
    blocks = both.key.token_block, both.value.token_block
    return [tokens for tokens in (16, 64, 256) if tokens % max(blocks) == 0]


@pytest.mark.parametrize(
    ("name", "tokens"), [(name, tokens) for name in FORMATS for tokens in _sizes(name)]
)
@pytest.mark.parametrize("variant", plugin.cpu_isas_supported())
def test_one_query(variant, name, tokens, use):
    use(variant)
    for heads in HEADS:
        compare(1, heads, name, "causal" if tokens == 16 else "window", tokens)


@pytest.mark.parametrize("name", ["int8", "int4", "groups_and_blocks"])
@pytest.mark.parametrize("T", [3, 40])
@pytest.mark.parametrize("variant", plugin.cpu_isas_supported())
def test_some_queries(variant, name, T, use):
    """By the kernel for few, with more rules, and by those for many."""
    use(variant)
    compare(T, "three_heads", name, "rules", 32)
