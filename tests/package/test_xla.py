"""The XLA implementation: its results against the oracle's, its memory, and what it skips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon._problem import EMPTY_ROW_LOG_SUM_EXP, AttentionOperands, AttentionProblem
from jax_gluon._xla import attention as xla
from jax_gluon._xla import tiles as xla_tiles
from jax_gluon._xla import visible
from tests.support.arrays import placed


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16, so that small shapes have many, the last of them short."""
    for name in ("_QUERY_BLOCK", "_KEY_CHUNK", "_MIN_QUERY_BLOCK"):
        monkeypatch.setattr(xla_tiles, name, 16)


@pytest.fixture
def float64(configure):
    with configure(jax_enable_x64=True):
        yield


def draw(seed=0, *, B=2, T=37, S=53, N=4, K=2, H=5, V=7, dtype=np.float64):
    """query, key, value, and cotangents of the output and of the log-sum-exp."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V), (B, T, N, V), (B, T, N)
    return tuple(placed(rng.standard_normal(shape), dtype) for shape in shapes)


def random_mask(*shape, seed=1):
    return np.random.default_rng(seed).random(shape) < 0.6


def random_bias(*shape, seed=2):
    return np.random.default_rng(seed).standard_normal(shape)


def lengths(*values):
    return np.array(values, np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_with(blocks, problem, operands, d_out, d_log_sum_exp):
    del blocks  # part of what jit looks up
    out, row_maximum, log_sum = xla.forward(problem, operands)
    cotangents = (out, row_maximum, log_sum, d_out, d_log_sum_exp)
    gradients = xla.backward(problem, operands, *cotangents)
    if operands.bias is not None:
        gradients += (xla.backward_bias(problem, operands, *cotangents),)
    return (out, row_maximum, log_sum), gradients


def run(problem, operands, d_out, d_log_sum_exp=None):
    """(out, row_maximum, log_sum), then the gradients of query, key, value and any bias."""
    blocks = (xla_tiles._QUERY_BLOCK, xla_tiles._KEY_CHUNK)
    return run_with(blocks, problem, operands, d_out, d_log_sum_exp)


def log_sum_exp_of(row_maximum, log_sum):
    is_empty = log_sum == EMPTY_ROW_LOG_SUM_EXP
    return np.where(is_empty, -np.inf, np.asarray(row_maximum) + np.asarray(log_sum))


def keywords(problem, operands):
    """The problem as both oracles take it."""
    return {
        "scale": problem.scale,
        "is_causal": problem.is_causal,
        "query_seq_lengths": operands.query_seq_lengths,
        "key_value_seq_lengths": operands.key_value_seq_lengths,
        "local_window_size": problem.local_window,
        "logits_soft_cap": problem.soft_cap,
    }


# shape: what `draw` takes; B2 T37 S53 N4 K2 H5 V7 where not given.
CASES = {
    "plain": {"shape": {"K": 4}},
    "even_blocks": {"shape": {"T": 32, "S": 48}, "is_causal": True},
    "one_block": {"shape": {"T": 3, "S": 5}, "is_causal": True},
    "causal_short_query": {"is_causal": True},
    "causal_long_query": {"shape": {"T": 53, "S": 37, "K": 1}, "is_causal": True},
    "window": {"local_window": (9, 4)},
    "window_left_0_beyond_keys": {"shape": {"T": 70, "S": 20}, "local_window": (0, 18)},
    "window_causal": {"local_window": (20, 2**31 - 1), "is_causal": True},
    "mask_by_batch": {"mask": random_mask(2, 1, 37, 53)},
    "mask_by_head_and_key": {"mask": random_mask(1, 4, 1, 53)},
    "mask_by_row": {"mask": random_mask(2, 1, 37, 1)},
    "bias_full": {"bias": random_bias(2, 4, 37, 53)},
    "bias_by_position": {"bias": random_bias(1, 1, 37, 53), "is_causal": True},
    "bias_by_key": {"bias": random_bias(2, 4, 1, 53)},
    "bias_by_row": {"bias": random_bias(2, 1, 37, 1), "local_window": (3, 3)},
    "bias_by_head": {"bias": random_bias(1, 4, 1, 1)},
    "bias_hides": {"bias": np.where(random_mask(1, 4, 37, 53), random_bias(1, 4, 37, 53), -np.inf)},
    "soft_cap": {"soft_cap": 1.5, "bias": np.where(random_mask(1, 1, 37, 53), 0.5, -np.inf)},
    "scale_0": {"scale": 0.0, "is_causal": True},
    "scale_negative": {"scale": -0.8},
    "lengths": {
        "query_seq_lengths": lengths(20, 1000),
        "key_value_seq_lengths": lengths(-(2**31), 40),
    },
    "all_empty": {"key_value_seq_lengths": lengths(0, -5), "bias": random_bias(1, 1, 37, 53)},
    "everything": {
        "scale": -0.4,
        "is_causal": True,
        "local_window": (25, 3),
        "soft_cap": 2.0,
        "bias": random_bias(2, 1, 37, 53),
        "mask": random_mask(1, 4, 37, 53) & (np.arange(37) != 20)[:, None],
        "query_seq_lengths": lengths(2**31 - 1, 30),
        "key_value_seq_lengths": lengths(24, 53),
    },
}


def build(case, dtype=np.float64):
    fields = dict(CASES[case])
    q, k, v, d_out, d_log_sum_exp = draw(**fields.pop("shape", {}), dtype=dtype)
    arrays = {
        name: placed(fields.pop(name)) for name in AttentionOperands._fields if name in fields
    }
    if "bias" in arrays:
        arrays["bias"] = arrays["bias"].astype(dtype)
    problem = AttentionProblem(**{"scale": 0.45, **fields})
    return problem, AttentionOperands(q, k, v, **arrays), d_out, d_log_sum_exp


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    scale = max(1.0, float(np.max(np.abs(np.where(np.isfinite(expected), expected, 0.0)))))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def assert_right(problem, operands, cotangents, expected_outputs, expected_gradients):
    (out, *parts), gradients = run(problem, operands, *cotangents)
    for part in parts:
        assert part.dtype == jnp.float64
        assert np.isfinite(part).all()
    assert_close(out, expected_outputs[0], 1e-13)
    assert_close(log_sum_exp_of(*parts), expected_outputs[1], 1e-13)
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == jnp.float64
        assert_close(gradient, exact, 1e-13)


@pytest.mark.parametrize("case", CASES)
def test_equals_numpy_in_float64(case, oracle, float64, small_blocks):
    problem, operands, d_out, d_log_sum_exp = build(case)
    expected = oracle(
        *operands[:5],
        **keywords(problem, operands),
        d_out=d_out,
        d_log_sum_exp=d_log_sum_exp,
    )
    gradients = expected[2:] if operands.bias is not None else expected[2:5]
    assert_right(problem, operands, (d_out, d_log_sum_exp), expected[:2], gradients)


@pytest.mark.parametrize("case", ["causal_long_query", "bias_hides", "everything"])
def test_no_cotangent_of_the_log_sum_exp(case, oracle, float64, small_blocks):
    problem, operands, d_out, _ = build(case)
    expected = oracle(*operands[:5], **keywords(problem, operands), d_out=d_out)
    gradients = expected[2:] if operands.bias is not None else expected[2:5]
    assert_right(problem, operands, (d_out, None), expected[:2], gradients)


def test_blocks_of_the_size_that_users_run(oracle, relative_error):
    q, k, v, d_out, _ = draw(B=1, T=300, S=530, N=2, K=1, H=8, V=8, dtype=np.float32)
    problem = AttentionProblem(0.35, local_window=(200, 100))
    (out, *_), gradients = run(problem, AttentionOperands(q, k, v), d_out)
    expected = oracle(q, k, v, scale=0.35, local_window_size=(200, 100), d_out=d_out)
    assert relative_error(out, expected.out) <= 2e-6
    for gradient, exact in zip(gradients, expected[2:5], strict=True):
        assert relative_error(gradient, exact) <= 3e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_error_against_the_same_dtype_of_jax_nn(dtype, oracle, relative_error, small_blocks):
    q, k, v, d_out, _ = (x.astype(dtype) for x in draw(K=4, H=32, V=32, dtype=np.float32))
    bias = jnp.asarray(random_bias(1, 4, 37, 53)).astype(dtype)
    exact = [np.asarray(x).astype(np.float64) for x in (q, k, v, bias)]
    expected = oracle(*exact, scale=0.25, d_out=np.asarray(d_out).astype(np.float64))

    outputs, gradients = run(AttentionProblem(0.25), AttentionOperands(q, k, v, bias), d_out)
    assert outputs[1].dtype == jnp.float32
    assert {x.dtype for x in (outputs[0], *gradients)} == {jnp.dtype(dtype)}
    plain, pullback = jax.vjp(
        lambda *inputs: jax.nn.dot_product_attention(*inputs, scale=0.25), q, k, v, bias
    )
    # What the dtype itself can't resolve is nobody's error.
    floor = float(jnp.finfo(dtype).eps) / 2
    assert relative_error(outputs[0], expected.out) <= max(
        2 * relative_error(plain, expected.out), floor
    )
    for gradient, theirs, best in zip(gradients, pullback(d_out), expected[2:], strict=True):
        assert relative_error(gradient, best) <= max(3 * relative_error(theirs, best), floor)


@pytest.mark.parametrize("shape", [(1, 4, 37, 53), (2, 1, 1, 53)], ids=["full", "by_key"])
def test_narrow_bias_is_summed_in_float32(shape, oracle, relative_error, small_blocks):
    q, k, v, d_out, _ = draw(dtype=np.float32)
    bias = jnp.asarray(random_bias(*shape)).astype(jnp.bfloat16)
    _, gradients = run(AttentionProblem(0.4), AttentionOperands(q, k, v, bias), d_out)
    assert gradients[3].dtype == jnp.bfloat16
    expected = oracle(q, k, v, np.asarray(bias).astype(np.float64), scale=0.4, d_out=d_out)
    assert relative_error(gradients[3], expected.d_bias) <= 2**-8


@pytest.mark.parametrize(
    ("case", "x64"),
    [("plain", False), ("lengths", True), ("everything", False), ("everything", True)],
)
def test_strict_modes(case, x64, strict_modes, configure, small_blocks, oracle):
    with configure(jax_enable_x64=x64):
        problem, operands, d_out, d_log_sum_exp = build(case, np.float32)
        (out, *parts), gradients = run(problem, operands, d_out, d_log_sum_exp)
    cotangents = {"d_out": d_out, "d_log_sum_exp": d_log_sum_exp}
    expected = oracle(*operands[:5], **keywords(problem, operands), **cotangents)
    assert {x.dtype for x in (out, *parts, *gradients)} == {jnp.dtype("float32")}
    assert_close(out, expected.out, 2e-6)
    for gradient, exact in zip(gradients, expected[2:], strict=False):
        assert_close(gradient, exact, 2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bias_of_the_least_float_hides_where_base_2_cannot_hold_it(dtype, small_blocks):
    """A mask written as a bias. finfo.min of float16 is an ordinary logit: its rows are uniform."""
    q, k, v, d_out, _ = draw(dtype=np.float32)
    bias = jnp.zeros((1, 1, 37, 53), dtype).at[:, :, 5:9].set(jnp.finfo(dtype).min)
    outputs, gradients = run(AttentionProblem(0.0), AttentionOperands(q, k, v, bias), d_out)
    for x in (*outputs, *gradients):
        assert np.isfinite(x.astype(jnp.float32)).all()
    mean = np.repeat(np.mean(v, axis=1), 2, axis=1) if dtype == "float16" else np.zeros((2, 4, 7))
    np.testing.assert_allclose(outputs[0][:, 5:9], np.stack([mean] * 4, 1), atol=1e-6)


def test_logits_near_the_least_one_have_finite_gradients(small_blocks):
    q, k, v, d_out, _ = draw(dtype=np.float32)
    bias = jnp.full((1, 1, 37, 1), -2.34e38).at[:, :, 20:].set(-1e9)
    outputs, gradients = run(AttentionProblem(0.4), AttentionOperands(q, k, v, bias), d_out)
    for x in (*outputs, *gradients):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("is_mapped", [False, True])
def test_poison_hidden_from_all_rows_reaches_no_result(poison, is_mapped, float64, small_blocks):
    """Rows from 20 on are beyond the length, and keys from 20 on are hidden from those before."""
    q, k, v, d_out, d_log_sum_exp = draw()
    bias = jnp.asarray(random_bias(2, 4, 37, 53))
    problem = AttentionProblem(0.4, is_causal=True)

    def results(q, k, v, bias, d_out, d_log_sum_exp):
        row_lengths = jnp.full(q.shape[:1], 20, jnp.int32)
        operands = AttentionOperands(q, k, v, bias, query_seq_lengths=row_lengths)
        return jax.tree.leaves(run(problem, operands, d_out, d_log_sum_exp))

    def from_20(x, axis):
        return jnp.where(
            (jnp.arange(x.shape[axis]) >= 20).reshape(-1, *(1,) * (3 - axis)), poison, x
        )

    poisoned = (
        from_20(q, 1),
        from_20(k, 1),
        from_20(v, 1),
        from_20(bias, 3),
        from_20(d_out, 1),
        d_log_sum_exp.at[:, 20:].set(poison),
    )
    clean = (q, k, v, bias, d_out, d_log_sum_exp)
    if is_mapped:
        results = jax.vmap(results)
        poisoned, clean = ([x[:, None] for x in inputs] for inputs in (poisoned, clean))
    for x, expected in zip(results(*poisoned), results(*clean), strict=True):
        assert_close(x, expected, 1e-14)


@pytest.mark.parametrize("poisoned", ["key", "value"])
def test_poison_reaches_the_rows_that_see_it_alone(poisoned, small_blocks):
    q, k, v, d_out, _ = draw(dtype=np.float32)
    problem = AttentionProblem(0.4, is_causal=True)
    (out, *_), (d_query, *_) = run(problem, AttentionOperands(q, k, v), d_out)
    k = k.at[:, 20].set(np.nan) if poisoned == "key" else k
    v = v.at[:, 20].set(np.nan) if poisoned == "value" else v
    (actual, *_), (d_query_actual, *_) = run(problem, AttentionOperands(q, k, v), d_out)
    np.testing.assert_array_equal(actual[:, :20], out[:, :20])
    np.testing.assert_allclose(d_query_actual[:, :20], d_query[:, :20], atol=1e-6)
    assert np.isnan(actual[:, 20:]).all()
    assert np.isnan(d_query_actual[:, 20:]).all()


def test_infinite_values_add_up_as_in_ieee_arithmetic(small_blocks):
    q, k, v, _, _ = draw(dtype=np.float32)
    v = v.at[:, 3, :, 0].set(np.inf).at[:, 3, :, 1].set(-np.inf).at[:, 4, :, 0].set(-np.inf)
    out, *_ = xla.forward(AttentionProblem(0.4, is_causal=True), AttentionOperands(q, k, v))
    assert np.isfinite(out[:, :3]).all()
    assert np.isfinite(out[..., 2:]).all()
    assert np.isposinf(out[:, 3, :, 0]).all()
    assert np.isneginf(out[:, 3:, :, 1]).all()
    assert np.isnan(out[:, 4:, :, 0]).all()


def test_sum_over_visible_terms_is_the_ieee_sum():
    """Every pair of these weights and elements, added to another pair."""
    numbers = np.array([0.0, 2.0, -3.0, np.inf, -np.inf, np.nan], np.float32)
    finite = numbers[:3]
    terms = np.array([(w, x, seen) for w in finite for x in numbers for seen in (True, False)])
    first, second = (x.reshape(-1, 3) for x in np.broadcast_arrays(terms[:, None], terms[None]))
    w, x, seen = np.stack([first, second]).transpose(2, 1, 0)
    seen = seen.astype(bool)
    w = np.where(seen, w, np.float32(0))
    with np.errstate(invalid="ignore"):
        expected = np.where(seen, w * x, 0).sum(-1)
    # One batch entry for each pair: B = len(w), one row, two keys, one feature.
    actual = visible.sum_visible(
        "bkgts,bksv->bkgtv",
        jnp.asarray(w[:, None, None, None], jnp.float32),
        jnp.asarray(x[:, None, :, None], jnp.float32),
        jnp.asarray(seen[:, None, None, None]),
        jnp.asarray(False),
    )
    np.testing.assert_array_equal(actual.reshape(-1), expected)


def test_vmap_over_lengths_keeps_one_loop_and_one_branch(small_blocks):
    """A batched trip count or branch would run every lane through the longest, or both branches."""
    q, k, v, d_out, _ = draw(B=3, dtype=np.float32)
    problem = AttentionProblem(0.4, is_causal=True)
    key_lengths = jnp.asarray(lengths(0, 17, 53))

    def results(q, k, v, d_out, key_lengths):
        x = AttentionOperands(q, k, v, key_value_seq_lengths=key_lengths)
        return run(problem, x, d_out)

    one_by_one = (q[:, None], k[:, None], v[:, None], d_out[:, None], key_lengths[:, None])
    mapped = jax.vmap(results)(*one_by_one)
    for x, expected in zip(
        jax.tree.leaves(mapped), jax.tree.leaves(results(q, k, v, d_out, key_lengths)), strict=True
    ):
        np.testing.assert_allclose(x[:, 0], expected, atol=2e-6)

    def count(function, *arguments):
        text = str(jax.make_jaxpr(function)(*arguments))
        return text.count("cond["), text.count("while[")

    batched = count(jax.vmap(results), *one_by_one)
    assert batched == count(results, q, k, v, d_out, key_lengths)
    assert min(batched) > 0


@pytest.mark.parametrize("case", ["causal_long_query", "window", "lengths"])
def test_backward_is_the_same_with_room_for_rows_and_without(case, small_blocks, monkeypatch):
    """P and dP of a block of bfloat16 rows are kept from one sweep to the next, or made again."""
    problem, operands, d_out, _ = build(case, jnp.bfloat16)
    saved = xla.forward(problem, operands)

    def gradients():
        run = jax.jit(lambda operands, d_out: xla.backward(problem, operands, *saved, d_out, None))
        return run.lower(operands, d_out).as_text(), run(operands, d_out)

    kept, expected = gradients()
    monkeypatch.setattr(xla, "_MAX_KEPT", 0)
    again, actual = gradients()
    assert kept.count("dot_general") < again.count("dot_general")
    for x, y in zip(actual, expected, strict=True):
        x, y = (np.asarray(each, np.float32) for each in (x, y))
        assert np.isfinite(x).all()
        assert np.linalg.norm(x - y) <= 4e-3 * np.linalg.norm(y)


@pytest.mark.parametrize(
    "case",
    ["causal_short_query", "causal_long_query", "window", "window_left_0_beyond_keys",
     "window_causal", "lengths"],
)  # fmt: skip
def test_visits_the_chunks_that_some_row_sees_and_no_other(case, small_blocks):
    problem, operands, *_ = build(case, np.float32)
    tiles = xla_tiles.Tiles(problem, operands)
    row, key = np.arange(operands.query.shape[1])[:, None], np.arange(operands.key.shape[1])
    visible = np.ones((2, row.size, key.size), bool)
    if problem.is_causal:
        visible &= key <= row
    if problem.local_window is not None:
        left, right = problem.local_window
        visible &= (row - left <= key) & (key <= row + right)
    if operands.query_seq_lengths is not None:
        visible &= row < np.asarray(operands.query_seq_lengths)[:, None, None]
    if operands.key_value_seq_lengths is not None:
        visible &= key < np.asarray(operands.key_value_seq_lengths)[:, None, None]
    rows, keys = tiles.queries.size, tiles.chunks.size
    skipped = 0
    for i in range(tiles.queries.count):
        begin, end = (int(x) for x in tiles.chunk_range(jnp.int32(i)))
        for c in range(tiles.chunks.count):
            tile = visible[:, i * rows : (i + 1) * rows, c * keys : (c + 1) * keys]
            assert (begin <= c < end) == tile.any()
            skipped += not begin <= c < end
    assert skipped > 0


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 257, 512, 513, 1000])
def test_blocks_hold_each_position_as_new_once(length):
    blocks = xla_tiles.Blocks.of(length, 256)
    assert blocks.size <= 256
    found = []
    for index in range(blocks.count):
        positions = np.asarray(blocks.positions(jnp.int32(index)))
        is_new = blocks.is_new(jnp.int32(index))
        found += list(positions if is_new is None else positions[np.asarray(is_new)])
    assert found == list(range(length))


@pytest.mark.parametrize("extent", ["B", "T", "S"])
def test_extent_0(extent):
    q, k, v, d_out, d_log_sum_exp = draw(**{extent: 0}, dtype=np.float32)
    bias = jnp.ones((q.shape[0], 1, 1, k.shape[1]))
    operands = AttentionOperands(q, k, v, bias)
    (out, row_maximum, log_sum), gradients = run(
        AttentionProblem(0.4), operands, d_out, d_log_sum_exp
    )
    assert out.shape == d_out.shape
    assert not out.any()
    assert not np.asarray(row_maximum).any()
    assert (np.asarray(log_sum) == np.float32(EMPTY_ROW_LOG_SUM_EXP)).all()
    for gradient, x in zip(gradients, operands[:4], strict=True):
        assert gradient.shape == x.shape
        assert not gradient.any()


def test_gradient_of_a_bias_that_is_not_there_is_an_error():
    q, k, v, d_out, d_log_sum_exp = draw(dtype=np.float32)
    backward_bias = functools.partial(xla.backward_bias, AttentionProblem(0.4))
    row = d_log_sum_exp
    with pytest.raises(ValueError, match=r"backward_bias: operands.bias is None"):
        backward_bias(AttentionOperands(q, k, v), d_out, row, row, d_out, None)


@pytest.mark.parametrize(
    ("implementation", "quantization"), [("cpu", None), ("cpu", "int4"), ("xla", None)]
)
def test_without_jit(require, relative_error, implementation, quantization):
    require(implementation)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3, 4)), jnp.float32)

    def loss(x):
        out = jax_gluon.dot_product_attention(
            x, x, x, is_causal=True, quantization=quantization, implementation=implementation
        )
        return jnp.sum(out**2), out

    (_, expected), expected_gradient = jax.value_and_grad(loss, has_aux=True)(x)
    with jax.disable_jit():
        (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(x)
    assert relative_error(out, expected) <= 1e-5
    assert relative_error(gradient, expected_gradient) <= 1e-5
