"""`jax_gluon.patch` in the place of `jax.nn.dot_product_attention`."""

import contextlib
import functools
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn import dot_product_attention as bound_before

import jax_gluon
from jax_gluon import _thread_contexts

#: Within a block names of modules are bound anew, this one's too; what an object holds is not.
JAX = types.SimpleNamespace(own=bound_before)
RNG = np.random.default_rng(17)
draw = lambda *shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32)  # noqa: E731
QUERY, KEY, VALUE = draw(2, 9, 4, 8), draw(2, 11, 2, 8), draw(2, 11, 2, 8)
BIAS, COTANGENT = draw(2, 4, 9, 11), draw(2, 9, 4, 8)
MASK = jnp.asarray(RNG.random((2, 4, 9, 11)) < 0.8).at[..., 0].set(True)
#: Rows that see no key are not alike: JAX gives them the mean of all values.
CALLS = {
    "plain": {},
    "causal": dict(is_causal=True, scale=0.3),
    "xla": dict(implementation="xla", bias=BIAS, mask=MASK),
    "lengths": dict(key_value_seq_lengths=jnp.array([3, 11])),
    "window": dict(local_window_size=(3, 1)),
}


def gradients(**keywords):
    def loss(query, key, value):
        out = jax.nn.dot_product_attention(query, key, value, **keywords)
        return jnp.sum(out * COTANGENT), out

    grad, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(QUERY, KEY, VALUE)
    return [out, *grad]


@pytest.mark.parametrize("name", CALLS)
def test_forward_and_gradients(require, relative_error, name):
    require("cpu")
    expected = gradients(**CALLS[name])
    with jax_gluon.patch() as patched:
        actual = jax.block_until_ready(gradients(**CALLS[name]))
        ran = [run["pass"] for run in jax_gluon.debug.kernels()]
    assert {"forward", "backward"} <= set(ran)
    assert [(call.reason, call.count) for call in patched.calls] == [(None, 1)]
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) <= 1e-5


def test_the_residual_and_operands_without_a_batch(relative_error):
    call = lambda: jax.nn.dot_product_attention(  # noqa: E731
        QUERY[0], KEY[0], VALUE[0], return_residual=True
    )
    expected = call()
    with jax_gluon.patch() as patched:
        actual = call()
    assert patched.calls[0].reason is None
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) <= 1e-5


def test_options_reach_the_call(relative_error):
    with jax_gluon.patch(quantization="int8", implementation="xla", kernel="baseline"):
        actual = jax.nn.dot_product_attention(QUERY, KEY, VALUE)
    options = dict(quantization="int8", implementation="xla")
    expected = jax_gluon.dot_product_attention(QUERY, KEY, VALUE, **options)
    np.testing.assert_array_equal(actual, expected)
    assert relative_error(actual, JAX.own(QUERY, KEY, VALUE)) > 1e-4


def test_xla_means_no_cudnn_and_cudnn_is_jaxs(monkeypatch):
    """On a GPU floats would else go to cuDNN."""
    asked = []
    monkeypatch.setattr(jax_gluon._patch, "dot_product_attention", lambda **x: asked.append(x))
    with jax_gluon.patch() as patched, jax_gluon.patch(quantization="int4") as quantized:
        for backend in ("cpu", "gpu"):
            monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
            for patch in (patched, quantized):
                for wished in ("xla", None):
                    patch.attend("", dict(query=QUERY, key=KEY, implementation=wished))
        found = [x["implementation"] for x in asked]
        is_taken, _ = patched.attend("", dict(query=QUERY, key=KEY, implementation="cudnn"))
    assert found == [None] * 4 + ["xla", None, None, None]
    assert not is_taken
    assert 'left to JAX: implementation="cudnn" was asked for' in str(patched)


def module_with(**names):
    module = types.ModuleType("some_library")
    vars(module).update(names)
    return module


def test_names_of_modules_are_bound_anew_and_back(monkeypatch):
    library = module_with(attend=JAX.own, other=jnp.sum)
    late = module_with()
    monkeypatch.setitem(sys.modules, "some_library", library)
    with jax_gluon.patch() as patched:
        assert library.attend is bound_before is jax.nn.dot_product_attention is not JAX.own
        library.attend(QUERY, KEY, VALUE)
        # As a module does that is imported within the block.
        late.attend = jax.nn.dot_product_attention
        monkeypatch.setitem(sys.modules, "some_late_library", late)
    assert [call.where.split(":")[0] for call in patched.calls] == [__name__]
    assert library.attend is late.attend is bound_before is jax.nn.dot_product_attention is JAX.own
    assert library.other is jnp.sum


def test_what_was_kept_from_a_block_is_jaxs_after_it():
    with jax_gluon.patch() as patched:
        kept = functools.partial(jax.nn.dot_product_attention, QUERY, KEY)
    assert kept.func is not JAX.own
    np.testing.assert_array_equal(kept(VALUE), JAX.own(QUERY, KEY, VALUE))
    assert patched.calls == ()


def test_a_module_that_loads_itself_when_it_is_looked_at_is_asked_nothing(monkeypatch):
    class Lazy(types.ModuleType):
        def __getattribute__(self, name):
            raise AssertionError(name)

    monkeypatch.setitem(sys.modules, "some_lazy_library", Lazy("some_lazy_library"))
    with jax_gluon.patch():
        pass


def held_by_default(attend=bound_before, *, again=bound_before):
    return attend, again


class Holder:
    attend = bound_before

    def __init__(self):
        self.own = JAX.own


def test_other_holders_are_named():
    partial, holder, entry = functools.partial(JAX.own), Holder(), {"attend": JAX.own}
    attend = entry["attend"]
    closure = lambda: attend  # noqa: E731
    with jax_gluon.patch() as patched:
        found = patched.left_alone
        held_by_default()[0](QUERY, KEY, VALUE)
    assert patched.calls == ()
    for words in (
        f"a default argument of {__name__}.held_by_default holds JAX's own",
        "a functools.partial holds JAX's own",
        f"attribute attend of class {__name__}.Holder holds JAX's own",
        f"an attribute of a {__name__}.Holder holds JAX's own",
        "entry 'attend' of a dict holds JAX's own",
        f"the closure of {closure.__module__}.{closure.__qualname__} holds JAX's own",
    ):
        assert words in found
    assert not [words for words in found if "jax_gluon._" in words]
    del partial, holder


def test_calls_that_are_refused_go_to_jax_and_are_named():
    x = jnp.ones((1, 4, 2, 7), jnp.float32)
    call = lambda: jax.nn.dot_product_attention(x, x, x)  # noqa: E731
    with jax_gluon.patch(quantization="int4") as patched:
        for _ in range(2):
            np.testing.assert_array_equal(call(), JAX.own(x, x, x))
    (words,) = (words for words in patched.left_alone if __name__ + ":" in words)
    assert "query float32[1, 4, 2, 7], key float32[1, 4, 2, 7], 2 times: left to JAX" in words
    assert "allowed: an even head dim" in words
    with (
        pytest.raises(ValueError, match="dot_product_attention: key is of head dim 7"),
        jax_gluon.patch(quantization="int4", strict=True),
    ):
        call()
    # What neither takes is JAX's error; and what its signature has not.
    with jax_gluon.patch():
        with pytest.raises(ValueError, match="value shape should be"):
            jax.nn.dot_product_attention(x, x, x[:, :3])
        with pytest.raises(TypeError, match="unexpected keyword argument 'dropout'"):
            jax.nn.dot_product_attention(x, x, x, dropout=0.1)


def test_an_argument_of_a_later_jax_is_left_to_it(monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda query, key, value, novelty=0: "own")
    with jax_gluon.patch() as patched:
        assert jax.nn.dot_product_attention(QUERY, KEY, VALUE, novelty=1) == "own"
        assert not isinstance(jax.nn.dot_product_attention(QUERY, KEY, VALUE), str)
    assert [call.reason for call in patched.calls] == [
        "jax_gluon.dot_product_attention has no argument novelty", None
    ]  # fmt: skip


def test_blocks_nest_and_end_by_errors():
    counts = lambda *patches: [sum(c.count for c in p.calls) for p in patches]  # noqa: E731
    call = lambda: jax.nn.dot_product_attention(QUERY, KEY, VALUE)  # noqa: E731
    outer, inner = jax_gluon.patch(), jax_gluon.patch(quantization="int8")

    def broken():
        with inner:
            call()
            with outer:
                call()
            raise KeyError

    with contextlib.ExitStack() as stack:
        stack.enter_context(outer)
        call()
        with pytest.raises(KeyError):
            broken()
        assert jax.nn.dot_product_attention is not JAX.own
        call()
    assert counts(outer, inner) == [3, 1]
    assert jax.nn.dot_product_attention is JAX.own


def test_as_a_decorator():
    @jax_gluon.patch(quantization="int8")
    def attend(x):
        """Says so."""
        assert jax.nn.dot_product_attention is not JAX.own
        if x is None:
            raise KeyError
        return jax.nn.dot_product_attention(x, x, x)

    expected = jax_gluon.dot_product_attention(QUERY, QUERY, QUERY, quantization="int8")
    np.testing.assert_array_equal(attend(QUERY), expected)
    with pytest.raises(KeyError):
        attend(None)
    assert attend.__doc__ == "Says so."
    assert jax.nn.dot_product_attention is JAX.own


def test_functions_whose_body_runs_later_are_not_decorated():
    async def later():
        pass

    def steps():
        yield

    for function in (later, steps):
        with pytest.raises(TypeError, match=r"patch: the decorated function is .*allowed: one"):
            jax_gluon.patch()(function)


def test_programs_compiled_outside_are_traced_again():
    traces = []

    @jax.jit
    def attend(x):
        traces.append(None)
        return jax.nn.dot_product_attention(x, x, x)

    own = attend(QUERY)
    for _ in range(2):
        with jax_gluon.patch(quantization="int8"):
            ours = attend(QUERY)
    assert len(traces) == (2 if _thread_contexts.TRACES_AGAIN else 1)
    np.testing.assert_array_equal(attend(QUERY), own)
    if _thread_contexts.TRACES_AGAIN:
        assert not np.array_equal(ours, own)
        with jax_gluon.patch(quantization="int4"):
            attend(QUERY)
        assert len(traces) == 3


def test_older_jax_is_warned_of(monkeypatch):
    monkeypatch.setattr(jax_gluon._patch, "TRACES_AGAIN", False)
    with pytest.warns(UserWarning, match="saw no call"), jax_gluon.patch():
        pass
    with jax_gluon.patch():
        jax.nn.dot_product_attention(QUERY, KEY, VALUE)


def test_other_threads_keep_jaxs_own():
    """Each has its own blocks; the last to leave gives the name back."""
    inside, leave = threading.Event(), threading.Event()
    seen = {}

    def work():
        with jax_gluon.patch(quantization="int8") as patched:
            inside.set()
            assert leave.wait(60)
            seen["other"] = jax.nn.dot_product_attention(QUERY, KEY, VALUE)
        seen["calls"] = len(patched.calls)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(60)
    # This thread is in no block, though the name is bound anew.
    assert jax.nn.dot_product_attention is not JAX.own
    np.testing.assert_array_equal(
        jax.nn.dot_product_attention(QUERY, KEY, VALUE), JAX.own(QUERY, KEY, VALUE)
    )
    with jax_gluon.patch() as here:
        leave.set()
        thread.join()
        assert jax.nn.dot_product_attention is not JAX.own
        jax.nn.dot_product_attention(QUERY, KEY, VALUE)
    assert jax.nn.dot_product_attention is JAX.own
    assert (seen["calls"], len(here.calls)) == (1, 1)
    expected = jax_gluon.dot_product_attention(QUERY, KEY, VALUE, quantization="int8")
    np.testing.assert_array_equal(seen["other"], expected)


def test_many_threads_enter_and_leave():
    def work():
        for _ in range(20):
            with jax_gluon.patch():
                assert jax.nn.dot_product_attention is not JAX.own

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert jax.nn.dot_product_attention is JAX.own


def test_forward_mode_with_the_argument_for_it(relative_error):
    tangent = lambda: jax.jvp(  # noqa: E731
        lambda x: jax.nn.dot_product_attention(x, KEY, VALUE), (QUERY,), (QUERY,)
    )[1]
    expected = tangent()
    with jax_gluon.patch(differentiation="any", implementation="xla") as patched:
        assert relative_error(tangent(), expected) <= 1e-5
    assert [call.reason for call in patched.calls] == [None]


def test_the_default_attention_of_nnx(relative_error):
    module = nnx.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0))
    x = draw(2, 7, 16)
    expected = module(x, is_causal=True)
    with jax_gluon.patch() as patched:
        assert relative_error(module(x, is_causal=True), expected) <= 1e-5
    assert [call.where.split(":")[0] for call in patched.calls] == ["flax.nnx.nn.attention"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(quantization="int9"), ValueError, 'patch: quantization is "int9"'),
        (dict(implementation="cuda"), ValueError, 'patch: implementation is "cuda"'),
        (dict(kernel="fast"), ValueError, 'patch: kernel is "fast"'),
        (dict(differentiation="none"), ValueError, 'patch: differentiation is "none"'),
        (dict(strict=1), TypeError, "patch: strict is a int"),
    ],
)
def test_options_that_no_call_takes_are_refused(options, error, message):
    with pytest.raises(error, match=f"jax_gluon.{message}.*allowed"):
        jax_gluon.patch(**options)
    assert jax.nn.dot_product_attention is JAX.own


def test_blocks_end_in_turn():
    def held(patched):
        with patched:
            yield

    first, second = held(jax_gluon.patch(quantization="int8")), held(jax_gluon.patch())
    next(first), next(second)
    with pytest.raises(
        RuntimeError, match=r"the block is one that ends before .*; allowed: blocks"
    ):
        first.close()
    second.close()
    assert jax.nn.dot_product_attention is bound_before
    patched = jax_gluon.patch()
    with pytest.raises(RuntimeError, match="this thread has not entered"):
        patched.__exit__(None, None, None)


class _Later:
    def __call__(self):
        yield


@pytest.mark.parametrize(
    "later", [functools.partial(_Later().__call__), _Later()], ids=["partial", "object"]
)
def test_callables_whose_body_runs_later_are_not_decorated(later):
    with pytest.raises(TypeError, match="whose body runs after its call"):
        jax_gluon.patch()(later)
