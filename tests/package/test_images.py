"""The demo of image generation learns, and quantized attention draws what float attention draws."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from demo import digits, images, rectified_flow
from demo.image_model import (
    ImageModelConfig,
    initial_weights,
    rotary_angles,
    rotated,
    velocity,
)

SMALL = ImageModelConfig(
    rows=2, columns=3, patch_width=4, text_tokens=5, text_width=7, joint_blocks=1, single_blocks=1,
    heads=2, head_dim=16, rotary_width=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs():
    """Patches, times and text of two images."""
    rng = np.random.default_rng(0)
    patches = rng.standard_normal((2, SMALL.image_tokens, SMALL.patch_width), np.float32)
    text = rng.standard_normal((2, SMALL.text_tokens, SMALL.text_width), np.float32)
    return patches, np.array([0.3, 0.8], np.float32), text


@pytest.fixture(scope="module")
def flow():
    return jax.jit(
        lambda weights, *of: velocity(weights, SMALL, jax_gluon.dot_product_attention, *of)
    )


def test_the_digits_are_real_and_survive_patches():
    data = digits.load(16)
    whole = digits.images_of(data.patches)
    assert whole.shape == (1797, 16, 16)
    np.testing.assert_array_equal(digits.patches_of(whole), data.patches)
    # The second patch is the two pixels right of the first, in the same rows.
    np.testing.assert_array_equal(data.patches[0, 1], whole[0, :2, 2:4].ravel())
    assert (digits.read(whole) == data.labels).mean() > 0.95
    assert digits.text_of(np.array([1, 3])).argmax(-1).tolist() == [
        [digits.ALPHABET.index(letter) for letter in name] for name in ("one  ", "three")
    ]


def test_batches_of_digits_depend_on_the_seed_alone():
    data = digits.load(8)
    first, again, other = (next(data.batches(1, 9, seed)) for seed in (1, 1, 2))
    for x, y, z in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(x, y)
        assert (x != z).any()


def test_rotary_embeddings_tell_the_way_between_patches_and_nothing_of_text():
    rng = np.random.default_rng(1)
    query, key = (rng.standard_normal(SMALL.head_dim, np.float32) for _ in range(2))
    angles = rotary_angles(SMALL)
    same = np.broadcast_to(query, (1, SMALL.tokens, 1, SMALL.head_dim))
    queries = rotated(jnp.asarray(same), angles)[0, :, 0]
    keys = rotated(jnp.broadcast_to(key, same.shape), angles)[0, :, 0]
    np.testing.assert_array_equal(queries[: SMALL.text_tokens], same[0, : SMALL.text_tokens, 0])
    rows, columns = np.divmod(np.arange(SMALL.image_tokens), SMALL.columns)
    logits = np.asarray(queries @ keys.T)[SMALL.text_tokens :, SMALL.text_tokens :]
    found = {}
    for i, j in np.ndindex(*logits.shape):
        way = (rows[i] - rows[j], columns[i] - columns[j])
        np.testing.assert_allclose(logits[i, j], found.setdefault(way, logits[i, j]), atol=1e-5)
    assert len({f"{x:.4f}" for x in found.values()}) == len(found) == 15


def test_new_blocks_are_the_identity_and_every_weight_counts_later(flow, inputs):
    still = initial_weights(jax.random.key(0), SMALL)
    assert np.abs(flow(still, *inputs)).max() == 0
    weights = initial_weights(jax.random.key(0), SMALL, modulation=0.5, logits=4.0)
    cotangent = np.random.default_rng(2).standard_normal(inputs[0].shape, np.float32)
    gradients = jax.grad(lambda weights: (flow(weights, *inputs) * cotangent).sum())(weights)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(gradient).all(), name
        # Of every output: shifts, scales and gates are parts of one product.
        assert (np.abs(gradient).reshape(-1, gradient.shape[-1]).max(0) > 0).all(), name


def test_images_follow_their_own_text_and_time(flow, inputs):
    patches, time, text = inputs
    weights = initial_weights(jax.random.key(1), SMALL, modulation=0.5)
    expected = np.asarray(flow(weights, *inputs))
    # Letters have no position, so that their order means nothing to this model.
    shuffled = np.asarray(flow(weights, patches, time, text[:, ::-1].copy()))
    np.testing.assert_allclose(shuffled, expected, atol=1e-5)
    # One letter more and another less keep the mean, so that attention alone can tell.
    moved = text.copy()
    moved[0, 0] += 1
    moved[0, 1] -= 1
    changed = np.asarray(flow(weights, patches, time, moved))
    assert np.abs(changed[0] - expected[0]).max() > 1e-3
    np.testing.assert_allclose(changed[1], expected[1], atol=1e-5)
    later = np.asarray(flow(weights, patches, time + np.array([0, 0.1], np.float32), text))
    np.testing.assert_allclose(later[0], expected[0], atol=1e-5)
    assert np.abs(later[1] - expected[1]).max() > 1e-3


def test_the_sampler_walks_from_noise_to_image():
    moments = rectified_flow.times(5, 3.0)
    assert moments[0] == 1
    assert moments[-1] == 0
    assert (np.diff(moments) < 0).all()
    assert moments[1] > 0.8
    noise = np.random.default_rng(3).standard_normal((2, 3, 4), np.float32)
    # Straight ways are exact at any number of steps; x / t leads to 0 along one.
    sample = rectified_flow.sampler(lambda weights, x, time, text: x / time[:, None, None])
    path = sample(None, noise, None, steps=4)
    expected = noise * np.array([0.75, 0.5, 0.25, 0]).reshape(4, 1, 1, 1)
    np.testing.assert_allclose(path, expected, atol=1e-6)


def test_distances_are_those_of_their_definitions():
    x = np.array([1.0, -1.0, 2.0])
    found = rectified_flow.distances(x + 0.1, x, 2.0)
    assert found["psnr"] == pytest.approx(10 * np.log10(4 / 0.01))
    assert found["l1"] == pytest.approx(0.3 / 4)
    assert found["cosine"] == pytest.approx(6.2 / np.sqrt(6 * 6.43))
    assert rectified_flow.distances(x, x, 2.0)["psnr"] == np.inf


def test_a_short_run_learns_in_both_formats_and_draws_alike(tmp_path, capsys, monkeypatch):
    """The demo itself, in seconds, with fewer blocks, which take less to compile."""
    fewer = dataclasses.replace(images.model(8), joint_blocks=1, single_blocks=1)
    monkeypatch.setattr(images, "model", lambda side: fewer)
    path = tmp_path / "images.png"
    arguments = ["--steps", "60", "--side", "8", "--batch", "16", "--sampler-steps", "8"]
    assert images.main([*arguments, "--each", "1", "--output", str(path)]) == 0
    output = capsys.readouterr().out
    assert re.findall(r"forward \w+ in (float32|int8)", output) == ["float32", "int8"]
    losses = re.findall(r"^(\w+): loss ([\d.]+) at first, ([\d.]+) over", output, re.M)
    assert [name for name, *_ in losses] == ["float32", "INT8"]
    for _, first, last in losses:
        assert float(last) < 0.6 * float(first)
    assert float(losses[0][2]) == pytest.approx(float(losses[1][2]), rel=0.05)
    rows = re.findall(r"^\| (\d) of 8 \| ([\d.]+) dB \| ([\d.]+) \| ([\d.]+) dB", output, re.M)
    assert [int(step) for step, *_ in rows] == [1, 2, 4, 6, 8]
    for _, int8, cosine, int4 in rows:
        assert float(int8) > 40
        assert float(cosine) > 0.9995
        assert 25 < float(int4) < float(int8)
    assert path.read_bytes().startswith(b"\x89PNG")
