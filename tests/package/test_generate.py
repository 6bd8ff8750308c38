"""`examples/generate.py`, in small: whoever is generated beside a sequence, it is the same."""

import numpy as np
import pytest

from examples import generate
from jax_gluon import AttentionQuantization, QuantSpec


@pytest.fixture
def small(monkeypatch):
    for name, size in dict(TOKENS=64, WIDTH=32, LAYERS=1, HEADS=4, HEAD_DIM=16).items():
        monkeypatch.setattr(generate, name, size)
    generate.traced.clear()


def served(server, requests):
    server.serve(requests)
    return [request.tokens for request in requests]


def test_slots_are_refilled_without_compiling(small):
    """Also behind another request, in another slot, and after a page was given back."""
    weights = generate.random_weights()
    prefix = np.arange(45) % generate.TOKENS
    server = generate.Server(weights, prefix, slots=2, pages=8, longest=12, quantization="int4")
    before = server.free_pages
    assert before == 6
    requests = generate.random_requests(5, 12, 20)
    tokens = served(server, requests)
    assert [len(each) for each in tokens] == [request.count for request in requests]
    assert server.free_pages == before
    again = [generate.Request(x.prompt, x.count) for x in reversed(requests)]
    assert served(server, again)[::-1] == tokens
    assert generate.traced == dict(admit=1, generate=1, release=1)
    # Another prefix gives other tokens: it is seen.
    other = generate.Server(
        weights, prefix[::-1], slots=2, pages=8, longest=12, quantization="int4"
    )
    assert served(other, [generate.Request(x.prompt, x.count) for x in requests]) != tokens


def test_tokens_are_those_of_the_model_without_a_cache(small):
    """In a format whose errors are small beside the distances of logits."""
    rows = QuantSpec()
    weights = generate.random_weights(3)
    prefix = np.arange(17) % generate.TOKENS
    formats = AttentionQuantization(None, rows, rows)
    server = generate.Server(weights, prefix, slots=2, pages=8, longest=12, quantization=formats)
    requests = generate.random_requests(2, 12, 12, seed=2)
    for request, tokens in zip(requests, served(server, requests), strict=True):
        known = np.concatenate([prefix, request.prompt, tokens])
        logits = uncached(weights, known)[len(prefix) + len(request.prompt) - 1 : -1]
        # What was chosen is as good as the best, but for rounding.
        chosen = logits[np.arange(len(tokens)), tokens]
        assert (logits.max(axis=1) - chosen < 0.05 * logits.std()).all()
        assert (logits.mean(axis=1) < chosen - logits.std()).all()


def uncached(weights, tokens):
    """The logits after each token, in float64."""
    w = {name: np.asarray(x, np.float64) for name, x in weights.items()}
    N, K, H, T = generate.HEADS, generate.KV_HEADS, generate.HEAD_DIM, len(tokens)

    def normalized(x):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    def rotated(x):
        half = H // 2
        angles = np.arange(T)[:, None, None] * 10000.0 ** (-np.arange(half) / half)
        a, b = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    x = w["embed"][tokens]
    for i in range(generate.LAYERS):
        y = normalized(x)
        query, key, value = (
            (y @ w[name][i]).reshape(T, -1, H) for name in ("query", "key", "value")
        )
        key, value = (np.repeat(each, N // K, axis=1) for each in (rotated(key), value))
        scores = np.einsum("tnh,snh->nts", rotated(query), key) / np.sqrt(H)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        x = x + np.einsum("nts,snh->tnh", p, value).reshape(T, -1) @ w["out"][i]
        up = normalized(x) @ w["up"][i]
        x = x + (up / (1 + np.exp(-up))) @ w["down"][i]
    return normalized(x) @ w["embed"].T
