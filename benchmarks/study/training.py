"""One run: trained from a seed, with what is recorded on the way."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jax_gluon
from benchmarks import report
from benchmarks.study.formats import ALL, CASES, Format, attention
from benchmarks.study.tasks import MODELS, Task
from demo.training import kernels_that_ran

HELD_OUT_POINTS = 12
GRADIENT_POINTS = 6


@dataclass(frozen=True)
class Settings:
    """All that a run's result depends on, machine and versions aside."""

    model: str
    size: str
    format: str
    seed: int
    steps: int
    case: str = "plain"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def name(self) -> str:
        parts = (self.model, self.size, self.format, self.case, f"seed {self.seed}")
        return ", ".join(part for part in parts if part != "plain")


def points(steps: int, count: int) -> set[int]:
    """`count` steps, evenly, of which the last is the end."""
    return {round(steps * (i + 1) / count) for i in range(count)}


def train(settings: Settings) -> dict[str, Any]:
    """The run's record: JSON numbers and lists of them."""
    task = MODELS[settings.model](settings.size, settings.seed, settings.steps)
    case, form = CASES[settings.case], ALL[settings.format]
    loss = task.loss_in(attention(form, case))
    exact = task.loss_in(attention(Format(), case))
    steps = settings.steps
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, task.learning_rate, max(1, steps // 20), steps, task.learning_rate / 100
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    @jax.jit
    def step(weights: Any, state: Any, batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(weights, *batch)
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state, value

    held_out = jax.jit(loss)
    compare = jax.jit(lambda weights, batch: compared(loss, exact, weights, batch))
    weights, state = task.weights, optimizer.init(task.weights)
    losses: list[jax.Array] = []
    held, gradients = [[0, mean(held_out, weights, task)]], []
    at_held, at_gradient = points(steps, HELD_OUT_POINTS), points(steps, GRADIENT_POINTS)
    start, trained, kernels = time.perf_counter(), 0.0, []
    jax_gluon.debug.kernels()
    for i, batch in enumerate(
        tqdm(task.batches, desc=settings.name, total=steps, mininterval=5), 1
    ):
        if settings.format != "float32" and i in at_gradient:
            gradients.append([i, *(float(x) for x in compare(weights, batch))])
        before = time.perf_counter()
        weights, state, value = step(weights, state, batch)
        losses.append(value)
        if i == 1:
            jax.block_until_ready(weights)
            kernels = kernels_that_ran()
        if i % 50 == 0:
            jax.block_until_ready(weights)
        trained += time.perf_counter() - before
        if i in at_held:
            held.append([i, mean(held_out, weights, task)])
    return {
        "settings": settings.to_json(),
        "weights": sum(x.size for x in jax.tree.leaves(task.weights)),
        "loss": smooth(np.array(losses)),
        "held_out": held,
        "held_out_in_float32": mean(jax.jit(exact), weights, task),
        "gradients": gradients,
        "seconds": {"training": trained, "all": time.perf_counter() - start},
        "kernels": kernels,
        "machine": report.machine() | {"python": platform.python_version()},
    }


def compared(
    loss: Callable[..., jax.Array], exact: Callable[..., jax.Array], weights: Any, batch: Any
) -> tuple[jax.Array, ...]:
    """Cosine and norm ratio of the gradient to `exact`'s at the same weights and batch.

    Of all weights, then of those by which queries and keys are made: the ones that gradients of
    codes reach.
    """
    found, expected = (jax.grad(f)(weights, *batch) for f in (loss, exact))
    return *alike(found, expected, lambda _: True), *alike(found, expected, is_of_logits)


def is_of_logits(path: Any) -> bool:
    name = jax.tree_util.keystr(path)
    return any(part in name for part in ("query", "key", "qkv"))


def alike(found: Any, expected: Any, counts: Callable[[Any], bool]) -> tuple[jax.Array, jax.Array]:
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    chosen = [(x, y) for (path, x), y in pairs if counts(path)]
    x_y = sum(jnp.vdot(x, y) for x, y in chosen)
    x_x, y_y = (sum(jnp.vdot(pair[i], pair[i]) for pair in chosen) for i in (0, 1))
    return x_y / jnp.sqrt(x_x * y_y), jnp.sqrt(x_x / y_y)


def mean(loss: Callable[..., jax.Array], weights: Any, task: Task) -> float:
    return float(np.mean([loss(weights, *batch) for batch in task.held_out]))


def smooth(losses: np.ndarray, parts: int = 50) -> list[float]:
    """Means over `parts` stretches of the steps."""
    return [float(x.mean()) for x in np.array_split(losses, min(parts, len(losses)))]
