"""Keys and values in pages: every number of the table and every size is checked."""

import numpy as np
import pytest

from tests.support.ffi_calls import BACKWARD, CALLS, PAGE, PAGES, POOL, TANGENT, B, attention, paged

calls = pytest.mark.parametrize("formats", ["int8", "int4"])


def test_the_call_itself_is_right():
    for formats in ("int8", "int4"):
        assert all(np.isfinite(x).all() for x in paged(formats).run())


@calls
def test_pages_are_those_of_the_table(formats):
    """The same tokens under other numbers, and under the numbers of one entry alone."""
    out = paged(formats).run()
    for order in ([4, 2, 0, 1, 3], [1, 0, 2, 4, 3]):
        call = paged(formats)
        for name, x in call.operands.items():
            if name.startswith(("key", "value")) and not name.endswith("_center"):
                call.operands[name] = x[order]
        call.operands["page_table"] = np.argsort(order)[call.operands["page_table"]].astype(
            np.int32
        )
        for x, y in zip(call.run(), out, strict=True):
            np.testing.assert_array_equal(x, y)
    call = paged(formats)
    call.operands["page_table"] = call.operands["page_table"][::-1].copy()
    assert not np.array_equal(call.run()[0], out[0])


@calls
@pytest.mark.parametrize("page", [POOL, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize(("entry", "index"), [(0, 0), (1, 2), (1, 0)])
def test_a_page_that_there_is_not(formats, page, entry, index):
    call = paged(formats)
    call.operands["page_table"][entry, index] = page
    expected = f"operand page_table has page {page} at [{entry}, {index}], expected 0 to {POOL - 1}"
    assert expected in call.error()


def test_no_page_at_all():
    call = paged()
    for name, x in call.operands.items():
        if name.startswith(("key", "value")) and not name.endswith("_center"):
            call.operands[name] = x[:0]
    assert "operand page_table has page 0 at [0, 0], expected 0 to -1" in call.error()


ATTRIBUTES = {
    "odd": ("page_tokens", 24, "page_tokens is 24, expected 0 or a power of two from 16 to 256"),
    "short": ("page_tokens", 8, "page_tokens is 8, expected 0 or a power of two from 16 to 256"),
    "long": ("page_tokens", 512, "page_tokens is 512, expected 0 to 256"),
    "negative": ("page_tokens", -16, "page_tokens is -16, expected 0 to 256"),
    "other": ("page_tokens", 32, f"operand key has pages of {PAGE} tokens, expected 32"),
    "no_pages": ("table_pages", 0, "table_pages is 0, expected at least 1"),
    "more_pages": ("table_pages", 4, f"page_table has shape [{B}, {PAGES}], expected [{B}, 4]"),
    "many_pages": ("table_pages", 2**40, f"table_pages is {2**40}, expected 0 to "),
    "blocks": ("key_token_block", 12, "page_tokens is 16, expected a multiple of blocks of tokens"),
    "one_block": (
        "value_token_block",
        0,
        "page_tokens is 16, expected a multiple of blocks of tok",
    ),
}


@pytest.mark.parametrize(("attribute", "value", "complaint"), ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_attributes_of_pages(attribute, value, complaint):
    call = paged()
    call.attributes[attribute] = np.int64(value)
    assert complaint in call.error()


def test_pages_of_floats():
    call = attention("jax_gluon.attention_forward", full=False)
    call.attributes |= {"page_tokens": np.int64(PAGE), "table_pages": np.int64(PAGES)}
    assert "page_tokens is 16, expected 0 where keys or values are not codes" in call.error()


@pytest.mark.parametrize("target", [BACKWARD, TANGENT])
def test_only_forward_calls_read_pages(target):
    call = attention(target, "int8", full=False)
    call.attributes |= {"page_tokens": np.int64(PAGE), "table_pages": np.int64(PAGES)}
    assert "attribute page_tokens is 16, expected 0 but in a forward call" in call.error()


def test_a_table_is_needed_for_pages_alone():
    call = paged()
    del call.operands["page_table"]
    assert "operand page_table is missing" in call.error()
    call = CALLS["forward_int8"]()
    call.operands["page_table"] = np.zeros((B, PAGES), np.int32)
    assert "operands, expected" in call.error()
