"""Training and sampling of the demo's model."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import jax_gluon
from demo.model import LanguageModel, ModelConfig
from demo.text import Text


@dataclass(frozen=True)
class Run:
    """What a training run leaves: `losses` float `[steps]` in nats per character."""

    losses: np.ndarray
    tokens_per_second: float
    custom_calls: list[str]
    initial_state: Any
    model: LanguageModel


def loss_of(model: LanguageModel, codes: jax.Array) -> jax.Array:
    """Mean over the characters that follow others in int32 `[B, length + 1]`, in nats."""
    logits = model(codes[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, codes[:, 1:]).mean()


def train(text: Text, config: ModelConfig, *, name: str, steps: int, batch: int, seed: int) -> Run:
    """Trains a model made from `seed`; the batches depend on `seed` alone as well."""
    graph, state = nnx.split(LanguageModel(config, nnx.Rngs(seed)))
    initial_state = jax.tree.map(np.asarray, state)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps, 1e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    def step(state, optimizer_state, codes):
        loss, gradients = jax.value_and_grad(lambda x: loss_of(nnx.merge(graph, x), codes))(state)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, state)
        return optax.apply_updates(state, updates), optimizer_state, loss

    optimizer_state = optimizer.init(state)
    example = jax.ShapeDtypeStruct((batch, config.length + 1), jnp.int32)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(state, optimizer_state, example).compile()
    losses = []
    start = time.perf_counter()
    batches = text.batches(steps, batch, config.length, seed)
    progress = tqdm(batches, desc=name, total=steps, unit="step", file=sys.stdout, mininterval=1.0)
    for codes in progress:
        state, optimizer_state, loss = compiled(state, optimizer_state, codes)
        losses.append(float(loss))
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    seconds = time.perf_counter() - start
    return Run(
        np.array(losses),
        steps * batch * config.length / seconds,
        custom_calls(compiled.as_text()),
        initial_state,
        nnx.merge(graph, state),
    )


def custom_calls(hlo: str) -> list[str]:
    """The lines of compiled HLO that call the plugin."""
    return [line.strip() for line in hlo.splitlines() if 'custom_call_target="jax_gluon.' in line]


def kernels_that_ran() -> list[str]:
    """Of the passes since it was last asked, or the kernels were."""
    return sorted({f"{x['pass']} {x['kernel']} in {x['arithmetic']}" for x in
                   jax_gluon.debug.kernels()})  # fmt: skip


def sample(run: Run, text: Text, config: ModelConfig, *, prompt: str, count: int, seed: int) -> str:
    """Continues `prompt` by `count` characters, drawn at temperature 0.7."""

    @jax.jit
    def next_code(codes, position, key):
        logits = run.model(codes[None])[0, position]
        return jax.random.categorical(key, logits / 0.7)

    codes = np.zeros(config.length, np.int32)
    written = text.encode(prompt)
    for key in jax.random.split(jax.random.key(seed), count):
        window = written[-config.length :]
        codes[: len(window)] = window
        written = np.append(written, int(next_code(codes, len(window) - 1, key)))
    return text.decode(written)


def peak_memory() -> float:
    """Most memory that this process has held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
