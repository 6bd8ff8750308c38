"""Defects planted into the wheel for macOS, its headers and its host code: the gate names each."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import lief
import pytest

from tools.macos import sdk, symbols
from tools.macos.gate import binary, enumerators, imports, interface, messages, signature
from tools.macos.gate.__main__ import MACOS, ROOT

PAGE = 4096


def spoil(path, old, new, count=1):
    """Replaces bytes, in place."""
    assert len(old) == len(new)
    content = path.read_bytes()
    assert content.count(old) >= count
    path.write_bytes(content.replace(old, new, count))


def test_another_minimum_os_is_found(plugin):
    version = binary.parse(plugin).build_version
    command = struct.pack("<III", 0x32, version.size, 1)  # LC_BUILD_VERSION for macOS
    spoil(plugin, command + struct.pack("<I", 13 << 16), command + struct.pack("<I", 14 << 16))
    (problem,) = binary.check_header(binary.parse(plugin), (13, 0)).problems
    assert problem == "the minimum OS is 14.0, expected the tag's 13.0"


@pytest.mark.parametrize("page", [0, 7, -1])
def test_a_corrupted_page_is_found(plugin, page):
    data = bytearray(plugin.read_bytes())
    signed = lief.MachO.parse(str(plugin)).at(0).code_signature.data_offset
    pages = -(-signed // PAGE)
    page %= pages
    data[page * PAGE + 40] ^= 1
    plugin.write_bytes(data)
    (problem,) = signature.check(plugin).problems
    assert problem == f"page {page} (at {page * PAGE:#x}) is not what was signed"


def test_an_unsigned_plugin_is_found(tmp_path, wheel_path):
    path = link(tmp_path, "", "-Wl,-no_adhoc_codesign")
    assert signature.check(path).problems == ("the plugin is not signed",)


def test_an_import_without_evidence_is_found(plugin):
    evidence = symbols.load(MACOS / "downloads", MACOS / "imports.json")
    known = {name: each for name, each in evidence.items() if name != "_objc_retain"}
    assert imports.check(plugin, known, (13, 0)).problems == (
        "_objc_retain (libobjc) is not known on macOS 13: none imports it",
    )


def link(folder, text, *options, kind="-bundle"):
    """A bundle or library of one C file for macOS."""
    source, target = folder / "plugin.c", folder / "linked.so"
    source.write_text(text + "void *PyInit__plugin(void) { return 0; }\n")
    command = ["clang-22", "--target=arm64-apple-macos13.0", "-isysroot", MACOS / "sdk", kind]
    command += ["-fuse-ld=lld", "-Wl,-undefined,dynamic_lookup", source, "-o", target, *options]
    subprocess.run(command, check=True)
    return target


def test_misspelt_functions_are_found(tmp_path, wheel_path):
    call = "void *MTLCreateSystemDefaultDevcie(void);\nvoid *PyList_New(long);\n"
    call += "void *f(void) { return PyList_New(0) ? MTLCreateSystemDefaultDevcie() : 0; }\n"
    assert binary.check_flat_imports(link(tmp_path, call)).problems == (
        "_MTLCreateSystemDefaultDevcie is in no library that the plugin is linked with",
    )


def test_other_exports_and_libraries_are_found(tmp_path, wheel_path):
    parsed = binary.parse(
        link(tmp_path, "int other;\n", "-framework", "Foundation", "-Wl,-rpath,/x")
    )
    assert binary.check_exports(parsed).problems == ("_other is exported",)
    problems = binary.check_libraries(parsed).problems
    metal = "/System/Library/Frameworks/Metal.framework/Versions/A/Metal"
    assert f"{metal} is not loaded" in problems
    assert "there is a run path" in problems


def test_a_library_is_no_bundle(tmp_path, wheel_path):
    parsed = binary.parse(link(tmp_path, "", kind="-dynamiclib"))
    (problem,) = binary.check_header(parsed, (13, 0)).problems
    assert "expected a BUNDLE" in problem


def test_lost_shaders_and_software_device_are_found(wheel):
    content = wheel.members[wheel.plugin].replace(b"kernel void", b"kernel  void")
    spoilt = replace(wheel, members={**wheel.members, wheel.plugin: content + b"SOFTMETAL_FAULT"})
    problems = binary.check_content(spoilt, ROOT).problems
    assert "the text of attention_forward.metal is missing" in problems
    assert "there is a 'SOFTMETAL' in it" in problems


# --- Messages and enumerators ---


@pytest.fixture(scope="module")
def host(wheel):
    """The host code's declarations and uses, of all its files."""
    return interface.read(ROOT / "build" / wheel.tag)


def test_a_misspelt_selector_is_found(plugin, host, oracles):
    old = b"dispatchThreadgroups:threadsPerThreadgroup:"
    spoil(plugin, old, old.replace(b"Per", b"per"))
    (problem,) = messages.check_sent(binary.parse(plugin), host, oracles).problems
    assert problem == (
        "dispatchThreadgroups:threadsperThreadgroup: is sent, but nothing declares it"
    )


def read_with(headers: Path, wheel, folder: Path, source: str, old: str, new: str):
    """What the host code says when one of our headers says something else."""
    shutil.copytree(sdk.HEADERS, headers)
    header = headers / source
    text = header.read_text()
    assert text.count(old) == 1
    header.write_text(text.replace(old, new))
    sdk.write_sdk(MACOS / "downloads", folder / "sdk", headers)
    commands = json.loads((ROOT / "build" / wheel.tag / "compile_commands.json").read_text())
    (command,) = (each for each in commands if each["file"].endswith("/context.mm"))
    command["command"] = command["command"].replace(str(MACOS / "sdk"), str(folder / "sdk"))
    (folder / "compile_commands.json").write_text(json.dumps([command]))
    return interface.read(folder)


def test_a_wrong_enumerator_of_a_header_is_found(wheel, oracles, tmp_path):
    ours = read_with(
        tmp_path / "headers",
        wheel,
        tmp_path,
        "Metal/MTLDevice.h",
        "MTLGPUFamilyApple7 = 1007",
        "MTLGPUFamilyApple7 = 1070",
    )
    assert enumerators.check(ours, oracles.pyobjc, oracles.metal_cpp).problems == (
        "MTLGPUFamilyApple7 is 1070, 1007 in PyObjC",
        "MTLGPUFamilyApple7 is 1070, 1007 in metal-cpp",
    )


def test_a_wrong_type_of_a_header_is_found(wheel, oracles, tmp_path, plugin):
    ours = read_with(
        tmp_path / "headers",
        wheel,
        tmp_path,
        "Metal/MTLDevice.h",
        "(MTLGPUFamily)gpuFamily",
        "(uint32_t)gpuFamily",
    )
    problem = "-[MTLDevice supportsFamily:] is BI, Bq in metal-cpp"
    assert messages.check_declared(ours, oracles).problems == (problem,)
    assert problem in messages.check_sent(binary.parse(plugin), ours, oracles).problems


def test_what_the_minimum_os_lacks_does_not_compile(wheel, tmp_path):
    with pytest.raises(ValueError, match="MTLLanguageVersion3_0' is only available on macOS 14"):
        read_with(
            tmp_path / "headers",
            wheel,
            tmp_path,
            "Metal/MTLLibrary.h",
            "MTLLanguageVersion3_0 =",
            "MTLLanguageVersion3_0 API_AVAILABLE(macos(14.4)) =",
        )
