"""The training text: the English of CPython's own documentation topics, as characters."""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data.topics import topics

import numpy as np


@dataclass(frozen=True)
class Text:
    """`codes` int32 `[characters]` index `alphabet`."""

    alphabet: str
    codes: np.ndarray

    def split(self, part: float) -> tuple[Text, Text]:
        """The text without its last `part`, and that."""
        at = len(self.codes) - round(part * len(self.codes))
        return Text(self.alphabet, self.codes[:at]), Text(self.alphabet, self.codes[at:])

    def encode(self, text: str) -> np.ndarray:
        index = {character: code for code, character in enumerate(self.alphabet)}
        return np.array([index[character] for character in text], np.int32)

    def decode(self, codes: np.ndarray) -> str:
        return "".join(self.alphabet[code] for code in codes)

    def batches(self, steps: int, batch: int, length: int, seed: int):
        """`steps` batches int32 `[batch, length + 1]` of random excerpts, the same for a seed."""
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            starts = rng.integers(0, len(self.codes) - length - 1, batch)
            yield np.stack([self.codes[start : start + length + 1] for start in starts])


def load() -> Text:
    """`pydoc_data.topics` ships inside CPython: some 700,000 characters about the language."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    # Rare characters would cost vocabulary and teach nothing.
    text = "".join(character for character in text if character == "\n" or " " <= character <= "~")
    alphabet = "".join(sorted(set(text)))
    index = np.zeros(128, np.int32)
    index[[ord(character) for character in alphabet]] = np.arange(len(alphabet))
    return Text(alphabet, index[np.frombuffer(text.encode("ascii"), np.uint8)])
