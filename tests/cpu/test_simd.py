"""Each SIMD target's operations, one by one: simd/main.cc says what they are to give."""

import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tools.arm64 import emulator

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "cpu" / "simd" / "main.cc"
EVERY_FLOAT = PROGRAM.with_name("every_float.cc")
SIMD = ROOT / "plugin" / "cpu" / "simd"

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{x}" for x in ("f", "bw", "dq", "vl", "vnni", "bf16"))]
ARMV8_2 = "-march=armv8.2-a"
ROWS, BLOCKS = "-DTARGET_HAS_ROWS", "-DTARGET_HAS_BLOCKS"


class Target(NamedTuple):
    header: str
    struct: str
    flags: list[str]
    needs: frozenset[str] = frozenset()  # of the processor
    emulated: str = ""  # of arm64: the model that qemu is to be, elsewhere


TARGETS = {
    "portable": Target("portable.h", "Portable", []),
    "avx2": Target("avx2.h", "Avx2", AVX2, frozenset({"avx2", "fma", "f16c"})),
    "emulated_avx512": Target(
        "avx512.h", "Avx512", ["-DJAX_GLUON_EMULATE_AVX512", "-DTARGET_HAS_BF16"]
    ),
    "avx512": Target(
        "avx512.h", "Avx512", [*AVX512, "-DTARGET_HAS_BF16"],
        frozenset({"avx512bw", "avx512_vnni", "avx512_bf16"}),
    ),
    "neon": Target("neon.h", "Neon", [ROWS], emulated="cortex-a72"),
    "neon_dotprod": Target(
        "neon_dot.h", "NeonDot", [f"{ARMV8_2}+dotprod", ROWS], frozenset({"asimddp"}), "neoverse-n1"
    ),
    "neon_i8mm_bf16": Target(
        "neon_matrix.h", "NeonMatrix", [f"{ARMV8_2}+dotprod+i8mm+bf16", ROWS, BLOCKS],
        frozenset({"i8mm", "bf16"}), "max",
    ),
}  # fmt: skip
IS_ARM64 = platform.machine() in ("aarch64", "arm64")


def processor_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


def output_of(target: str, source: Path, folder: Path, *arguments: str, level: str = "-O1") -> str:
    """What a program of `source` prints, compiled for the target; it is to succeed."""
    header, struct, flags, needs, emulated = TARGETS[target]
    compiler, run = shutil.which("g++") or shutil.which("c++"), []
    if emulated and not IS_ARM64:
        emulator.require(pytest)
        compiler, run = emulator.COMPILER, [*emulator.command(emulated)]
        flags, needs = [*flags, "-static"], frozenset()
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = folder / target
    command = [
        compiler, "-std=c++17", level, "-ffp-contract=off", *flags,
        f"-DTARGET={struct}", f"-I{ROOT / 'plugin'}", "-include", SIMD / header,
        source, "-o", program,
    ]  # fmt: skip
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    if compiled.returncode != 0 and flags and "unrecognized" in compiled.stderr:
        pytest.skip(f"the compiler does not know {target}")
    assert compiled.returncode == 0, compiled.stderr
    if missing := needs - processor_flags():
        pytest.skip(f"compiled; the processor has no {', '.join(sorted(missing))}")
    finished = subprocess.run(
        [*run, program, *arguments], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_operations_give_what_they_say(target, tmp_path):
    assert output_of(target, PROGRAM, tmp_path) == "0 failures\n"


# One float in as many; a prime meets all ends of a mantissa. Of emulated processors fewer.
@pytest.mark.parametrize("target", TARGETS)
def test_exp2_of_samples(target, tmp_path):
    step = "400009" if TARGETS[target].emulated and not IS_ARM64 else "19997"
    assert "degree 5" in output_of(target, EVERY_FLOAT, tmp_path, step)


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", [x for x, its in TARGETS.items() if not its.emulated])
def test_exp2_of_every_float(target, tmp_path):
    print(target, output_of(target, EVERY_FLOAT, tmp_path, "1", level="-O2"), sep="\n")


def static_functions(header: str) -> set[str]:
    function = r"\n  static (?:JAX_GLUON_INLINE )?\w+ (\w+)\("
    return set(re.findall(function, (SIMD / header).read_text()))


def test_all_targets_have_the_same_operations_and_all_are_tested():
    # Of a target itself, or of bfloat16 and the transposed kernels, which only one has; of rows.
    own = {"map", "dot", "store_bf16_pair", "dot_bf16", "interleave_bf16", "any_less", "exp2_below"}
    lanes = {"load_row", "fma_lane", "dot_keys_lane", "dot_values_lane"}
    inner = {"map", "dot", "dot_lane", "dot_half", "exp2_half", "words", "floats"}
    own |= lanes | inner
    operations = static_functions("portable.h") - own
    assert len(operations) > 40
    for header in ("avx2.h", "avx512.h", "neon.h"):
        assert static_functions(header) - own == operations, header
    own |= static_functions("neon_dot.h") | static_functions("neon_matrix.h")
    sources = [PROGRAM.with_name(x) for x in ("main.cc", "checks.h", "rows_and_blocks.h")]
    text = "".join(path.read_text() for path in sources)
    tested = set(re.findall(r"\bT::(?:template )?(\w+)", text))
    assert not (operations | own) - inner - tested
