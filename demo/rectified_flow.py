"""Training and sampling of rectified flows (https://arxiv.org/abs/2209.03003)."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

#: Weights, patches, time and text to the velocity of patches.
Velocity = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


def loss_of(
    weights: Any, velocity: Velocity, key: jax.Array, images: jax.Array, text: jax.Array
) -> jax.Array:
    """Mean squared error of the velocity, at times and in noise that `key` gives."""
    of_time, of_noise = jax.random.split(key)
    # More of the middle, where the flow is hardest (https://arxiv.org/abs/2403.03206).
    time = jax.nn.sigmoid(jax.random.normal(of_time, images.shape[:1]))
    noise = jax.random.normal(of_noise, images.shape)
    between = images + time[:, None, None] * (noise - images)
    return jnp.mean((velocity(weights, between, time, text) - (noise - images)) ** 2)


def train(
    velocity: Velocity, weights: Any, batches: Iterable[tuple[np.ndarray, np.ndarray]], *,
    steps: int, seed: int, name: str,
) -> tuple[Any, np.ndarray]:  # fmt: skip
    """An average of the weights over the last steps, and the loss of every step.

    Noise and times depend on `seed` alone, so that runs differ in `velocity` only.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, max(1, steps // 20), steps, 1e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(weights, average, state, key, images, text):
        loss, gradients = jax.value_and_grad(loss_of)(weights, velocity, key, images, text)
        updates, state = optimizer.update(gradients, state, weights)
        weights = optax.apply_updates(weights, updates)
        average = optax.incremental_update(weights, average, max(1e-2, 10 / steps))
        return weights, average, state, loss

    weights, average = (jax.tree.map(jnp.copy, weights) for _ in range(2))
    state, key, losses = optimizer.init(weights), jax.random.key(seed), []
    progress = tqdm(batches, desc=name, total=steps, unit="step", file=sys.stdout, mininterval=1.0)
    for i, (images, text) in enumerate(progress):
        weights, average, state, loss = step(
            weights, average, state, jax.random.fold_in(key, i), images, text
        )
        losses.append(float(loss))
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return average, np.array(losses)


def times(steps: int, shift: float = 1.0) -> np.ndarray:
    """`[steps + 1]` from 1 to 0; a `shift` over 1 leaves more steps near the noise."""
    even = np.linspace(1, 0, steps + 1)
    return shift * even / (1 + (shift - 1) * even)


def sampler(velocity: Velocity) -> Callable[..., np.ndarray]:
    """Euler's method, compiled once for any number of steps.

    `sample(weights, noise, text, steps)` goes from noise `[B, patches, patch_width]` to an image:
    `[steps, *noise.shape]`.
    """

    @jax.jit
    def step(weights, x, start, end, text):
        time = jnp.full(x.shape[:1], start)
        return x + (end - start) * velocity(weights, x, time, text)

    def sample(weights: Any, noise: Any, text: Any, steps: int) -> np.ndarray:
        x, path = jnp.asarray(noise), []
        for start, end in itertools.pairwise(times(steps)):
            x = step(weights, x, start, end, text)
            path.append(np.asarray(x))
        return np.stack(path)

    return sample


def distances(found: np.ndarray, expected: np.ndarray, peak: float) -> dict[str, float]:
    """Peak signal-to-noise ratio in dB, cosine and relative L1."""
    found, expected = (x.astype(np.float64).ravel() for x in (found, expected))
    error = found - expected
    square = float(np.mean(error**2))
    return {
        "psnr": 10 * float(np.log10(peak**2 / square)) if square else float("inf"),
        "cosine": float(found @ expected / np.sqrt((found @ found) * (expected @ expected))),
        "l1": float(np.abs(error).sum() / np.abs(expected).sum()),
    }
