"""The self-test of a Metal device, before calls go to it unasked: on the software device."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="plants faults in the device")

# A table as `jax-gluon tune` keeps it, by which any work pays on the GPU.
HEAD = """
import json, threading, warnings
import jax, numpy as np
import jax_gluon
from jax_gluon import _native, debug
from jax_gluon._plan import tuned_table
from jax_gluon._plan.tuned_table import Crossover, Table

attend = jax.jit(lambda *x: jax_gluon.dot_product_attention(*x))
rng = np.random.default_rng(0)
x = [rng.standard_normal((2, n, 2, 16), np.float32) for n in (5, 9, 9)]
exact = np.asarray(jax_gluon.dot_product_attention(*x, implementation="xla"))

def tune(min_products):
    path = tuned_table.table_path("metal")
    if path is not None:
        tuned_table.save(path, "metal", Table((), (Crossover("float32", min_products, 10**9),)))

def show(**more):
    print("@" + json.dumps(more))
"""

PROGRAM = (
    HEAD
    + """
tune(0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    right = bool(np.abs(attend(*x) - exact).max() < 1e-5)
    again = jax_gluon.dot_product_attention(x[0][:1], x[1][:1], x[2][:1])
ran = [run["device"] for run in debug.kernels()]
try:
    jax_gluon.dot_product_attention(*x, implementation="metal")
    error = ""
except RuntimeError as found:
    error = str(found)
show(
    right=right, ran=ran, error=error, reason=jax_gluon.explain(*x).reasons[0],
    warnings=[str(each.message) for each in caught],
    verdict=_native.plugin().metal_self_test(False),
    tested=any("bfloat" in each["kernel"] for each in debug.metal_counters()),
)
"""
)


def run(program, folder, fault="", **environment):
    """What the program shows."""
    settings = {
        "JAX_GLUON_CACHE_DIR": str(folder),
        "JAX_GLUON_METAL_BY_DEFAULT": "1",
        # The software device compiles its kernels first, which takes minutes on a busy machine.
        "JAX_GLUON_METAL_SELF_TEST_SECONDS": "900",
        "SOFTMETAL_FAULT": fault,
    }
    finished = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=1000,
        env=os.environ | settings | environment,
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads(x[1:]) for x in finished.stdout.splitlines() if x.startswith("@")][-1]


def test_a_device_that_is_right_is_taken_and_remembered(tmp_path):
    """Also after a failure of another package, system or device."""
    first = run(PROGRAM, tmp_path)
    assert first["right"]
    assert first["ran"] == ["metal", "metal"]
    assert first["error"] == ""
    assert first["warnings"] == []
    assert first["reason"].startswith(
        f"{2 * 2 * 5 * 9 * 32} multiply-accumulates are enough for the GPU (from 0 on, as measured"
    )
    file = tmp_path / "metal-self-test.txt"
    assert first["verdict"] == {
        "passed": True, "why": "", "remembered": False, "file": str(file)
    }  # fmt: skip

    assert first["tested"]

    second = run(PROGRAM, tmp_path)
    assert second["ran"] == ["metal", "metal"]
    assert second["verdict"]["remembered"]
    assert not second["tested"]
    subject, *_ = file.read_text("utf-8").splitlines()
    for part in ("Software Metal", f"jax-gluon {_version()}", os.uname().release):
        assert part in subject
    file.write_text(f"{subject} of another day\nfailed\nwas wrong\n", "utf-8")
    assert run(PROGRAM, tmp_path)["verdict"]["passed"]
    # What is remembered is believed, of the same.
    file.write_text(f"{subject}\nfailed\nwas wrong\n", "utf-8")
    third = run(PROGRAM, tmp_path)
    assert third["ran"] == ["cpu", "cpu"]
    assert third["verdict"]["remembered"]
    assert "self-test: was wrong" in third["error"]


def _version():
    from jax_gluon import __version__

    return __version__


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("lost_threadgroup", "float32 fails: the output differs from the CPU's by 0."),
        ("compile_failure", "float32 fails: Metal: Metal does not compile attention_forward"),
        ("hang", "it did not end within 0.5 seconds"),
    ],
)
def test_a_device_that_is_not_right_is_left_alone(tmp_path, fault, why):
    seconds = "0.5" if fault == "hang" else "900"
    found = run(PROGRAM, tmp_path, fault, JAX_GLUON_METAL_SELF_TEST_SECONDS=seconds)
    assert found["right"]
    assert found["ran"] == ["cpu", "cpu"]
    assert found["verdict"]["why"].startswith(why)
    (warning,) = found["warnings"]
    for text in (warning, found["reason"], found["error"]):
        assert '"Software Metal" did not pass jax_gluon\'s self-test: ' + why in text
    assert 'implementation is "metal"' in found["error"]
    if fault in ("lost_threadgroup", "compile_failure"):
        assert "; so do float16, bfloat16, int8, int4" in found["verdict"]["why"]


LATE = """
import json, time
from jax_gluon import _native
from jax_gluon._plan.tuned_table import cache_folder

def kept():
    return (cache_folder() / "metal-self-test.txt").read_text("utf-8").splitlines()[1]

passed, first = _native.plugin().metal_self_test(False)["passed"], kept()
end = time.monotonic() + 900
while kept() != "passed" and time.monotonic() < end:
    time.sleep(0.1)
print("@" + json.dumps([passed, first, kept()]))
"""


def test_a_device_that_was_late_is_right_for_later_processes(tmp_path):
    """As where other programs keep the machine from compiling; each command buffer takes 0.2 s."""
    seconds = {"JAX_GLUON_METAL_SELF_TEST_SECONDS": "0.3"}
    assert run(LATE, tmp_path, "slow_completion", **seconds) == [False, "failed", "passed"]


THREADS = (
    HEAD
    + """
table = tuned_table.measured
tuned_table.measured = lambda device: Table((), (Crossover("float32", 0, 10**9),))
debug.metal_counters()
outs = {}
def work(i):
    outs[i] = np.asarray(attend(*(each + i for each in x)))
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
right = all(
    np.abs(outs[i] - jax_gluon.dot_product_attention(*(each + i for each in x),
                                                     implementation="xla")).max() < 1e-4
    for i in range(4)
)
kernels = [each["kernel"] for each in debug.metal_counters()]
show(right=right, tests=kernels.count("attention_forward_bfloat_64")
     + kernels.count("attention_forward_gluon_bfloat_64"), own=kernels.count(
     "attention_forward_float_64"), verdict=_native.plugin().metal_self_test(False))
"""
)


def test_threads_wait_for_one_test_without_a_cache_folder(tmp_path):
    """A folder that can't be made: there is a file of its name."""
    folder = tmp_path / "file"
    folder.write_text("in the way")
    found = run(THREADS, folder)
    assert found["right"]
    assert found["tests"] == 1
    assert found["own"] == 4
    assert found["verdict"] == {"passed": True, "why": "", "remembered": False, "file": ""}


EXPORTED = (
    HEAD
    + """
import sys
tune(0)
if sys.argv[1:] == ["export"]:
    exported = jax.export.export(attend, disabled_checks=jax_gluon.export_checks())(*x)
    open(FILE, "wb").write(exported.serialize())
    attend(*x)
    show(ran=[run["device"] for run in debug.kernels()])
else:
    attend = jax.export.deserialize(bytearray(open(FILE, "rb").read())).call
    right = bool(np.abs(attend(*x) - exact).max() < 1e-5)
    show(right=right, ran=[run["device"] for run in debug.kernels()])
"""
)


def test_a_program_that_was_traced_elsewhere_is_guarded_too(tmp_path):
    pytest.importorskip("flatbuffers")
    program = f"FILE = {str(tmp_path / 'program')!r}\n" + EXPORTED
    first = run("import sys; sys.argv = ['', 'export']\n" + program, tmp_path / "one")
    assert first == {"ran": ["metal"]}
    found = run(program, tmp_path / "other", "lost_threadgroup")
    assert found == {"right": True, "ran": ["cpu"]}
