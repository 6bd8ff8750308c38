"""Counts the instructions of the arm64 kernels' inner loops: `python -m tools.arm64.counts`.

Each loop is compiled as the plugin is, and read from the assembly; llvm-mca's models of processors
say how many cycles a round takes, and how many its products alone would. Counted, not timed: no
processor runs anything. Shares that are below their bar say so. It fails where a loop spills.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tools/arm64/counted.cc"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", f"-I{ROOT / 'plugin'}"]
GCC = ["aarch64-linux-gnu-g++", "-fno-schedule-insns", "-fno-predictive-commoning"]
CLANG = ["clang++-22", "--target=aarch64-linux-gnu"]
MCA = "llvm-mca-22"
PRODUCTS = re.compile(r"^(fmla|[su]mlal2?|[su]dot|[su]mmla|usmmla|bfmmla)\b")
KEYS = 64  # of a row that a softmax counts


class Variant(NamedTuple):
    header: str
    target: str
    flags: list[str]
    models: tuple[str, ...]


VARIANTS = {
    "neon": Variant("neon.h", "Neon", [], ("neoverse-n1", "apple-m1")),
    "neon_dotprod": Variant(
        "neon_dot.h", "NeonDot", ["-march=armv8.2-a+dotprod"], ("neoverse-n1", "apple-m1")
    ),
    "neon_i8mm_bf16": Variant(
        "neon_matrix.h",
        "NeonMatrix",
        ["-march=armv8.2-a+dotprod+i8mm+bf16", "-DTARGET_HAS_BLOCKS"],
        ("neoverse-v1", "neoverse-v2", "apple-m2"),
    ),
}
# Of a multiply-accumulate instruction.
PER_INSTRUCTION = {
    "fmla": 4,
    "smlal": 4,
    "smlal2": 4,
    "sdot": 16,
    "smmla": 32,
    "usmmla": 32,
    "bfmmla": 16,
}
LOOPS = {"score_tile": "scores", "value_tile": "P V", "transposed_tile": "dK, dV"}
CORES = {"F32Core": "float32", "Bf16Core": "bfloat16", "Int8Core": "INT8"}
# The share of the products' slots, in percent, at least.
BARS = {"float32": 85, "INT8": 80, "bfloat16": 75}


def assembly(compiler: list[str], variant: Variant) -> list[str]:
    command = [
        *compiler, *FLAGS, *variant.flags, f"-DTARGET={variant.target}", "-include",
        str(ROOT / "plugin/cpu/simd" / variant.header), "-S", str(SOURCE), "-o", "-",
    ]  # fmt: skip
    if compiler[0].startswith("clang"):
        command += ["-isystem", "/usr/aarch64-linux-gnu/include"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def functions(lines: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    name = ""
    for line in lines:
        if match := re.match(r"^(_Z\S+):", line):
            name = match[1]
            found[name] = []
        elif ".cfi_endproc" in line:
            name = ""
        elif name and re.match(r"^(\.L\S+:|\t[a-z])", line):
            found[name].append(re.sub(r"\s*(//|;).*", "", line.strip()))
    return found


def inner_loop(body: list[str]) -> list[str]:
    """The loop that has the most products."""
    loops = []
    for end, line in enumerate(body):
        match = re.match(r"(?:b\.?\w+|cbnz|cbz|tbnz)\b.*?(\.L\w+)$", line)
        if match and f"{match[1]}:" in body[:end]:
            inside = body[body.index(f"{match[1]}:") : end + 1]
            loops.append([each for each in inside if not each.endswith(":")])
    return max(loops, key=lambda loop: sum(map(bool, map(PRODUCTS.match, loop))), default=[])


def cycles(instructions: list[str], model: str) -> float:
    """Of a round, by the model, in a long run of them."""
    text = "\n".join(["round:", *(re.sub(r"\.L\w+$", "round", each) for each in instructions)])
    rounds = 200
    command = [
        MCA, "-mtriple=aarch64-linux-gnu", f"-mcpu={model}", f"-iterations={rounds}",
        "-mattr=+i8mm,+bf16,+dotprod", "-instruction-info=0", "-resource-pressure=0",
    ]  # fmt: skip
    shown = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    total = re.search(r"Total Cycles:\s+(\d+)", shown)
    assert total is not None
    return int(total[1]) / rounds


def spills_of(instructions: list[str]) -> int:
    """Instructions that read or write the stack, by its pointer or the frame's."""
    return sum("[sp" in each or "[x29" in each for each in instructions)


class Count(NamedTuple):
    variant: str
    loop: str
    element: str
    instructions: int
    products: int
    instruction: str
    spills: int
    shares: dict[str, float]

    def row(self) -> str:
        # One in nine dot products of P V takes away by how much probabilities are shifted.
        useful = self.products * 8 // 9 if self.products % 9 == 0 else self.products
        macs = useful * PER_INSTRUCTION[self.instruction]
        bar = BARS[self.element]
        percent = {model: round(100 * x) for model, x in self.shares.items()}
        shares = ", ".join(
            f"{model} {x} %" + ("" if x >= bar else f" (bar {bar} %)")
            for model, x in percent.items()
        )
        return (
            f"| `{self.variant}` | {self.loop} | {self.element} | {self.products} "
            f"{self.instruction.upper()} of {self.instructions} | {macs / self.instructions:.1f} "
            f"| {self.spills} | {shares} |"
        )


def count_loop(name: str, function: str, body: list[str], variant: Variant) -> Count:
    kind = next(x for x in LOOPS if x in function)
    element = next((x for each, x in CORES.items() if each in function), "float32")
    loop = inner_loop(body)
    products = [each for each in loop if PRODUCTS.match(each)]
    shares = {x: cycles(products, x) / cycles(loop, x) for x in variant.models}
    return Count(
        name, LOOPS[kind], element, len(loop), len(products), products[0].split()[0],
        spills_of(loop), shares,
    )  # fmt: skip


def count_softmax(function: str, body: list[str]) -> str:
    instructions = [each for each in body if not each.endswith(":")]
    element = next(x for each, x in CORES.items() if each in function)
    spills = spills_of(instructions)
    return (
        f"{element}: {len(instructions) / KEYS:.1f} ({spills} of {len(instructions)} on the stack)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clang", action="store_true", help="with clang in place of GCC")
    arguments = parser.parse_args()
    wrong: list[str] = []
    softmax: list[str] = []
    print("| variant | loop | elements | products of instructions | MACs an instruction | spills "
          "| share of the products' slots |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for name, variant in VARIANTS.items():
        of_variant = []
        for function, body in functions(
            assembly(CLANG if arguments.clang else GCC, variant)
        ).items():
            if any(each in function for each in LOOPS) and inner_loop(body):
                count = count_loop(name, function, body, variant)
                print(count.row())
                if count.spills:
                    wrong.append(count.row())
            elif "run_rows_int8" in function or "run_columnsILb0ELi64E" in function:
                of_variant.append(count_softmax(function, body))
        softmax.append(f"| `{name}` | {'; '.join(sorted(set(of_variant)))} |")
    print("\n| variant | softmax: instructions an element |\n|---|---|", *softmax, sep="\n")
    if wrong:
        sys.exit("\n".join(["spilled:", *wrong]))


if __name__ == "__main__":
    main()
