"""Serve a language model from one paged cache: `python -m examples.generate`.

Sequences of unlike lengths are generated side by side, in `lax.scan`. All begin with the same
prefix, of which the cache has one copy. A slot whose sequence has ended is given to the next
request, between scans, by the programs that are compiled already. The model's weights are random:
what counts is that a sequence is the same, bit for bit, whoever is generated beside it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_gluon import PagedKVCache

TOKENS, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 128, 2, 8, 2, 32
Weights = dict[str, jax.Array]
Caches = list[PagedKVCache]  # one for each layer
#: How often each program was traced, which is how often it was compiled.
traced: collections.Counter[str] = collections.Counter()


def random_weights(seed: int = 0) -> Weights:
    """Of a small transformer decoder; the layers are along the first axis."""
    rows, of_keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {
        "embed": (TOKENS, WIDTH), "query": (LAYERS, WIDTH, rows), "key": (LAYERS, WIDTH, of_keys),
        "value": (LAYERS, WIDTH, of_keys), "out": (LAYERS, rows, WIDTH),
        "up": (LAYERS, WIDTH, 4 * WIDTH), "down": (LAYERS, 4 * WIDTH, WIDTH),
    }  # fmt: skip
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jax.random.normal(key, shape) / shape[-2] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def normalized(x: jax.Array) -> jax.Array:
    """Rows of mean square 1."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def rotated(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary embedding of `[B, T, N, H]` at positions `[B, T]`."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * 10000.0 ** (-jnp.arange(half) / half)
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def decoded(
    weights: Weights, caches: Caches, tokens: jax.Array, starts: jax.Array
) -> tuple[Caches, jax.Array]:
    """The caches with more tokens `[B, T]`, and the logits after the last of them.

    Those before `starts` (int32 `[B]`) are padding. Layers are not scanned over: a scan would copy
    each cache out of its stack and back.
    """
    B, T = tokens.shape
    places = jnp.arange(T)[None, :] - starts[:, None]
    x = weights["embed"][tokens]

    grown: Caches = []
    for i, cache in enumerate(caches):
        w = {name: of_layers[i] for name, of_layers in weights.items() if name != "embed"}
        positions = cache.length[:, None] + places
        y = normalized(x)
        query, key, value = (
            (y @ w[name]).reshape(B, T, -1, HEAD_DIM) for name in ("query", "key", "value")
        )
        cache = cache.append(rotated(key, positions), value, starts=starts)
        attended = cache.attention(rotated(query, positions))
        x = x + attended.reshape(B, T, -1) @ w["out"]
        x = x + jax.nn.silu(normalized(x) @ w["up"]) @ w["down"]
        grown.append(cache)
    return grown, normalized(x[:, -1]) @ weights["embed"].T


@functools.partial(jax.jit, donate_argnums=1)
def admit(
    weights: Weights, caches: Caches, prompts: jax.Array, starts: jax.Array, prefix: jax.Array
) -> tuple[Caches, jax.Array]:
    """Prompts `[B, T]`, padded at the left, for some slots; others have nothing but padding.

    `prefix` (int32 `[B]`) is the slot that each has its tokens from: its own, or that of a prefix.
    Returns the first token of each.
    """
    traced["admit"] += 1
    caches = [cache.select(prefix) for cache in caches]
    caches, logits = decoded(weights, caches, prompts, starts)
    return caches, jnp.argmax(logits, axis=-1)


@functools.partial(jax.jit, static_argnums=4, donate_argnums=1)
def generate(
    weights: Weights, caches: Caches, token: jax.Array, left: jax.Array, steps: int
) -> tuple[Caches, jax.Array]:
    """Some steps of all slots that have tokens left: the tokens, int32 `[steps, B]`."""
    traced["generate"] += 1

    def step(state: Any, i: jax.Array) -> tuple[Any, jax.Array]:
        caches, token = state
        is_idle = (i >= left).astype(jnp.int32)  # all of its one token is padding
        caches, logits = decoded(weights, caches, token[:, None], is_idle)
        token = jnp.where(is_idle, token, jnp.argmax(logits, axis=-1))
        return (caches, token), token

    (caches, _), tokens = jax.lax.scan(step, (caches, token), jnp.arange(steps))
    return caches, tokens


@functools.partial(jax.jit, donate_argnums=0)
def release(caches: Caches, is_done: jax.Array) -> Caches:
    """The caches without the tokens of slots whose sequence has ended."""
    traced["release"] += 1
    return [cache.reset(is_done) for cache in caches]


@dataclasses.dataclass
class Request:
    """A prompt, and how many tokens are to follow it."""

    prompt: np.ndarray[Any, np.dtype[np.int32]]
    count: int
    tokens: list[int] = dataclasses.field(default_factory=list[int])


class Server:
    """Slots that requests are put into, behind a prefix that slot 0 keeps."""

    def __init__(
        self, weights: Weights, prefix: np.ndarray[Any, Any], *, slots: int, pages: int,
        longest: int, quantization: Any = "int8", steps: int = 8,
    ) -> None:  # fmt: skip
        self.weights, self.longest, self.steps = weights, longest, steps
        self.slots: list[Request | None] = [None] * (slots + 1)
        sizes = slots + 1, pages, KV_HEADS, HEAD_DIM
        self.caches = [
            PagedKVCache.create(*sizes, page_size=32, quantization=quantization)
            for _ in range(LAYERS)
        ]
        for start in range(0, len(prefix), longest):
            self._admit({0: prefix[start : start + longest]}, {})

    def _admit(self, prompts: dict[int, Any], prefixes: dict[int, int]) -> np.ndarray[Any, Any]:
        B = len(self.slots)
        tokens, starts = np.zeros((B, self.longest), np.int32), np.full(B, self.longest)
        prefix = np.arange(B)
        for slot, prompt in prompts.items():
            starts[slot] -= len(prompt)
            tokens[slot, starts[slot] :] = prompt
            prefix[slot] = prefixes.get(slot, slot)
        self.caches, first = admit(
            self.weights, self.caches, *(jnp.asarray(x, jnp.int32) for x in (tokens, starts)),
            jnp.asarray(prefix, jnp.int32),
        )  # fmt: skip
        return np.asarray(first)

    def serve(self, requests: list[Request]) -> None:
        """Generate all of them: as many at a time as there are slots."""
        waiting = collections.deque(requests)
        while waiting or any(self.slots):
            free = [i for i, busy in enumerate(self.slots) if i and busy is None]
            taken = {slot: waiting.popleft() for slot in free[: len(waiting)]}
            if taken:
                prompts = {slot: request.prompt for slot, request in taken.items()}
                first = self._admit(prompts, dict.fromkeys(taken, 0))
                for slot, request in taken.items():
                    self.slots[slot] = request
                    request.tokens.append(int(first[slot]))
            self._generate()

    def _generate(self) -> None:
        last = [request.tokens[-1] if request else 0 for request in self.slots]
        left = [request.count - len(request.tokens) if request else 0 for request in self.slots]
        arrays = (jnp.asarray(x, jnp.int32) for x in (last, left))
        self.caches, tokens = generate(self.weights, self.caches, *arrays, self.steps)
        is_done = np.zeros(len(self.slots), bool)
        for slot, request in enumerate(self.slots):
            if request:
                count = min(left[slot], self.steps)
                request.tokens += [int(x) for x in np.asarray(tokens[:count, slot])]
                is_done[slot] = len(request.tokens) == request.count
                self.slots[slot] = None if is_done[slot] else request
        self.caches = release(self.caches, jnp.asarray(is_done))

    @property
    def free_pages(self) -> int:
        """Of each layer."""
        return int(self.caches[0].free_pages)


def random_requests(count: int, longest: int, most: int, seed: int = 0) -> list[Request]:
    """Prompts and answers of all lengths."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            rng.integers(0, TOKENS, rng.integers(1, longest + 1)).astype(np.int32),
            int(rng.integers(1, most + 1)),
        )
        for _ in range(count)
    ]


def main(arguments: list[str] | None = None) -> None:
    """Serve requests, and each again by itself."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quantization", default="int8", choices=("int8", "int4"))
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--prefix", type=int, default=100, help="tokens that all begin with")
    parser.add_argument("--longest", type=int, default=24, help="tokens of a prompt")
    parser.add_argument("--most", type=int, default=48, help="tokens of an answer")
    given = parser.parse_args(arguments)
    weights = random_weights()
    prefix = np.random.default_rng(1).integers(0, TOKENS, given.prefix)
    pages = given.slots * 8 + -(-given.prefix // 32)
    serve = functools.partial(
        Server, weights, prefix, slots=given.slots, pages=pages, longest=given.longest,
        quantization=given.quantization,
    )  # fmt: skip
    together = random_requests(given.requests, given.longest, given.most)
    server = serve()
    before, start = server.free_pages, time.perf_counter()
    server.serve(together)
    seconds = time.perf_counter() - start
    count = sum(len(request.tokens) for request in together)
    print(f"{given.requests} requests in {given.slots} slots: {count} tokens in {seconds:.1f} s")
    print(f"pages of {pages} that are free: {before} before, {server.free_pages} after")
    print(f"programs compiled: {dict(traced)}")
    if set(traced.values()) != {1} or server.free_pages != before:
        raise SystemExit("a program was compiled again, or a page was lost")
    for request in together:
        alone = Request(request.prompt, request.count)
        server.serve([alone])
        if alone.tokens != request.tokens:
            raise SystemExit("a sequence depends on those beside it")
    print("each sequence is the same, token for token, generated alone")


if __name__ == "__main__":
    main()
