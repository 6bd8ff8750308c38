"""Faults planted into what the gates of arm64's objects read: each is named."""

import shutil
import subprocess

import pytest

from tools.arm64 import emulator, instructions
from tools.arm64.instructions import LINUX
from tools.macos.target import LLVM

MACOS = instructions.macos(LLVM)
SYMBOLS = {
    "neon_dotprod.cc": ["0000 T neon_dotprod_kernelsEv", "0000 t inner", "     U operator new"],
    "neon_i8mm_bf16.cc": ["0000 T neon_i8mm_bf16_kernelsEv"],
    "device.cc": ["     U neon_dotprod_kernelsEv", "     U neon_i8mm_bf16_kernelsEv"],
    "portable.cc": ["0000 T portable_kernelsEv"],
}


@pytest.mark.parametrize(
    ("system", "name", "mnemonic", "is_allowed"),
    [
        (LINUX, "portable.cc", "fmla", True),
        (LINUX, "portable.cc", "sdot", False),
        (LINUX, "neon.cc", "bfcvtn2", False),
        (LINUX, "neon_dotprod.cc", "sdot", True),
        (LINUX, "neon_dotprod.cc", "usmmla", False),
        (LINUX, "neon_dotprod.cc", "ldaddal", False),
        (LINUX, "neon_i8mm_bf16.cc", "bfmmla", True),
        (LINUX, "device.cc", "casal", False),
        (LINUX, "device.cc", "stadd", False),
        (LINUX, "device.cc", "ldumaxalh", False),
        (LINUX, "device.cc", "crc32cx", False),
        (LINUX, "device.cc", "stp", True),
        (LINUX, "device.cc", "ldaxr", True),
        (MACOS, "device.cc", "casal", True),
        (MACOS, "portable.cc", "sdot", True),
        (MACOS, "portable.cc", "usmmla", False),
        (MACOS, "neon_dotprod.cc", "bfmmla", False),
    ],
)
def test_an_instruction_out_of_place_is_found(system, name, mnemonic, is_allowed):
    found = instructions.check_object(name, {"inner": {"ret", mnemonic}}, ["0 t inner"], system)
    assert found == ([] if is_allowed else [f"{name} holds {mnemonic}"])


@pytest.mark.parametrize("kind", ["T", "W"])
def test_a_shared_function_with_such_an_instruction_is_found(kind):
    """The linker may take it for all files."""
    found = {"std::sort": {"sdot", "ret"}, "inner": {"sdot"}}
    symbols = [f"0000 {kind} std::sort", "0000 t inner", "0000 T neon_dotprod_kernelsEv"]
    (problem,) = instructions.check_object("neon_dotprod.cc", found, symbols, LINUX)
    assert problem == "neon_dotprod.cc shares std::sort, which holds sdot"


def test_what_links_to_a_variant_past_the_choice_is_found():
    assert instructions.check_choice(SYMBOLS) == []
    past = SYMBOLS | {"portable.cc": ["     U neon_dotprod_kernelsEv"]}
    assert instructions.check_choice(past) == ["portable.cc names neon_dotprod_kernelsEv"]
    never = SYMBOLS | {"device.cc": ["     U neon_dotprod_kernelsEv"]}
    assert instructions.check_choice(never) == ["device.cc does not choose neon_i8mm_bf16.cc"]


def test_instructions_are_read_from_an_object(tmp_path):
    emulator.require(pytest)
    source, target = tmp_path / "source.s", tmp_path / "source.o"
    source.write_text(".arch armv8.2-a+i8mm\nf:\n\tusmmla v0.4s, v1.16b, v2.16b\n\tb.ne f\n\tret\n")
    subprocess.run([emulator.COMPILER, "-c", source, "-o", target], check=True)
    expected = {"f": {"usmmla", "b", "ret"}}
    assert instructions.functions(target, LINUX) == expected
    if shutil.which(MACOS.objdump):
        assert instructions.functions(target, MACOS) == expected
