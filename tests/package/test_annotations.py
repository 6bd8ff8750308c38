"""Public annotations name the axes of every array, and jaxtyping finds them true of calls."""

import functools
import inspect
import pydoc
import re
import sys
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from beartype.door import is_bearable

import jax_gluon
from jax_gluon import AttentionQuantization, QuantSpec, _typing, reference
from jax_gluon import flax as gluon_flax
from jax_gluon._arguments import AttentionKeywords

API = Path(__file__).resolve().parents[2] / "docs" / "api.md"
#: No two are alike, so that a wrong letter is wrong.
SIZES = dict(B=3, T=5, S=7, N=4, K=2, H=8, V=6)
B, T, S, N, K, H, V = SIZES.values()


class BoolOrInteger(jaxtyping.AbstractDtype):
    dtypes = (*jaxtyping.Bool.dtypes, *jaxtyping.Integer.dtypes)


DTYPES = [name for name in _typing.__all__ if name != "Array"]
LETTERS = jaxtyping.Shaped[np.ndarray, " ".join(SIZES)]
JAXTYPING = {name: getattr(jaxtyping, name, BoolOrInteger) for name in DTYPES}


def module_of(owner):
    return vars(sys.modules[owner.__module__])


def fits(owner, annotations, values):
    """Whether arguments and result, or the fields of an object, are what annotations say."""
    # The class of a method that returns its own has more.
    names = {**module_of(owner), **JAXTYPING, "Self": object}
    with jaxtyping.jaxtyped("context"):
        assert isinstance(np.empty(tuple(SIZES.values())), LETTERS)
        return all(
            is_bearable(value, eval(annotations[name], names))
            for name, value in values.items()
            if name in annotations
        )


def called(function, *arguments, **keywords):
    """The function, and what its annotations are about in this call."""
    values = dict(inspect.signature(function).bind(*arguments, **keywords).arguments)
    values |= values.pop("keywords", {})
    return function, values | {"return": function(*arguments, **keywords)}


def fields(x):
    return type(x), {name: getattr(x, name) for name in type(x).__annotations__}


def zeros(axes, dtype=jnp.float32):
    return jnp.zeros([SIZES[axis] for axis in axes], dtype)


def calls_of_attention():
    q, k, v = zeros("BTNH"), zeros("BSKH"), zeros("BSKV")
    int32, key = jnp.int32, jax.random.key(0)
    lengths = dict(query_seq_lengths=zeros("B", int32), key_value_seq_lengths=zeros("B", jnp.uint8))
    ids = dict(query_segment_ids=zeros("BT", int32), key_value_segment_ids=zeros("S", int32))
    at = dict(query_positions=zeros("T", int32), key_value_positions=zeros("BS", int32))
    full = dict(bias=zeros("NTS"), mask=zeros("BNTS", bool), sinks=zeros("N"), **lengths, **ids)
    options = (
        dict(scale=0.5, key_value_mask=zeros("BS", bool), query_offset=jnp.int32(2), **full),
        dict(scale=zeros("N"), key_value_mask=zeros("S", int32), mask=zeros("TS", int32), **at),
        dict(query_offset=zeros("B", int32), dropout_rate=0.5, dropout_rng=key),
        dict(dropout_rate=0.5, dropout_rng=jax.random.key_data(key), bias=zeros("")),
        dict(mask=jax_gluon.block_mask(lambda b, h, i, j: j <= i, T, S)),
    )
    ours = jax_gluon.dot_product_attention
    yield from (called(ours, q, k, v, **each) for each in options)
    logits = full["bias"], full["mask"]
    for module in (jax_gluon, reference):
        yield called(module.attention_with_log_sum_exp, q, k, v, *logits)
        for flag in (False, True):
            yield called(module.dot_product_attention, q, k, v, *logits, return_residual=flag)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    yield called(jax_gluon.explain, *shapes, *logits, implementation="xla")
    on_mesh = dict(mesh=jax.sharding.Mesh(jax.devices()[:1], ("ring",)), axis="ring")
    for flag in (False, True):
        whole = jax_gluon.context_parallel_attention
        yield called(whole, q, k, v, *logits, return_residual=flag, **on_mesh)
    yield called(jax_gluon.explain_context_parallel, *shapes, *logits, **on_mesh)
    codes = [jax_gluon.quantize(x, QuantSpec()) for x in (q, k, v)]
    yield called(ours, *codes)
    yield called(ours, *(np.zeros(x.shape[1:], np.float16) for x in (q, k, v)))  # no batch
    yield called(ours, *(jnp.zeros((2, *x.shape)) for x in (q, k, v)))
    of_flax = gluon_flax.attention_fn()
    for each in (key, jax.random.key_data(key)):
        yield called(type(of_flax).__call__, of_flax, q.astype(int32), k, v, *logits, True, each)


def calls_of_others():
    int32, rows, keys = jnp.int32, jnp.arange(T), jnp.arange(S)
    for x, lengths in ((zeros("BTNH"), zeros("B", int32)), (zeros("TNH"), zeros("", int32))):
        yield called(jax_gluon.quantize, x, QuantSpec(), lengths=lengths, implementation="xla")
        yield called(reference.fake_quantize, x, QuantSpec(), lengths=lengths)
    yield called(jax_gluon.reorder_tokens, zeros("BTNH"), T, "striped")
    key = jax.random.key(0)
    for each in (key, jax.random.key_data(key)):
        yield called(jax_gluon.dropout_mask, each, (B, N, T, S), 0.5)
    mask = jax_gluon.block_mask(lambda b, h, i, j: j <= i, T, S, batch=B, heads=N)
    yield fields(mask)
    yield called(type(mask).to_dense, mask)
    yield called(type(mask).part, mask, rows[1:], keys[1:])

    minimum = dict(symmetric=False, float_minimum=True)
    powers = QuantSpec(granularity="channel_block", center=True, token_powers=True, **minimum)
    for spec in (QuantSpec(bits=4, symmetric=False, granularity="tensor"), powers):
        codes = jax_gluon.quantize(zeros("BTNH"), spec, implementation="xla")
        yield fields(codes)
        yield called(type(codes).dequantize, codes)
    for both in (powers, QuantSpec(granularity="block")):
        formats = AttentionQuantization(key=both, value=both)
        cache = jax_gluon.QuantizedKVCache.create(B, 32, K, H, value_dim=V, quantization=formats)
        yield fields(cache)
        yield type(cache.key), {name: getattr(cache.key, name) for name in ("scale", "minimum")}
        new = zeros("BTKH"), zeros("BTKV"), zeros("B", int32), zeros("B", jnp.uint8)
        yield called(type(cache).append, cache, *new)
        for rows in (zeros("B", bool), zeros("", int32), jnp.arange(2)):
            yield called(type(cache).reset, cache, rows)
        for count in (zeros("", int32), zeros("B", int32)):
            yield called(type(cache).rewind, cache, count)
        yield called(type(cache).select, cache, jnp.arange(2))
        create = jax_gluon.PagedKVCache.create
        pages = create(B, 9, K, H, value_dim=V, page_size=32, capacity=64, quantization=formats)
        yield fields(pages)
        yield called(type(pages).fork, pages, zeros("", int32), jnp.int32(1))
        for scale in (0.5, zeros("N")):
            yield called(type(cache).attention, cache, zeros("BTNH"), scale=scale)


@functools.cache
def calls():
    """What is annotated, and values that it is about: traced, so that nothing is compiled."""
    made = []
    jax.eval_shape(lambda: made.extend((*calls_of_attention(), *calls_of_others())) or ())
    return made


def test_calls_are_what_annotations_say(require):
    require("cpu")
    for owner, values in calls():
        assert values.keys() & owner.__annotations__.keys(), owner
        assert fits(owner, owner.__annotations__, values), owner


def mistakes(annotation):
    """With a letter, or a dtype, in place of another."""
    for axes in re.finditer("'[^']*'", annotation):
        for letter in re.finditer(r"\b[TSNKHV]\b", axes[0]):
            at = axes.start() + letter.start()
            for other in set("TSNKHV") - {letter[0]}:
                yield annotation[:at] + other + annotation[at + 1 :]
    for dtype in re.finditer(rf"\b({'|'.join(DTYPES)})\[", annotation):
        if dtype[1] != "Shaped":
            other = "Float" if dtype[1] in ("Bool", "BoolOrInteger", "Integer") else "Bool"
            yield annotation[: dtype.start(1)] + other + annotation[dtype.end(1) :]


def test_mistakes_in_annotations_are_found(require):
    """Each letter of each annotation counts: these calls have arrays for all of them."""
    require("cpu")
    calls_of = {}
    for owner, values in calls():
        calls_of.setdefault(owner, []).append(values)
    tried, missed = 0, []
    for owner, each in calls_of.items():
        # The query has the batch axes.
        query = {x: y for x, y in owner.__annotations__.items() if x == "query"}
        for name, annotation in owner.__annotations__.items():
            for mistake in mistakes(annotation):
                tried += 1
                if all(fits(owner, query | {name: mistake}, values) for values in each):
                    missed.append((owner.__qualname__, name, mistake))
    assert missed == []
    assert tried > 500


def annotated(path):
    """Of a name in docs/api.md: itself, or the public functions of a class or a module."""
    found = pydoc.locate(path)
    if inspect.isfunction(found):
        return [inspect.unwrap(found)]
    if inspect.ismodule(found):
        own = (x for x in vars(found).values() if getattr(x, "__module__", "") == path)
        return [x for x in own if inspect.isfunction(x) and not x.__name__.startswith("_")]
    members = [each for name, each in vars(found).items() if not name.startswith("_")]
    members = [getattr(x, "fget", getattr(x, "__func__", x)) for x in members]
    return [found, *filter(inspect.isfunction, members)]


def without_axes(annotation):
    """The array types of an annotation that stand alone."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated or origin is typing.Literal:
        return
    if any(x in (jax.Array, np.ndarray, jax.ShapeDtypeStruct) for x in (annotation, origin)):
        yield annotation
    for each in typing.get_args(annotation):
        for inner in each if isinstance(each, list) else (each,):
            yield from without_axes(inner)


PATHS = re.findall(r"^::: (\S+)", API.read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("path", PATHS)
def test_every_public_array_has_axes(path):
    """And annotations can be read where jaxtyping is not installed."""
    for each in annotated(path):
        for name, hint in typing.get_type_hints(each, include_extras=True).items():
            assert not list(without_axes(hint)), (each, name)


def test_keywords_are_annotated_alike():
    ours = jax_gluon.dot_product_attention.__annotations__
    for name, annotation in AttentionKeywords.__annotations__.items():
        assert annotation.__forward_arg__ == ours[name], name
