"""A transformer of joint image and text tokens that says where noise flows, in plain JAX.

Its blocks are those of FLUX: joint blocks, in which image and text have weights of their own and
share attention (https://arxiv.org/abs/2403.03206), then single blocks, in which all tokens share
weights and attention stands beside the MLP (https://arxiv.org/abs/2302.05442). Time and text
modulate every block (https://arxiv.org/abs/2212.09748), queries and keys have RMS norms, and
rotary embeddings tell rows and columns of the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

#: Query, key and value `[B, T, N, H]` to output `[B, T, N, H]`.
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Weights = dict[str, Any]


@dataclass(frozen=True)
class ImageModelConfig:
    """`patch_width` is the numbers in a patch, `text_width` those of a text token."""

    rows: int
    columns: int
    patch_width: int
    text_tokens: int
    text_width: int
    joint_blocks: int
    single_blocks: int
    heads: int
    head_dim: int
    mlp_ratio: int = 4
    rotary_width: int = 0  # of rows, and of columns; 0: all of the head dim

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def image_tokens(self) -> int:
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.image_tokens


def initial_weights(
    key: jax.Array, config: ImageModelConfig, *, modulation: float = 0.0, logits: float = 1.0,
    dtype: Any = jnp.float32,
) -> Weights:  # fmt: skip
    """Random weights; with `modulation` 0 every block is the identity, from which training starts.

    `modulation` is the standard deviation of shifts, scales and gates;
    `logits` is about that of the logits of attention.
    """
    width, hidden = config.width, config.mlp_ratio * config.width

    def linear(fan_in: int, fan_out: int, deviation: float = 1.0) -> Weights:
        nonlocal key
        key, own = jax.random.split(key)
        weight = jax.random.normal(own, (fan_in, fan_out), dtype) * (deviation / fan_in**0.5)
        return {"weight": weight.astype(dtype), "bias": jnp.zeros(fan_out)}

    def modulated(parts: int, fan_out: int = 0) -> Weights:
        # SiLU takes N(0, 1) to a root mean square of 0.6.
        return linear(width, parts * (fan_out or width), modulation / 0.6)

    def norms() -> Weights:
        return {
            name: jnp.full(config.head_dim, logits**0.5, jnp.float32) for name in ("query", "key")
        }

    def stream() -> Weights:
        return {
            "modulation": modulated(6), "qkv": linear(width, 3 * width), "norms": norms(),
            "out": linear(width, width), "up": linear(width, hidden), "down": linear(hidden, width),
        }  # fmt: skip

    def single() -> Weights:
        return {
            "modulation": modulated(3), "qkv": linear(width, 3 * width), "norms": norms(),
            "up": linear(width, hidden), "out": linear(width + hidden, width),
        }  # fmt: skip

    return {
        "image": linear(config.patch_width, width),
        "text": linear(config.text_width, width),
        "time": {"up": linear(256, width), "down": linear(width, width)},
        "pooled": linear(config.text_width, width),
        "joint": [{"image": stream(), "text": stream()} for _ in range(config.joint_blocks)],
        "single": [single() for _ in range(config.single_blocks)],
        "last": {
            "modulation": modulated(2),
            "velocity": linear(width, config.patch_width, float(modulation > 0)),
        },
    }


def velocity(
    weights: Weights, config: ImageModelConfig, attention: Attention, patches: jax.Array,
    time: jax.Array, text: jax.Array,
) -> jax.Array:  # fmt: skip
    """Where patches `[B, rows * columns, patch_width]` flow at time `[B]`, in their shape.

    Time 0 is the image, 1 is noise. `text` is `[B, text_tokens, text_width]`.
    """
    angles = rotary_angles(config)
    condition = linear(weights["time"]["down"], jax.nn.silu(
        linear(weights["time"]["up"], time_features(time))
    ))  # fmt: skip
    condition = jax.nn.silu(condition + linear(weights["pooled"], text.mean(1)))
    x, y = linear(weights["image"], patches), linear(weights["text"], text)
    for block in weights["joint"]:
        x, y = joint_block(block, config, attention, condition, x, y, angles)
    tokens = jnp.concatenate([y, x], axis=1)
    for block in weights["single"]:
        tokens = single_block(block, config, attention, condition, tokens, angles)
    x = tokens[:, config.text_tokens :]
    shift, scale = modulation(weights["last"]["modulation"], condition, 2)
    return linear(weights["last"]["velocity"], modulated(x, shift, scale))


def joint_block(
    block: Weights, config: ImageModelConfig, attention: Attention, condition: jax.Array,
    x: jax.Array, y: jax.Array, angles: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Image tokens `x` and text tokens `y` attend to both."""
    streams = {"text": y, "image": x}
    changes = {name: modulation(block[name]["modulation"], condition, 6) for name in streams}
    parts = [
        heads_of(block[name], config, modulated(streams[name], *changes[name][:2]))
        for name in streams
    ]
    query, key, value = (jnp.concatenate(both, axis=1) for both in zip(*parts, strict=True))
    out = attention(rotated(query, angles), rotated(key, angles), value)
    out = out.reshape(*out.shape[:2], config.width)
    attended = {"text": out[:, : config.text_tokens], "image": out[:, config.text_tokens :]}
    for name in streams:
        own, (_, _, gate, shift, scale, mlp_gate) = block[name], changes[name]
        z = streams[name] + gate * linear(own["out"], attended[name])
        hidden = jax.nn.gelu(linear(own["up"], modulated(z, shift, scale)))
        streams[name] = z + mlp_gate * linear(own["down"], hidden)
    return streams["image"], streams["text"]


def single_block(
    block: Weights, config: ImageModelConfig, attention: Attention, condition: jax.Array,
    tokens: jax.Array, angles: jax.Array,
) -> jax.Array:  # fmt: skip
    shift, scale, gate = modulation(block["modulation"], condition, 3)
    normal = modulated(tokens, shift, scale)
    query, key, value = heads_of(block, config, normal)
    out = attention(rotated(query, angles), rotated(key, angles), value)
    out = out.reshape(*out.shape[:2], config.width)
    hidden = jax.nn.gelu(linear(block["up"], normal))
    return tokens + gate * linear(block["out"], jnp.concatenate([out, hidden], axis=-1))


def heads_of(block: Weights, config: ImageModelConfig, x: jax.Array) -> tuple[jax.Array, ...]:
    """Query, key and value `[B, T, N, H]` of tokens, query and key at their norms."""
    qkv = linear(block["qkv"], x).reshape(*x.shape[:2], 3, config.heads, config.head_dim)

    def normalised(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale

    query, key = (normalised(qkv[:, :, i], block["norms"][name])
                  for i, name in enumerate(("query", "key")))  # fmt: skip
    return query, key, qkv[:, :, 2]


def linear(layer: Weights, x: jax.Array) -> jax.Array:
    """The product in the dtype of the weights, the sum and the result in float32."""
    weight = layer["weight"]
    product = jnp.dot(x.astype(weight.dtype), weight, preferred_element_type=jnp.float32)
    return product + layer["bias"]


def modulation(layer: Weights, condition: jax.Array, parts: int) -> list[jax.Array]:
    return jnp.split(linear(layer, condition)[:, None], parts, axis=-1)


def modulated(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Layer norm without weights of its own, then scale and shift."""
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x * (1 + scale) + shift


def time_features(time: jax.Array) -> jax.Array:
    """`[B, 256]`: waves of 1,000 times the time."""
    angle = 1000 * time[:, None] * 10_000.0 ** (-jnp.arange(128) / 128)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def rotary_angles(config: ImageModelConfig) -> jax.Array:
    """`[T, pairs]`: of text 0; of a patch those of its row, then those of its column."""
    pairs = (config.rotary_width or config.head_dim // 2) // 2
    frequency = 10_000.0 ** (-jnp.arange(pairs) / pairs)
    rows, columns = jnp.divmod(jnp.arange(config.image_tokens), config.columns)
    of_image = jnp.stack([rows, columns], axis=1)[:, :, None] * frequency
    of_text = jnp.zeros((config.text_tokens, 2 * pairs))
    return jnp.concatenate([of_text, of_image.reshape(-1, 2 * pairs)])


def rotated(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotary embedding of the last elements of `[B, T, N, H]`, as many as there are angles for."""
    pairs = angles.shape[1]
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    still, left, right = jnp.split(x, [x.shape[-1] - 2 * pairs, x.shape[-1] - pairs], axis=-1)
    return jnp.concatenate([still, left * cos - right * sin, right * cos + left * sin], axis=-1)
