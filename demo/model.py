"""A decoder language model in flax.nnx whose attention is `jax_gluon.dot_product_attention`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
from flax import nnx

import jax_gluon
from demo.rotary import rotated


@dataclass(frozen=True)
class ModelConfig:
    vocabulary: int
    length: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    quantization: str | jax_gluon.AttentionQuantization | None = None
    implementation: str | None = None
    attention: Callable[..., jax.Array] = jax_gluon.dot_product_attention

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class Attention(nnx.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        def project(heads: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                config.width, (heads, config.head_dim), use_bias=False, rngs=rngs
            )

        self.query = project(config.heads)
        self.key = project(config.kv_heads)
        self.value = project(config.kv_heads)
        self.out = nnx.LinearGeneral(
            (config.heads, config.head_dim), config.width, axis=(-2, -1), use_bias=False, rngs=rngs
        )
        self.attention = config.attention
        self.quantization = config.quantization
        self.implementation = config.implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        out = self.attention(
            rotated(self.query(x)), rotated(self.key(x)), self.value(x),
            is_causal=True, quantization=self.quantization,
            implementation=self.implementation,
        )  # fmt: skip
        return self.out(out)


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.up = nnx.Linear(config.width, 4 * config.width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * config.width, config.width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class LanguageModel(nnx.Module):
    """Token codes int32 `[B, T]` to logits float32 `[B, T, vocabulary]`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.embed = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, config.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, codes: jax.Array) -> jax.Array:
        x = self.embed(codes)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
