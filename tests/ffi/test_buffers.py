"""Buffers that do not fit are an error that names what was found and expected, never a crash."""

import numpy as np
import pytest

from tests.support.ffi_calls import (
    CALLS,
    FORWARD,
    PARTS,
    B,
    Format,
    H,
    K,
    N,
    S,
    T,
    V,
    attention,
    draw,
    reshaped,
    result,
)


@pytest.mark.parametrize(("name", "part", "of"), PARTS)
def test_every_extent_is_checked(name, part, of):
    call = CALLS[name]()
    shape = getattr(call, part)[of].shape
    for axis, extent in enumerate(shape):
        longer = (*shape[:axis], extent + 1, *shape[axis + 1 :])
        message = reshaped(part, of, call, longer).error()
        # The found shape, or number of heads, stands in the message, and so does what was expected.
        assert "expected" in message
        assert any(str(n) in message for n in longer)


BROADCAST = (
    "bias", "mask", "scale", "zero_point", "minimum", "sinks", "bias_tangent", "sinks_tangent",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "part", "of"),
    [case for case in PARTS if case[1] == "results" or not case[2].endswith(BROADCAST)],
)
def test_only_bias_mask_and_scales_broadcast(name, part, of):
    """An extent of 1 stands for no other on the axes behind the leading ones."""
    call = CALLS[name]()
    shape = getattr(call, part)[of].shape
    for axis in (axis for axis, extent in enumerate(shape) if extent > 1):
        message = reshaped(part, of, call, (*shape[:axis], 1, *shape[axis + 1 :])).error()
        assert "expected" in message


# Every part with some, and each with many of the parts, which one function reads.
RANKS = (
    (lambda shape: shape[1:], lambda shape: (3, *shape)),
    (lambda shape: (), lambda shape: (1, *shape)),
)
DTYPES = (np.int16, np.uint32, np.complex64)


@pytest.mark.parametrize(("name", "part", "of", "i"), [(*x, i) for i, x in enumerate(PARTS)])
def test_every_rank_is_checked(name, part, of, i):
    call = CALLS[name]()
    shape = getattr(call, part)[of].shape
    for other in (make(shape) for make in RANKS[i % 2]):
        message = reshaped(part, of, call, other).error()
        assert "expected" in message


@pytest.mark.parametrize(("name", "part", "of", "i"), [(*x, i) for i, x in enumerate(PARTS)])
def test_every_dtype_is_checked(name, part, of, i):
    call = CALLS[name]()
    old, dtype = getattr(call, part)[of], DTYPES[i % 3]
    new = np.ones_like(old, dtype) if part == "operands" else result(*old.shape, dtype=dtype)
    getattr(call, part)[of] = new
    assert f"{part[:-1]} {of} is another type, expected " in call.error()


@pytest.mark.parametrize(("name", "of"), [(c, of) for c, part, of in PARTS if part == "operands"])
def test_every_operand_must_be_there(name, of):
    call = CALLS[name]()
    del call.operands[of]
    # The operands behind it move up, so the message may name the first that then does not fit.
    message = call.error()
    assert "operand " in message or "query has" in message


@pytest.mark.parametrize(
    ("name", "of"),
    # XLA drops a call that has no result at all, so the only one of a call can't be taken away.
    [(c, of) for c, part, of in PARTS if part == "results" and of != "d_bias"],
)
def test_every_result_must_be_there(name, of):
    call = CALLS[name]()
    del call.results[of]
    assert "result" in call.error()


@pytest.mark.parametrize("name", CALLS)
def test_operands_and_results_left_over_are_an_error(name):
    call = CALLS[name]()
    count = len(call.operands)
    call.operands["extra"] = draw(B)
    assert f"it has {count + 1} operands, expected {count}" in call.error()
    call = CALLS[name]()
    count = len(call.results)
    call.results["extra"] = result(B)
    assert f"it has {count + 1} results, expected {count}" in call.error()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_without_operands_or_attributes_is_an_error(name):
    call = CALLS[name]()
    call.operands = {}
    assert "is missing" in call.error()
    call = CALLS[name]()
    call.attributes = {}
    assert "attribute " in call.error()


def test_scales_along_a_row_are_all_there():
    call = attention(FORWARD, "int4")
    call.operands["key_scale"] = call.operands["key_scale"][..., :1]
    # Eight, and the powers of a block of four tokens.
    assert "operand key_scale has one number a row, expected 9" in call.error()
    call = attention(FORWARD, "int4")
    call.operands["key_minimum"] = call.operands["key_minimum"][..., :1]
    assert "operand key_minimum has one number a row, expected 8" in call.error()


def test_powers_stand_beside_the_scale_of_rows_of_one_element():
    codes = Format(8, token_block=4, head_block=1, has_center=1, has_powers=1)
    call = attention(FORWARD, full=False)
    call.operands |= codes.operands("value", (B, S, K, 1))
    call.attributes |= codes.attributes("value", FORWARD)
    call.results["out"] = result(B, T, N, 1)
    call.run()
    call.operands["value_scale"] = call.operands["value_scale"][..., :1]
    assert "operand value_scale has one number a row, expected 2" in call.error()


@pytest.mark.parametrize("heads", [1, 3, 5])
def test_heads_that_do_not_divide(heads):
    call = attention(FORWARD, full=False)
    call.operands["query"] = draw(B, T, heads, H)
    row = result(B, T, heads)
    call.results = {"out": result(B, T, heads, V), "row_maximum": row, "log2_sum": row}
    assert f"query has {heads} heads, expected a multiple of key's 2" in call.error()


def test_no_kv_heads():
    call = attention(FORWARD, full=False)
    call.operands |= {"key": draw(B, S, 0, H), "value": draw(B, S, 0, V)}
    assert "query has 4 heads, expected a multiple of key's 0" in call.error()


@pytest.mark.parametrize("name", ["bias", "mask"])
@pytest.mark.parametrize(
    "shape", [(B, K, T, S), (B, N, S, T), (3, N, T, S), (B, N, T, 2), (B, N, T, 0)]
)
def test_bias_and_mask_must_broadcast(name, shape):
    call = reshaped("operands", name, attention(FORWARD), shape)
    message = call.error()
    assert f"operand {name} has shape {list(shape)}, expected {[B, N, T, S]}" in message


@pytest.mark.parametrize(
    ("name", "changed", "complaint"),
    [
        (
            "mask_index",
            np.zeros((B, N, 2, 1), np.int32),
            "expected [2, 4, 1, 1] or 1 on any",
        ),
        ("mask_index", np.zeros((B, 2, 1, 1), np.int32), "expected [2, 4, 1, 1] or 1 on any axis"),
        (
            "mask_index",
            np.zeros((B, N, 1, 1), np.int8),
            "mask_index is int8, expected int32",
        ),
        ("mask_index", np.full((B, 1, 1, 1), 5, np.int32), "mask_index has 5, expected 0 to 4"),
        ("mask_index", np.full((1, 1, 1, 1), -1, np.int32), "mask_index has -1, expected 0 to 4"),
        ("mask_tiles", np.zeros((1, 3, 16, 1), np.uint8), "expected tiles of [16, 2]"),
        ("mask_tiles", np.zeros((1, 3, 32, 2), np.uint8), "expected [2, 3, 16, 2]"),
        ("mask_tiles", np.zeros((1, 3, 16, 2), np.int32), "mask_tiles is int32, expected"),
        ("mask_block", 24, "attribute mask_block is 24, expected a multiple of 16"),
        ("mask_block", -16, "attribute mask_block is -16, expected 0 to"),
    ],
)
def test_block_masks_must_fit(name, changed, complaint):
    call = attention(FORWARD, full=False)
    call.attributes |= {"has_mask": np.int64(1), "mask_block": np.int64(16)}
    call.operands |= {
        "mask_index": np.full((B, N, 1, 1), 4, np.int32),
        "mask_tiles": np.zeros((1, 3, 16, 2), np.uint8),
    }
    call.run()
    if name == "mask_block":
        call.attributes[name] = np.int64(changed)
    else:
        call.operands[name] = changed
    assert complaint in call.error()


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_64_bit_operands(configure, dtype):
    with configure(jax_enable_x64=True):
        call = attention(FORWARD)
        name = "query" if dtype == np.float64 else "key_value_seq_lengths"
        call.operands[name] = call.operands[name].astype(dtype)
        assert f"operand {name} is " in call.error()


def test_leading_axes_must_agree():
    call = attention(FORWARD, full=False)
    leading = {"query": (2, 3), "key": (2, 2), "value": (2, 3)}
    for of, axes in leading.items():
        call.operands[of] = np.broadcast_to(call.operands[of], axes + call.operands[of].shape)
    for of, x in call.results.items():
        call.results[of] = result(2, 3, *x.shape)
    message = call.error()
    assert f"operand key has shape {[2, 2, B, S, K, H]}, expected {[2, 3, B, S, K, H]}" in message
