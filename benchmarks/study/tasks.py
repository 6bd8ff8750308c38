"""What is trained: a decoder of text and a rectified flow of digits, each in two sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.study.formats import Attention
from demo import digits, image_model, rectified_flow, training
from demo import text as demo_text
from demo.image_model import ImageModelConfig
from demo.model import LanguageModel, ModelConfig

Batch = tuple[Any, ...]
Loss = Callable[..., jax.Array]

DECODERS = {
    "small": dict(length=128, layers=2, heads=2, kv_heads=1, head_dim=32),
    "large": dict(length=256, layers=4, heads=4, kv_heads=2, head_dim=32),
}
FLOWS = {
    "small": dict(joint_blocks=1, single_blocks=1, heads=2, head_dim=32),
    "large": dict(joint_blocks=2, single_blocks=2, heads=4, head_dim=32),
}
HELD_OUT_SEED = 1000  # not that of any run
SIDE = 16  # pixels of a digit


@dataclass(frozen=True)
class Task:
    """`loss_in(attention)` is a function of weights and a batch; `batches` are those of a run."""

    weights: Any
    loss_in: Callable[[Attention], Loss]
    batches: Iterator[Batch]
    held_out: list[Batch]
    learning_rate: float


def decoder(size: str, seed: int, steps: int) -> Task:
    """Characters of CPython's documentation; the last twentieth is held out."""
    learned, held_out = demo_text.load().split(0.05)
    length = DECODERS[size]["length"]
    batch = 1024 // length

    def model(**keywords: Any) -> LanguageModel:
        config = ModelConfig(vocabulary=len(learned.alphabet), **DECODERS[size], **keywords)
        return LanguageModel(config, nnx.Rngs(seed))

    def loss_in(attention: Attention) -> Loss:
        graph, _ = nnx.split(nnx.eval_shape(lambda: model(attention=attention)))
        return lambda weights, codes: training.loss_of(nnx.merge(graph, weights), codes)

    return Task(
        nnx.state(model()), loss_in,
        ((x,) for x in learned.batches(steps, batch, length, seed)),
        [(x,) for x in held_out.batches(8, batch, length, HELD_OUT_SEED)],
        learning_rate=3e-3,
    )  # fmt: skip


def flow(size: str, seed: int, steps: int) -> Task:
    """Digits from their names; the last 256 are held out, with noise and times of their own."""
    learned, held_out = digits.load(SIDE).split(256)
    config = ImageModelConfig(
        rows=SIDE // digits.PATCH, columns=SIDE // digits.PATCH, patch_width=digits.PATCH**2,
        text_tokens=digits.NAME_LENGTH, text_width=len(digits.ALPHABET), **FLOWS[size],
    )  # fmt: skip

    def loss_in(attention: Attention) -> Loss:
        def velocity(weights: Any, *of: jax.Array) -> jax.Array:
            return image_model.velocity(weights, config, attention, *of)

        return lambda weights, *batch: rectified_flow.loss_of(weights, velocity, *batch)

    def keyed(batches: Iterator[tuple[np.ndarray, np.ndarray]], own: int) -> Iterator[Batch]:
        key = jax.random.key(own)
        for i, batch in enumerate(batches):
            yield jax.random.fold_in(key, i), *batch

    text = digits.text_of(held_out.labels)
    parts = [(held_out.patches[i : i + 64], text[i : i + 64]) for i in range(0, 256, 64)]
    return Task(
        image_model.initial_weights(jax.random.key(seed), config), loss_in,
        keyed(learned.batches(steps, 16, seed), seed),
        list(keyed(iter(parts), HELD_OUT_SEED)),
        learning_rate=2e-3,
    )  # fmt: skip


MODELS: dict[str, Callable[[str, int, int], Task]] = {"decoder": decoder, "flow": flow}
SIZES = tuple(DECODERS)
