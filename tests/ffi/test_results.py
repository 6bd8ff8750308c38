"""What the handlers compute from good calls."""

import copy
import math

import numpy as np
import pytest

from tests.support.ffi_calls import (
    CALLS,
    FORMATS,
    FORWARD,
    B,
    H,
    K,
    N,
    V,
    attention,
    draw,
    quantize,
    result,
)


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_that_are_spoilt_elsewhere_are_good(name):
    call = CALLS[name]()
    for x, expected in zip(call.run(), call.results.values(), strict=True):
        assert (x.shape, x.dtype) == (expected.shape, expected.dtype)
        assert np.isfinite(x).all()


def test_codes_that_a_call_makes_are_those_of_the_quantizer():
    """The same bits, and the same output as that of a call that is given them."""
    call = attention(FORWARD, "made")
    found = dict(zip(call.results, call.run(), strict=True))
    given = attention(FORWARD, "made")
    given.results = {name: given.results[name] for name in ("out", "row_maximum", "log2_sum")}
    given.operands = {}
    for format_, name in zip(FORMATS["made"], ("query", "key", "value"), strict=True):
        quantizer = quantize(
            bits=format_.bits, symmetric=int(format_.offset == 0), center=format_.has_center,
            token_block=format_.token_block, head_block=format_.head_block,
        )  # fmt: skip
        quantizer.attributes["float_minimum"] = np.int64(format_.offset == 2)
        x = call.operands[name]
        visible = call.operands["query_visible" if name == "query" else "key_value_visible"]
        quantizer.operands = {"x": x, "visible": visible}
        quantizer.results = {
            part.removeprefix(f"{name}_"): shape
            for part, shape in call.results.items()
            if part.startswith(f"{name}_")
        }
        for part, y in zip(quantizer.results, quantizer.run(), strict=True):
            np.testing.assert_array_equal(found[f"{name}_{part}"], y)
            given.operands[name if part == "data" else f"{name}_{part}"] = np.asarray(y)
        given.attributes[f"{name}_is_made"] = np.int64(0)
    given.operands |= {
        name: x for name, x in call.operands.items() if name not in ("query", "key", "value")
    }
    for part, y in zip(given.results, given.run(), strict=True):
        np.testing.assert_array_equal(found[part], y)


def test_codes_are_made_where_there_is_no_row():
    """The output is empty, the codes are not."""
    call = attention(FORWARD, "made_in_part", full=False)
    call.operands["query"] = draw(B, 0, N, H)
    call.results |= {"out": result(B, 0, N, V), "row_maximum": result(B, 0, N),
                     "log2_sum": result(B, 0, N)}  # fmt: skip
    found = dict(zip(call.results, call.run(), strict=True))
    codes = np.asarray(found["key_data"], np.float32) * np.asarray(found["key_scale"])
    np.testing.assert_allclose(codes, call.operands["key"], atol=float(found["key_scale"].max()))


@pytest.mark.parametrize("window", [(2**61 - 1, 0), (0, 2**61 - 1), (2**61 - 1, 2**61 - 1)])
def test_a_huge_window_does_not_overflow(window):
    call = attention(FORWARD)
    call.attributes["window_left"], call.attributes["window_right"] = map(np.int64, window)
    wide = copy.deepcopy(call)
    wide.attributes["window_left"], wide.attributes["window_right"] = (
        np.int64(min(n, 1000))
        for n in window  # further than any position
    )
    for x, y in zip(call.run(), wide.run(), strict=True):
        np.testing.assert_array_equal(x, y)


def test_scales_broadcast_over_tokens_and_heads():
    call = attention(FORWARD, "int8", full=False)
    expected = call.run()
    for name in ("query_scale", "key_scale", "value_scale"):
        call.operands[name] = call.operands[name][:1, :1, :1]
    for x, y in zip(call.run(), expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_operands_of_different_float_types():
    call = attention(FORWARD, full=False)
    call.operands["key"] = call.operands["key"].astype(np.float16)
    expected = copy.deepcopy(call)
    expected.operands["key"] = expected.operands["key"].astype(np.float32)
    for x, y in zip(call.run(), expected.run(), strict=True):
        np.testing.assert_array_equal(x, y)


def test_no_keys_is_not_an_error():
    call = attention(FORWARD, full=False)
    call.operands |= {"key": draw(B, 0, K, H), "value": draw(B, 0, K, V)}
    out, row_maximum, log2_sum = call.run()
    assert not out.any()
    assert not row_maximum.any()
    assert (log2_sum == np.float32(-3.0e38)).all()


# The mapped leading axes of each operand in turn, out of (2, 3); the results always have both.
LEADING = [(2, 3), (1, 3), (2, 1), (1, 1)]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("turn", range(len(LEADING)))
def test_leading_axes_fold_into_the_batch_without_a_copy(name, turn):
    """The same bits as one call per entry, whichever operands are mapped over which axis."""
    call = CALLS[name]()
    mapped = copy.deepcopy(call)
    for i, (of, x) in enumerate(call.operands.items()):
        leading = LEADING[(i + turn) % len(LEADING)]
        # Each entry another permutation of the same numbers: lengths and scales stay in range.
        entries = [np.roll(x, 3 * entry, axis=-1) for entry in range(math.prod(leading))]
        mapped.operands[of] = np.stack(entries).reshape(*leading, *x.shape)
    for of, x in call.results.items():
        mapped.results[of] = result(2, 3, *x.shape, dtype=x.dtype)
    actual = mapped.run()
    assert len({np.asarray(actual[0][i, j]).tobytes() for i in range(2) for j in range(3)}) > 1
    for i in range(2):
        for j in range(3):
            for of, x in mapped.operands.items():
                call.operands[of] = x[min(i, x.shape[0] - 1), min(j, x.shape[1] - 1)]
            for x, y in zip(actual, call.run(), strict=True):
                np.testing.assert_array_equal(x[i, j], y)
