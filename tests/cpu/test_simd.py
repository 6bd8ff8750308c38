"""Each SIMD target's operations, one by one: simd/main.cc says what they are to give."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "cpu" / "simd" / "main.cc"
SIMD = ROOT / "plugin" / "cpu" / "simd"

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{x}" for x in ("f", "bw", "dq", "vl", "vnni", "bf16"))]
# Of each target: its header, its struct, the compiler's flags, and what the processor needs for it.
TARGETS = {
    "portable": ("portable.h", "Portable", [], set()),
    "avx2": ("avx2.h", "Avx2", AVX2, {"avx2", "fma", "f16c"}),
    "emulated_avx512": ("avx512.h", "Avx512", ["-DJAX_GLUON_EMULATE_AVX512"], set()),
    "avx512": ("avx512.h", "Avx512", AVX512, {"avx512bw", "avx512_vnni", "avx512_bf16"}),
}


def processor_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


@pytest.mark.parametrize("target", TARGETS)
def test_operations_give_what_they_say(target, tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    header, struct, flags, needs = TARGETS[target]
    program = tmp_path / target
    has_bf16 = ["-DTARGET_HAS_BF16"] if struct == "Avx512" else []
    command = [
        compiler, "-std=c++17", "-O1", "-ffp-contract=off", *flags, *has_bf16,
        f"-DTARGET={struct}", f"-I{ROOT / 'plugin'}", "-include", SIMD / header,
        PROGRAM, "-o", program,
    ]  # fmt: skip
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    if compiled.returncode != 0 and flags and "unrecognized" in compiled.stderr:
        pytest.skip(f"the compiler does not know {target}")
    assert compiled.returncode == 0, compiled.stderr
    if missing := needs - processor_flags():
        pytest.skip(f"compiled; the processor has no {', '.join(sorted(missing))}")
    finished = subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout == "0 failures\n"


def static_functions(header: str) -> set[str]:
    function = r"\n  static (?:JAX_GLUON_INLINE )?\w+ (\w+)\("
    return set(re.findall(function, (SIMD / header).read_text()))


def test_all_targets_have_the_same_operations_and_all_are_tested():
    # Of a target itself, or of bfloat16 and the transposed kernels, which only one has.
    own = {"map", "dot", "store_bf16_pair", "dot_bf16", "interleave_bf16", "any_less", "exp2_below"}
    operations = static_functions("portable.h") - own
    assert len(operations) > 40
    for header in ("avx2.h", "avx512.h"):
        assert static_functions(header) - own == operations, header
    tested = set(re.findall(r"\bT::(\w+)", PROGRAM.read_text()))
    assert not (operations | own) - {"map", "dot"} - tested
