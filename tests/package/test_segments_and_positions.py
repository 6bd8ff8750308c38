"""Segments and positions: packed sequences, permuted tokens, rows that stand anywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from tests.support.against_oracle import check

_RNG = np.random.default_rng(3)
_FAR = 2**31 - 1
B, T, S = 2, 70, 91


def _packed(length, *lengths):
    """Segment ids and positions of sequences of these lengths, one after another, then padding."""
    ids = np.repeat(np.arange(len(lengths) + 1), [*lengths, length - sum(lengths)])
    return ids, np.concatenate([np.arange(n) for n in np.bincount(ids)])


def _rows(function):
    return np.stack([function(b) for b in range(B)])


_PACKED, _PACKED_KEYS = (_rows(lambda b, n=n: _packed(n, 20 + b, 33, 5)[0]) for n in (T, S))
_WITHIN, _WITHIN_KEYS = (_rows(lambda b, n=n: _packed(n, 20 + b, 33, 5)[1]) for n in (T, S))
CASES = {
    "packed": dict(query_segment_ids=_PACKED, key_value_segment_ids=_PACKED_KEYS),
    "packed_causal": dict(
        query_segment_ids=_PACKED, key_value_segment_ids=_PACKED_KEYS, is_causal=True,
        query_positions=_WITHIN, key_value_positions=_WITHIN_KEYS,
    ),
    # Every range of ids is one number.
    "one_segment": dict(query_segment_ids=np.full(T, 7), key_value_segment_ids=np.full(S, 7)),
    "scattered_segments": dict(
        query_segment_ids=_RNG.integers(-3, 3, (B, T)), is_causal=True, local_window_size=(40, 7),
        key_value_segment_ids=_RNG.integers(-3, 4, (B, S)), query_offset=np.array([5, -20]),
    ),
    "permuted": dict(
        query_positions=_rows(lambda b: _RNG.permutation(T)), is_causal=True,
        key_value_positions=_rows(lambda b: _RNG.permutation(S)),
    ),
    "repeated_positions": dict(
        query_positions=_RNG.integers(0, 30, T), key_value_positions=_RNG.integers(0, 30, S),
        local_window_size=(4, 9), key_value_seq_lengths=np.array([80, 3]),
        query_seq_lengths=np.array([70, 44]),
    ),
    "any_value": dict(
        query_positions=_RNG.choice([-_FAR - 1, -_FAR, -1, 0, 5, _FAR], (B, T)),
        key_value_positions=_RNG.choice([-_FAR - 1, -_FAR, 0, 3, _FAR - 2, _FAR], (B, S)),
        query_segment_ids=_RNG.choice([-_FAR - 1, _FAR], (B, T)),
        key_value_segment_ids=_RNG.choice([-_FAR - 1, _FAR], (B, S)),
        local_window_size=(3, _FAR),
    ),
    "zigzag": dict(
        query_positions=np.concatenate([np.arange(35), 200 + np.arange(35)]), is_causal=True,
        key_value_positions=np.concatenate([np.arange(50) + 30, 150 + np.arange(41)]),
        logits_soft_cap=3.0, mask=_RNG.random((B, 1, T, S)) < 0.7,
        bias=_RNG.standard_normal((1, 4, T, S), np.float32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_implementation_and_the_reference_are_the_oracle(
    case, implementation, oracle, relative_error, random_operands
):
    operands = random_operands(B, T, S, 4, 2, 22, 26)
    check(CASES[case], implementation, operands, oracle, relative_error)


@pytest.mark.parametrize(
    ("kernel", "quantization", "rows", "length"),
    [
        ("baseline", "int8", T, S), ("gluon", "int8", T, S), ("gluon", "int4", T, S),
        ("decode", "int8", 3, 1100), ("decode", "int4", 3, 1100), ("decode", None, 2, 1100),
    ],
)  # fmt: skip
def test_codes_and_kernels(
    kernel, quantization, rows, length, implementation, random_operands, relative_error
):
    """Segments and positions hide what an equal mask hides."""
    if implementation == "xla" and (kernel, quantization) != ("gluon", "int4"):
        pytest.skip("it has one kernel")
    ids, at = _packed(length, length // 2, length // 3)
    keys, key_at = (np.stack([_RNG.permutation(x) for _ in range(B)]) for x in (ids, at))
    ids, at = (np.stack([x[-rows:]] * B) for x in (ids, at))
    q, k, v, d_out = random_operands(B, rows, length, 4, 2, 32, 24)
    kernel = "baseline" if implementation == "xla" else kernel
    mask = (ids[:, None, :, None] == keys[:, None, None]) & (
        key_at[:, None, None] <= at[:, None, :, None]
    )
    listed = dict(
        query_segment_ids=ids, key_value_segment_ids=keys, query_positions=at,
        key_value_positions=key_at, is_causal=True,
    )  # fmt: skip

    def results(**keywords):
        def attention(q, k, v):
            return jax_gluon.dot_product_attention(
                q, k, v, quantization=quantization, implementation=implementation, kernel=kernel,
                **keywords,
            )  # fmt: skip

        out, pullback = jax.vjp(attention, q, k, v)
        return out, *pullback(d_out)

    # The CPU rounds P to 8 bits in units of a subtile's largest, and a range cuts other subtiles.
    bound = 8e-3 if implementation == "cpu" else 1e-5
    for a, b in zip(results(**listed), results(mask=jnp.asarray(mask)), strict=True):
        assert relative_error(a, b) <= bound


@pytest.mark.parametrize("offset", [3, np.int64(-2), np.array([4, 0]), "traced"])
def test_a_query_offset_is_added_to_the_index(
    offset, implementation, oracle, relative_error, random_operands
):
    """As an int, for each batch entry, and traced; a window may be longer than the rows."""
    q, k, v, _ = random_operands(B, 5, 40, 4, 2, 16, 16)
    rules = dict(is_causal=True, local_window_size=(9, 0))
    attention = functools.partial(
        jax_gluon.dot_product_attention, implementation=implementation, **rules
    )
    if isinstance(offset, str):
        offset = np.int32(30)
        found = jax.jit(lambda x: attention(q, k, v, query_offset=x))(offset)
    else:
        found = attention(q, k, v, query_offset=offset)
    expected = oracle(q, k, v, query_offset=offset, **rules)
    assert relative_error(found, expected.out) <= 2e-6


def test_packed_sequences_are_separate_rows(implementation, random_operands, relative_error):
    """Three documents in one row are those of three rows, gradients too."""
    lengths = [40, 17, 25]
    ids, at = _packed(sum(lengths), *lengths)
    q, k, v, d_out = random_operands(1, len(ids), len(ids), 4, 2, 32, 32)

    def run(attention, *arrays):
        out, pullback = jax.vjp(attention, *arrays[:3])
        return out, *pullback(arrays[3])

    packed = run(
        functools.partial(
            jax_gluon.dot_product_attention, query_segment_ids=ids, query_positions=at,
            is_causal=True, implementation=implementation,
        ),
        q, k, v, d_out,
    )  # fmt: skip
    for document in range(len(lengths)):
        rows = np.flatnonzero(ids == document)
        alone = run(
            functools.partial(
                jax_gluon.dot_product_attention, is_causal=True, implementation=implementation
            ),
            *(x[:, rows] for x in (q, k, v, d_out)),
        )
        for a, b in zip(packed, alone, strict=True):
            assert relative_error(a[:, rows], b) <= 2e-6


def test_the_reference_takes_any_offset(oracle, relative_error, random_operands):
    """As far as int32 goes, where an index and it have no sum."""
    q, k, v, _ = random_operands(B, 5, 40, 4, 2, 16, 16)
    offset = np.array([_FAR, -_FAR - 1])
    found = jax_gluon.reference.dot_product_attention(q, k, v, query_offset=offset, is_causal=True)
    expected = oracle(q, k, v, query_offset=offset, is_causal=True)
    assert np.asarray(found[0]).any()
    assert relative_error(found, expected.out) <= 2e-6
