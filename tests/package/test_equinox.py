"""Equinox's own multi-head attention and ours in its place."""

import functools
import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_gluon
from jax_gluon._arguments import KEYWORDS
from jax_gluon._frameworks import OF_A_CALL

eqx = pytest.importorskip("equinox")

from jax_gluon.equinox import MultiheadAttention, convert  # noqa: E402

B, T, S, HEADS = 2, 9, 11, 4
SIZES = dict(query_size=24, key_size=20, value_size=16, output_size=10, qk_size=8, vo_size=6)
RNG = np.random.default_rng(29)
draw = lambda *shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32)  # noqa: E731
INPUTS = draw(B, T, 24), draw(B, S, 20), draw(B, S, 16)
COTANGENT = draw(B, T, 10)
MASKS = {
    "none": None,
    "of tokens": jnp.asarray(RNG.random((T, S)) < 0.7).at[:, 0].set(True),
    "of heads": jnp.asarray(RNG.random((HEADS, T, S)) < 0.7).at[..., 0].set(True),
}


def make(module, **keywords):
    biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
    return module(HEADS, **SIZES, **biases, key=jax.random.key(0), **keywords)


def results(module, **keywords):
    @eqx.filter_jit
    @functools.partial(eqx.filter_grad, has_aux=True)
    def gradients(both):
        module, inputs = both
        out = jax.vmap(lambda *x: module(*x, **keywords))(*inputs)
        return jnp.sum(out * COTANGENT), out

    return gradients((module, INPUTS))


@functools.cache
def results_of_equinox(mask):
    return results(make(eqx.nn.MultiheadAttention), mask=MASKS[mask])


def assert_close(actual, expected, relative_error, bar):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # The gradient of a bias of the keys is zero but for rounding.
        if np.linalg.norm(y) > 1e-4:
            assert relative_error(x, y) <= bar


@pytest.fixture(params=["cpu", "xla"])
def implementation(request, require):
    require(request.param)
    return request.param


@pytest.mark.parametrize("mask", MASKS)
def test_forward_and_gradients(implementation, relative_error, mask):
    actual = results(make(MultiheadAttention, implementation=implementation), mask=MASKS[mask])
    assert_close(actual, results_of_equinox(mask), relative_error, 1e-5)


def test_int8_is_within_the_quantization_error(implementation, relative_error):
    module = make(MultiheadAttention, implementation=implementation, quantization="int8")
    (gradients, out), expected = results(module), results_of_equinox("none")
    assert 1e-4 < relative_error(out, expected[1]) < 2e-2
    assert_close(gradients, expected[0], relative_error, 5e-2)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_step_of_training(require, relative_error, quantization):
    require("cpu")
    optimizer = optax.adam(1e-2)

    @eqx.filter_jit
    def step(module):
        def loss(module):
            return jnp.mean((jax.vmap(module)(*INPUTS) - COTANGENT) ** 2)

        value, gradients = eqx.filter_value_and_grad(loss)(module)
        state = optimizer.init(eqx.filter(module, eqx.is_array))
        updates, _ = optimizer.update(gradients, state)
        return loss(eqx.apply_updates(module, updates)), value

    actual, before = step(make(MultiheadAttention, quantization=quantization))
    expected, _ = step(make(eqx.nn.MultiheadAttention))
    assert actual < before
    assert relative_error(actual, expected) <= (1e-5 if quantization is None else 2e-2)


def test_checkpoints_are_those_of_equinox():
    def saved(module):
        file = io.BytesIO()
        eqx.tree_serialise_leaves(file, module)
        file.seek(0)
        return file

    twice = lambda x: 2 * x if eqx.is_array(x) else x  # noqa: E731
    classes = eqx.nn.MultiheadAttention, MultiheadAttention
    for source, target in (classes, classes[::-1]):
        module = jax.tree.map(twice, make(source))
        loaded = eqx.tree_deserialise_leaves(saved(module), make(target))
        assert type(loaded) is target
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(module), strict=True):
            np.testing.assert_array_equal(a, b)


def test_fields_are_those_of_equinox():
    ours, of_equinox = make(MultiheadAttention), make(eqx.nn.MultiheadAttention)
    assert isinstance(ours, eqx.nn.MultiheadAttention)
    for name, value in vars(of_equinox).items():
        assert eqx.tree_equal(getattr(ours, name), value), name


def test_heads_are_processed(relative_error):
    embed = eqx.nn.RotaryPositionalEmbedding(8)

    def rotate(q, k, v):
        return (x for x in (jax.vmap(embed, 1, 1)(q), jax.vmap(embed, 1, 1)(k), v))

    call = eqx.filter_jit(lambda module, *x: module(*x, process_heads=rotate))
    ours, of_equinox = (
        call(make(x), *(x[0] for x in INPUTS))
        for x in (MultiheadAttention, eqx.nn.MultiheadAttention)
    )
    assert relative_error(ours, of_equinox) <= 1e-5
    with pytest.raises(ValueError, match=r"process_heads is to shapes .*allowed: .*as before"):
        make(MultiheadAttention)(
            *(x[0] for x in INPUTS), process_heads=lambda q, k, v: (q[1:], k, v)
        )


def test_dropout(relative_error):
    """Of the rate, by a key, under vmap and only in training."""
    module = make(MultiheadAttention, dropout_p=0.5)
    (_, expected) = results_of_equinox("none")
    for keywords in (dict(inference=True), dict(key=jax.random.key(0), inference=True)):
        assert relative_error(jax.vmap(lambda *x: module(*x, **keywords))(*INPUTS), expected) < 1e-5  # noqa: B023
    assert relative_error(jax.vmap(eqx.nn.inference_mode(module))(*INPUTS), expected) < 1e-5
    run = eqx.filter_jit(lambda keys: jax.vmap(lambda k, *x: module(*x, key=k))(keys, *INPUTS))
    drawn = [run(jax.random.split(jax.random.key(i), B)) for i in range(48)]
    assert relative_error(drawn[0], drawn[1]) > 0.05
    assert relative_error(np.mean(drawn, 0), expected) < 0.25 * relative_error(drawn[0], expected)
    same = run(jax.random.split(jax.random.key(0), B))
    np.testing.assert_array_equal(drawn[0], same)
    # Each entry of the batch by its own key.
    alone = module(*(x[1] for x in INPUTS), key=jax.random.split(jax.random.key(0), B)[1])
    assert relative_error(alone, same[1]) <= 1e-6
    with pytest.raises(RuntimeError, match="MultiheadAttention: key is None with dropout"):
        module(*(x[0] for x in INPUTS))
    with pytest.warns(UserWarning, match="older name of inference"):
        module(*(x[0] for x in INPUTS), deterministic=True)


def test_options_and_arguments_of_a_call_reach_the_attention(relative_error):
    x = INPUTS[0][0]
    options = dict(local_window_size=[2, 0], logits_soft_cap=3.0, scale=0.7, is_causal=True)
    ours = MultiheadAttention(
        HEADS, 24, num_kv_heads=2, sinks=True, key=jax.random.key(1), **options
    )
    assert (ours.key_proj.out_features, ours.sinks.shape) == (2 * 6, (HEADS,))
    ours = eqx.tree_at(lambda m: m.sinks, ours, draw(HEADS))
    of_call = dict(
        bias=draw(HEADS, T, T), key_value_mask=jnp.arange(T) != 3,
        query_segment_ids=jnp.arange(T) // 4, key_value_segment_ids=jnp.arange(T) // 4,
    )  # fmt: skip
    actual = eqx.filter_jit(lambda module: module(x, x, x, **of_call))(ours)
    heads = [
        jax.vmap(linear)(x).reshape(T, -1, 6)
        for linear in (ours.query_proj, ours.key_proj, ours.value_proj)
    ]
    reference = jax.jit(
        lambda *x: jax_gluon.reference.dot_product_attention(
            *x, sinks=ours.sinks, **(options | of_call)
        )
    )
    expected = reference(*heads)
    assert relative_error(actual, jax.vmap(ours.output_proj)(expected.reshape(T, -1))) <= 1e-5
    gradient = eqx.filter_jit(eqx.filter_grad(lambda m: jnp.sum(m(x, x, x, **of_call) ** 2)))(ours)
    assert np.abs(gradient.sinks).min() > 0


def test_lengths_of_one_sequence_are_numbers(relative_error):
    """So that `jax.vmap` over several gives each its own."""
    module, inputs = make(MultiheadAttention), INPUTS
    lengths = jnp.arange(1, 1 + len(inputs[0]))
    call = lambda q, k, v, n: module(q, k, v, key_value_seq_lengths=n)  # noqa: E731
    found = jax.vmap(call)(*inputs, lengths)
    for i, length in enumerate(lengths.tolist()):
        alone = module(inputs[0][i], *(x[i, :length] for x in inputs[1:]))
        assert relative_error(found[i], alone) <= 2e-6


def test_a_block_mask(relative_error):
    module = make(MultiheadAttention)
    mask = jax_gluon.block_mask(lambda b, h, i, j: j <= i + 2, T, S)
    inputs = [x[0] for x in INPUTS]
    expected = module(*inputs, jnp.arange(S) <= jnp.arange(T)[:, None] + 2)
    assert relative_error(module(*inputs, mask), expected) <= 1e-6


def test_convert_replaces_equinoxs_own_class_alone(relative_error):
    class Other(eqx.nn.MultiheadAttention):
        pass

    class Block(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        others: list
        activation: callable = jax.nn.gelu

    other = make(Other)
    block = Block(make(eqx.nn.MultiheadAttention), [other, jnp.ones(3), None])
    new = convert(block, quantization="int8", is_causal=True)
    assert type(new.attention) is MultiheadAttention
    assert type(new.others[0]) is Other
    assert eqx.tree_equal(new.others[0], other)
    assert new.activation is block.activation
    assert new.attention.key_proj.weight is block.attention.key_proj.weight
    direct = make(MultiheadAttention, quantization="int8", is_causal=True)
    assert jax.tree.structure(new.attention) == jax.tree.structure(direct)
    inputs = [x[0] for x in INPUTS]
    np.testing.assert_array_equal(new.attention(*inputs), direct(*inputs))
    # Its options are those that are named.
    again = convert(new)
    assert (again.attention.quantization, again.attention.is_causal) == (None, False)
    assert relative_error(again.attention(*inputs), block.attention(*inputs)) <= 1e-5
    many = MultiheadAttention(4, 8, num_kv_heads=2, sinks=True, key=jax.random.key(0))
    assert convert(many, scale=1.0).num_kv_heads == 2
    assert convert(many).sinks is many.sinks


@pytest.mark.parametrize("use", [make, lambda _, **options: convert([], **options)])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(quantization="int9"), ValueError, 'quantization is "int9"'),
        (dict(implementation="cuda"), ValueError, 'implementation is "cuda"'),
        (dict(is_causal=1), TypeError, "is_causal is a int"),
        (dict(local_window_size=-1), ValueError, "local_window_size is -1"),
        (dict(differentiation=2), TypeError, "differentiation is a int"),
    ],
)
def test_options_that_no_call_takes_are_refused(use, options, error, message):
    with pytest.raises(error, match=f"jax_gluon.equinox.MultiheadAttention: {message}.*allowed"):
        use(MultiheadAttention, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make(MultiheadAttention, num_kv_heads=3), ValueError, "num_kv_heads is 3"),
        (lambda: make(MultiheadAttention, num_kv_heads=0), ValueError, "num_kv_heads is 0"),
        (lambda: convert([], sinks=True), TypeError, 'keyword argument "sinks"'),
        (
            lambda: make(MultiheadAttention)(*(x[0] for x in INPUTS), layout="BNTH"),
            TypeError, 'unexpected keyword argument "layout"',
        ),
    ],
)  # fmt: skip
def test_other_mistakes_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_every_argument_is_an_option_or_of_one_call():
    """What one batch has, or Equinox itself; its modules have one layout and no batch."""
    options = set(jax_gluon.equinox._DEFAULTS)
    by_equinox = {"dropout_rate", "dropout_rng", "broadcast_dropout", "sinks", "layout"}
    assert options | by_equinox | set(OF_A_CALL) - {"bias"} == set(KEYWORDS)


def test_without_equinox_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "jax_gluon.equinox")
    monkeypatch.setitem(sys.modules, "equinox", None)
    with pytest.raises(ImportError, match=r"pip install 'jax-gluon\[equinox\]'"):
        __import__("jax_gluon.equinox")
