"""Images to learn from: the handwritten digits that come with scikit-learn, and their names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.svm import SVC

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ALPHABET = " " + "".join(sorted(set("".join(NAMES))))
NAME_LENGTH = max(map(len, NAMES))
PATCH = 2


@dataclass(frozen=True)
class Digits:
    """`patches` float32 `[images, (side / 2)^2, 4]` in [-1, 1]; `labels` int `[images]`."""

    patches: np.ndarray
    labels: np.ndarray

    def split(self, count: int) -> tuple[Digits, Digits]:
        """All but the last `count` images, and those."""
        return (
            Digits(self.patches[:-count], self.labels[:-count]),
            Digits(self.patches[-count:], self.labels[-count:]),
        )

    def batches(self, steps: int, batch: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Patches and text of random images, the same for a seed."""
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            index = rng.integers(0, len(self.labels), batch)
            yield self.patches[index], text_of(self.labels[index])


def load(side: int) -> Digits:
    """All 1,797 digits, enlarged from 8 x 8 to `side` x `side` pixels."""
    data = load_digits()
    images = jnp.asarray(data.images, jnp.float32) / 8 - 1
    images = jax.image.resize(images, (len(images), side, side), "cubic").clip(-1, 1)
    return Digits(patches_of(np.asarray(images)), np.asarray(data.target))


def text_of(labels: np.ndarray) -> np.ndarray:
    """The English names of digits, a one-hot token a letter: float32 `[B, 5, letters]`."""
    letters = [[ALPHABET.index(x) for x in NAMES[label].ljust(NAME_LENGTH)] for label in labels]
    return np.eye(len(ALPHABET), dtype=np.float32)[np.array(letters)]


def patches_of(images: np.ndarray) -> np.ndarray:
    """`[B, side, side]` to `[B, (side / 2)^2, 4]`."""
    parts = images.shape[1] // PATCH
    split = images.reshape(-1, parts, PATCH, parts, PATCH)
    return split.transpose(0, 1, 3, 2, 4).reshape(-1, parts**2, PATCH**2)


def images_of(patches: np.ndarray) -> np.ndarray:
    """The inverse of `patches_of`."""
    parts = round(patches.shape[1] ** 0.5)
    split = patches.reshape(-1, parts, parts, PATCH, PATCH)
    return split.transpose(0, 1, 3, 2, 4).reshape(-1, parts * PATCH, parts * PATCH)


def read(images: np.ndarray) -> np.ndarray:
    """Which digits a classifier, fitted to the real ones, sees in `[B, side, side]`."""
    data = load_digits()
    classifier = SVC(gamma=0.001).fit(data.data, data.target)
    part = images.shape[1] // 8
    small = images.reshape(-1, 8, part, 8, part).mean((2, 4))
    return classifier.predict(8 * (small.reshape(-1, 64).clip(-1, 1) + 1))
