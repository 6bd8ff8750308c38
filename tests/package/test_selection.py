"""The choice of a kernel: pure rules over what a device offers, and that what is chosen runs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import CpuKernel, MetalKernel
from jax_gluon._arguments import check_arguments
from jax_gluon._errors import Checker
from jax_gluon._kernels import KERNEL_NAMES
from jax_gluon._plan import tuned_table
from jax_gluon._plan.choice import KernelQuery
from jax_gluon._plan.selection import (
    KernelOffer,
    KernelProblem,
    Measurement,
    SizeRange,
    candidates,
    select_kernel,
)
from jax_gluon._quantization.formats import PRESETS

LARGE = KernelProblem("forward", "float32", visible_keys=1024, T=1024, S=1024, H=64)
BASELINE = KernelOffer("cpu", "baseline", sizes={"block_k": SizeRange(256, 64, 256, 64)})
GLUON = KernelOffer(
    "cpu",
    "gluon",
    sizes={
        "block_k": SizeRange(512, 256, 4096, 128),
        "subtile": SizeRange(256, 128, 256, 128),
        "stages": SizeRange(2, 2, 8, 1),
    },
)
SMALL = KernelOffer("cpu", "small", reason="few of both")
DECODE = KernelOffer("cpu", "decode", reason="few queries")
METAL = KernelOffer("metal", "baseline"), KernelOffer("metal", "gluon")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "gluon: 512 visible keys and head dim 64, or more; here 1024 and 64"),
        (
            {"visible_keys": 512},
            "gluon: 512 visible keys and head dim 64, or more; here 512 and 64",
        ),
        (
            {"visible_keys": 511},
            "baseline: GLUON needs at least 512 visible keys and head dim 64; here 511 and 64",
        ),
        (
            {"H": 63},
            "baseline: GLUON needs at least 512 visible keys and head dim 64; here 1024 and 63",
        ),
        (
            {"visible_keys": 0},
            "baseline: GLUON needs at least 512 visible keys and head dim 64; here 0 and 64",
        ),
    ],
)
def test_the_default(changes, reason):
    problem = dataclasses.replace(LARGE, **changes)
    for offers in ((BASELINE, GLUON), METAL):
        kernel, found = select_kernel(problem, offers)
        assert found == reason
        assert kernel.name == reason.split(":")[0]
    assert select_kernel(problem, METAL)[0] == MetalKernel(reason.split(":")[0])


@pytest.mark.parametrize("faster", ["baseline", "gluon"])
def test_the_pipeline_that_is_faster_on_the_device_goes_before_sizes(faster):
    offers = [
        dataclasses.replace(x, reason="so it is" if x.name == faster else "")
        for x in (BASELINE, GLUON)
    ]
    for keys in (100, 1024):
        problem = dataclasses.replace(LARGE, visible_keys=keys)
        kernel, reason = select_kernel(problem, offers)
        assert (kernel.name, reason) == (faster, f"{faster}: so it is")
    # What was measured here knows better.
    kernel, _ = select_kernel(LARGE, offers, [row()])
    assert kernel == row().fastest


def test_a_kernel_made_for_such_problems_goes_first():
    everything = (DECODE, BASELINE, GLUON, SMALL)
    few = dataclasses.replace(LARGE, T=4, S=128)
    assert select_kernel(few, everything) == (CpuKernel("small"), "small: few of both")
    assert select_kernel(dataclasses.replace(few, S=129), everything)[0] == CpuKernel("decode")
    assert select_kernel(LARGE, everything[1:]) == (CpuKernel("small"), "small: few of both")
    measured = [row()]
    assert select_kernel(LARGE, everything[:3], measured) == (
        CpuKernel("decode"),
        "decode: few queries",
    )
    assert select_kernel(LARGE, [BASELINE])[1] == "baseline: the one kernel of this pass"


@pytest.mark.parametrize(("T", "S", "is_small"), [(64, 56, True), (65, 56, False), (64, 57, False)])
def test_products_of_bfloat16_are_faster_than_those_of_small(T, S, is_small):
    products = dataclasses.replace(BASELINE, arithmetic="bfloat16"), GLUON, SMALL
    problem = dataclasses.replace(LARGE, operands="bfloat16", visible_keys=S, T=T, S=S)
    assert select_kernel(problem, products)[0].name == ("small" if is_small else "baseline")
    assert select_kernel(problem, (BASELINE, GLUON, SMALL))[0].name == "small"


def row(operands="float32", direction="forward", H=64, S=1024, baseline=1.0, gluon=0.9):
    seconds = {BASELINE.kernel(): baseline, GLUON.kernel(): gluon}
    return Measurement(operands, direction, H, S, seconds)


def test_what_was_measured_decides():
    kernel, reason = select_kernel(LARGE, (BASELINE, GLUON), [row()])
    assert kernel == CpuKernel("gluon", 512, 256, 2)
    assert reason == (
        "gluon: measured here at 1024 keys and head dim 64, gluon takes 0.90 times as long as "
        "baseline"
    )
    for gluon in (1.1, 1.0):  # slower, as fast
        assert select_kernel(LARGE, (BASELINE, GLUON), [row(gluon=gluon)])[0].name == "baseline"
    # Of other operands or the other direction: the default.
    others = [row(operands="int8", gluon=2.0), row(direction="backward", gluon=2.0)]
    kernel, reason = select_kernel(LARGE, (BASELINE, GLUON), others)
    assert kernel.name == "gluon"
    assert "measured" not in reason


def test_the_nearest_row_decides():
    rows = [row(S=256, gluon=3.0), row(S=2048, gluon=0.5), row(H=128, S=1024, gluon=4.0)]

    def chosen(**changes):
        return select_kernel(dataclasses.replace(LARGE, **changes), (BASELINE, GLUON), rows)

    for keys, name in ((128, "baseline"), (700, "baseline"), (800, "gluon"), (10**6, "gluon")):
        assert chosen(visible_keys=keys)[0].name == name
    # The head dim goes before the keys.
    assert "head dim 128" in chosen(visible_keys=2048, H=100)[1]
    # No keys, no distance.
    assert "here 0 and 64" in chosen(visible_keys=0)[1]


def test_sizes_that_are_not_offered_give_their_kernel():
    """A table of integers where the problem's codes have to be multiplied as floats."""
    narrow = dataclasses.replace(GLUON, sizes=GLUON.sizes | {"subtile": SizeRange(64, 64, 64, 64)})
    kernel, reason = select_kernel(LARGE, (BASELINE, narrow), [row(gluon=0.5)])
    assert kernel == narrow.kernel()
    assert reason.endswith("it is faster")


@pytest.mark.parametrize(
    ("kernel", "is_taken"),
    [
        (CpuKernel("gluon", 512, 256, 2), True),
        (CpuKernel("gluon", 4096, 128, 8), True),
        (CpuKernel("gluon", 640, 128, 3), True),
        (CpuKernel("gluon", 256, 256, 2), False),  # one subtile
        (CpuKernel("gluon", 640, 256, 2), False),  # no whole ones
        (CpuKernel("gluon", 512, 100, 2), False),
        (CpuKernel("gluon", 8192, 256, 2), False),
        (CpuKernel("gluon", 512, 256, 1), False),
        (CpuKernel("gluon", 512, 256, 9), False),
        (CpuKernel("gluon", 512, 256), False),
        (CpuKernel("baseline", 256), False),
        (MetalKernel("gluon"), False),
    ],
)
def test_sizes_that_an_offer_takes(kernel, is_taken):
    assert GLUON.takes(kernel) == is_taken


def test_sizes_that_are_left_out():
    assert GLUON.kernel() == CpuKernel("gluon", 512, 256, 2)
    assert GLUON.kernel(subtile=128) == CpuKernel("gluon", 512, 128, 2)
    assert GLUON.kernel(block_k=1024, stages=3) == CpuKernel("gluon", 1024, 256, 3)
    # Two subtiles of the preferred size do not fit, or are no whole ones.
    assert GLUON.kernel(block_k=256) == CpuKernel("gluon", 256, 128, 2)
    assert GLUON.kernel(block_k=640) == CpuKernel("gluon", 640, 128, 2)
    assert not GLUON.takes(GLUON.kernel(block_k=300))
    # A kernel without subtiles does not get one.
    assert not BASELINE.takes(BASELINE.kernel(subtile=64))
    assert BASELINE.kernel(block_k=64) == CpuKernel("baseline", 64)


# --- What the devices of this machine offer ---


@pytest.fixture(autouse=True)
def _no_table(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_GLUON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("JAX_GLUON_KERNEL", raising=False)


@pytest.fixture
def shape():
    """A large problem."""
    pytest.importorskip("jax_gluon._plugin")
    return jax.ShapeDtypeStruct((1, 1024, 1, 64), jnp.float32)


def test_python_names_the_kernels_of_the_plugin():
    plugin = pytest.importorskip("jax_gluon._plugin")
    assert plugin.KERNEL_NAMES == KERNEL_NAMES


def found_offers(direction="forward", *, T=1024, S=1024, H=64, device="cpu", **keywords):
    """The choice's problem and the offers; an offset makes positions free."""
    pytest.importorskip("jax_gluon._plugin")
    found = []
    has_offset = keywords.pop("has_offset", False)

    def look(q, k):
        checked = check_arguments(
            Checker("test"), q, k, k, None, None, implementation=device, **keywords
        )
        operands = checked.operands
        if has_offset:
            operands = operands._replace(query_offset=jnp.zeros(1, jnp.int32))
        found.append(KernelQuery.of(checked.problem, operands).offers(direction, device))

    q, k = (jax.ShapeDtypeStruct((1, length, 2, H), jnp.float32) for length in (T, S))
    jax.eval_shape(look, q, k)
    return found[0]


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, 1024),
        ({"S": 300}, 300),
        ({"T": 300}, 1024),
        ({"T": 300, "is_causal": True}, 300),
        ({"T": 300, "is_causal": True, "has_offset": True}, 1024),
        ({"S": 300, "is_causal": True}, 300),
        ({"local_window_size": (100, 20)}, 121),
        ({"local_window_size": (100, 20), "is_causal": True}, 101),
        ({"local_window_size": (5000, 5000)}, 1024),
        ({"T": 1, "is_causal": True}, 1),
        ({"S": 0}, 0),
    ],
)
def test_the_most_keys_that_a_row_sees(changes, keys):
    problem, _ = found_offers(**changes)
    assert problem.visible_keys == keys
    T, S = changes.get("T", 1024), changes.get("S", 1024)
    left, right = changes.get("local_window_size", (T + S, S))
    # One row after another, as the mask says it.
    first = S - T if changes.get("has_offset") else 0
    seen = [
        sum(i - left <= j <= i + right and (j <= i or "is_causal" not in changes) for j in range(S))
        for i in range(first, first + T)
    ]
    assert max(seen, default=0) <= keys
    if S + left <= T or changes.get("has_offset"):
        assert max(seen) == keys


@pytest.mark.parametrize(
    ("changes", "names", "arithmetic"),
    [
        ({}, ["baseline", "gluon"], "float32"),
        ({"S": 256}, ["small", "baseline", "gluon"], "float32"),
        ({"T": 32, "S": 257}, ["baseline", "gluon"], "float32"),
        ({"T": 4, "S": 257}, ["decode", "baseline", "gluon"], "float32"),
        ({"T": 4, "S": 4}, ["small", "decode", "baseline", "gluon"], "float32"),
        ({"T": 5, "S": 257}, ["baseline", "gluon"], "float32"),
        ({"quantization": "int8"}, ["baseline", "gluon"], "int8"),
        (
            {"quantization": PRESETS["int8"], "T": 4, "S": 4},
            ["decode", "baseline", "gluon"],
            "int8",
        ),
        ({"direction": "backward", "quantization": "int8"}, ["baseline", "gluon"], "float32"),
        ({"direction": "backward", "T": 128, "S": 128}, ["small", "baseline", "gluon"], "float32"),
        ({"direction": "backward", "T": 129, "S": 9}, ["baseline", "gluon"], "float32"),
        ({"direction": "backward", "T": 9, "S": 129}, ["baseline", "gluon"], "float32"),
        ({"direction": "backward_bias", "T": 9, "S": 9}, ["baseline"], "float32"),
    ],
)
def test_what_the_cpu_offers(monkeypatch, changes, names, arithmetic):
    monkeypatch.setenv("JAX_GLUON_CPU_ISA", "portable")
    _, offers = found_offers(**changes)
    assert [offer.name for offer in offers] == names
    assert {offer.arithmetic for offer in offers} == {arithmetic} or names[0] == "small"
    for offer in offers:
        assert offer.takes(offer.kernel())


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("H", [64, 128])
def test_what_is_tuned_is_offered(direction, quantization, H):
    _, offers = found_offers(direction, S=4096, T=4096, H=H, quantization=quantization)
    kernels = candidates(offers)
    assert len(set(kernels)) == len(kernels) >= 4
    assert {kernel.name for kernel in kernels} == {"baseline", "gluon"}
    for kernel in kernels:
        assert sum(offer.takes(kernel) for offer in offers) == 1
    assert candidates(METAL) == (MetalKernel("baseline"), MetalKernel("gluon"))


# --- From the argument to what ran ---


def names(x, **keywords):
    plan = jax_gluon.explain(x, x, x, **keywords)
    return plan.forward.name, plan.backward.name, plan.reasons


def test_the_argument_goes_before_the_environment(shape, monkeypatch):
    assert names(shape)[:2] == ("gluon", "gluon")
    monkeypatch.setenv("JAX_GLUON_KERNEL", "baseline")
    *found, reasons = names(shape)
    assert found == ["baseline", "baseline"]
    assert reasons[1:] == (
        "forward: baseline: JAX_GLUON_KERNEL says so",
        "backward: baseline: JAX_GLUON_KERNEL says so",
    )
    *found, reasons = names(shape, kernel="gluon")
    assert found == ["gluon", "gluon"]
    assert reasons[1] == 'forward: gluon: asked for by kernel="gluon"'
    assert names(shape, kernel=("gluon", None))[:2] == ("gluon", "baseline")
    monkeypatch.setenv("JAX_GLUON_KERNEL", "fast")
    with pytest.raises(
        ValueError, match='JAX_GLUON_KERNEL is "fast"; allowed: "baseline", "gluon"'
    ):
        names(shape)


def test_the_environment_goes_before_the_table(shape, monkeypatch):
    path = tuned_table.table_path("cpu")
    assert path is not None
    tuned_table.save(path, "cpu", tuned_table.Table((row(), row(direction="backward", gluon=1.5))))
    *found, reasons = names(shape)
    assert found == ["gluon", "baseline"]
    assert "measured here" in reasons[1]
    assert "baseline" in reasons[2]
    monkeypatch.setenv("JAX_GLUON_KERNEL", "baseline")
    assert names(shape)[:2] == ("baseline", "baseline")


@pytest.mark.parametrize(
    ("kernel", "found", "allowed"),
    [
        (CpuKernel("gluon", block_k=8192), "block_k=8192", "in steps of"),
        (CpuKernel("gluon", subtile=100), "subtile=100", "subtile "),
        (CpuKernel("gluon", stages=1), "stages=1", "stages 2 to 8"),
        (CpuKernel("baseline", block_k=512), "block_k=512", "block_k 64 to 256 in steps of 64"),
        (CpuKernel("baseline", stages=2), "stages=2", "forward on cpu has"),
        ("small", '"small"', 'forward on cpu has "baseline" '),
        ((None, CpuKernel("baseline", 64)), "block_k=64", "backward on cpu has"),
        ((None, CpuKernel("gluon", 300)), "block_k=300", "block_k two subtiles or more"),
        ((None, "decode"), '"decode"', 'backward on cpu has "baseline" '),
    ],
)
def test_a_kernel_that_a_device_lacks(shape, kernel, found, allowed):
    with pytest.raises(ValueError, match=r"jax_gluon\.explain: kernel is ") as error:
        jax_gluon.explain(shape, shape, shape, kernel=kernel)
    assert found in str(error.value)
    assert allowed in str(error.value)
    # A call says it too.
    x = jnp.zeros(shape.shape)
    with pytest.raises(ValueError, match=r"jax_gluon\.dot_product_attention: kernel is "):
        jax_gluon.dot_product_attention(x, x, x, kernel=kernel, implementation="cpu")


def test_a_kernel_of_one_device_concerns_it_alone(shape, monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    kernel = CpuKernel("gluon", block_k=1024)
    assert jax_gluon.explain(shape, shape, shape, kernel=kernel).forward.block_k == 1024
    assert names(shape, kernel=MetalKernel("baseline"))[:2] == ("gluon", "gluon")
    with pytest.raises(ValueError, match=r"kernel is MetalKernel.* for implementation 'cpu'"):
        names(shape, kernel=MetalKernel("gluon"), implementation="cpu")


def test_without_a_pair_backward_takes_what_it_has():
    pytest.importorskip("jax_gluon._plugin")
    q, k = (jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32) for length in (1, 1024))
    plan = jax_gluon.explain(q, k, k, kernel="decode")
    assert (plan.forward.name, plan.backward.name) == ("decode", "gluon")
    large = jax.ShapeDtypeStruct((1, 1024, 1, 64), jnp.float32)
    plan = jax_gluon.explain(large, large, large, kernel=CpuKernel("gluon", block_k=1024))
    assert (plan.forward.block_k, plan.backward.name) == (1024, "gluon")
    assert plan.backward.block_k != 1024


#: Problems whose plans are run: every kernel of the CPU, forward and backward.
RUNS = {
    "small": (dict(T=65, S=100), {}),
    "decode": (dict(T=2, S=900), {}),
    "decode_int8": (dict(T=2, S=900), {"quantization": PRESETS["int8"]}),
    "baseline": (dict(T=65, S=300), {}),
    "baseline_int8": (dict(T=65, S=200), {"quantization": "int8"}),
    "gluon": (dict(T=70, S=600), {}),
    "gluon_int4": (dict(T=70, S=600), {"quantization": "int4"}),
    "long": (dict(T=40, S=2100, H=72), {}),
    "asked_for": (dict(T=9, S=7), {"kernel": "gluon"}),
    "sized": (
        dict(T=70, S=600),
        {"kernel": (CpuKernel("gluon", 768, stages=3), CpuKernel("gluon", 384, 192, 4))},
    ),
    "baseline_sized": (
        dict(T=70, S=300),
        {"kernel": (CpuKernel("baseline", 128), CpuKernel("baseline", 96))},
    ),
}


def run_and_explain(device, T, S, keywords, H=64, dtype="float32"):
    """What was said of a problem with a bias, and what ran: one after another."""
    rng = np.random.default_rng(T)
    q, k, v = (jnp.asarray(rng.standard_normal((2, length, 2, H)), dtype) for length in (T, S, S))
    bias = jnp.asarray(rng.standard_normal((1, 1, T, S)), dtype)

    def loss(q, k, v, bias):
        out = jax_gluon.dot_product_attention(q, k, v, bias, implementation=device, **keywords)
        return (out.astype(jnp.float32) ** 2).sum()

    jax_gluon.debug.kernels()
    jax.block_until_ready(jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, bias))
    plan = jax_gluon.explain(q, k, v, bias, implementation=device, **keywords)
    runs = {run["pass"]: run for run in jax_gluon.debug.kernels()}
    assert set(runs) == {"forward", "backward", "backward_bias"}
    return plan, runs


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("variant", ["default", "portable"])
def test_what_is_explained_is_what_runs(require, monkeypatch, variant, name):
    require("cpu")
    if variant != "default":
        monkeypatch.setenv("JAX_GLUON_CPU_ISA", variant)
    problem, keywords = RUNS[name]
    plan, runs = run_and_explain("cpu", problem["T"], problem["S"], keywords, problem.get("H", 64))
    for direction, run in runs.items():
        kernel = getattr(plan, direction)
        assert run["device"] == "cpu"
        assert run["variant"] == jax_gluon._plugin.cpu_isa()
        assert run["kernel"] == kernel.name
        sizes = {size: getattr(kernel, size) or 0 for size in ("block_k", "subtile", "stages")}
        if "subtile" not in sizes or kernel.subtile is None:
            sizes.pop("subtile")  # fixed
        assert {size: run[size] for size in sizes} == sizes
    forward = runs["forward"]
    assert forward["arithmetic"] == ("int8" if "quantization" in keywords else "float32")
    if name in ("small", "decode", "baseline", "gluon"):
        assert forward["kernel"] == name


@pytest.mark.parametrize("name", ["decode", "baseline", "gluon", "gluon_int4"])
def test_what_is_explained_is_what_runs_on_metal(require, name):
    require("metal")
    problem, keywords = RUNS[name]
    plan, runs = run_and_explain("metal", problem["T"], problem["S"], keywords)
    for direction, run in runs.items():
        assert run["device"] == "metal"
        assert MetalKernel(run["kernel"]) == getattr(plan, direction)
    assert runs["forward"]["kernel"] == name.partition("_")[0]
    functions = runs["forward"]["variant"].split(", ")
    assert ("attention_decode_combine" in functions) == (name == "decode")
    assert any("_gluon_" in function for function in functions) == name.startswith("gluon")
    arithmetic = {"half": "float16", "float": "float32"}
    assert runs["forward"]["arithmetic"] == next(
        arithmetic[part] for part in functions[0].split("_") if part in arithmetic
    )


def test_the_choice_shows_in_the_program(shape):
    forward, backward = CpuKernel("gluon", 768, 128, 3), CpuKernel("gluon", 384, 96, 4)

    def loss(x):
        out = jax_gluon.dot_product_attention(
            x, x, x, implementation="cpu", kernel=(forward, backward)
        )
        return out.sum()

    text = jax.jit(jax.grad(loss)).lower(shape).as_text()
    assert re.findall(r'cpu_kernel = "(\w+)"', text) == ["gluon", "gluon"]
    for name, values in {"block_k": (768, 384), "subtile": (128, 96), "stages": (3, 4)}.items():
        assert re.findall(rf"cpu_{name} = (\d+)", text) == [str(x) for x in values]


def test_the_log_of_what_ran_has_an_end(shape):
    del shape
    x = jnp.ones((1, 2, 1, 8))
    attend = jax.jit(lambda x: jax_gluon.dot_product_attention(x, x, x, implementation="cpu"))
    for _ in range(300):
        out = attend(x)
    jax.block_until_ready(out)
    assert len(jax_gluon.debug.kernels(reset=False)) == 256
    assert len(jax_gluon.debug.kernels()) == 256
    assert jax_gluon.debug.kernels() == []
