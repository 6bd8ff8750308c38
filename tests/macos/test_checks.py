"""The gate's checks on small inputs made by hand: each defect is found and named."""

from __future__ import annotations

import base64
import hashlib
import zipfile

import pytest

from tools.macos import reviewed
from tools.macos.gate import encoding, enumerators, imports, messages, wheel
from tools.macos.gate.interface import Interface, Method
from tools.macos.gate.metal_cpp import MetalCpp
from tools.macos.gate.pyobjc import PyObjC
from tools.macos.symbols import Evidence

TAG = "cp313-cp313-macosx_13_0_arm64"
PLUGIN = "jax_gluon/_plugin.cpython-313-darwin.so"


@pytest.mark.parametrize(
    ("given", "types"),
    [
        ("v16@0:8", ("v", "@", ":")),
        ("B24@0:8q16", ("B", "@", ":", "q")),
        ("v40@0:8r^v16Q24Q32", ("v", "@", ":", "r^v", "Q", "Q")),
        ("v64@0:8{?=QQQ}16{?=Q{a=[4I]}}40", ("v", "@", ":", "{?=QQQ}", "{?=Q{a=[4I]}}")),
        ('@"NSError"48@0:8^@16@?24@?32', ("@", "@", ":", "^@", "@?", "@?")),
    ],
)
def test_encodings_are_split(given, types):
    assert encoding.types(given) == types


def test_plain_types_have_no_qualifiers_and_names():
    assert encoding.plain_types("r*40@0:8r^v16{_NSRange=QQ}24") == ("*", "^v", "{QQ}")


def archive(folder, members, tag=TAG, tag_inside=TAG, plugin=b""):
    """A wheel with a plugin of these bytes, and a record that is true."""
    info = "jax_gluon-0.1.0.dist-info"
    files = {PLUGIN: plugin, **members}
    files[f"{info}/WHEEL"] = f"Root-Is-Purelib: false\nTag: {tag_inside}\n".encode()
    record = ""
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    path = folder / f"jax_gluon-0.1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return wheel.read(path)


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "jax_gluon"
    folder.mkdir()
    for name in ("a.py", "_plugin.pyi"):
        (folder / name).write_bytes(b"pass\n")
    return folder


def test_a_good_archive_passes(tmp_path, package):
    members = {
        "jax_gluon/a.py": b"pass\n",
        "jax_gluon/_plugin.pyi": b"pass\n",
        "jax_gluon/py.typed": b"",
    }
    good = archive(tmp_path, members)
    assert wheel.check_tags(good).problems == ()
    assert wheel.check_record(good).problems == ()
    assert wheel.check_contents(good, package).problems == ()


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ({"tag_inside": "cp313-cp313-linux_x86_64"}, "WHEEL says ['cp313-cp313-linux_x86_64']"),
        ({"tag": TAG.replace("13_0", "14_0")}, "expected 13.0"),
    ],
)
def test_wrong_tags_are_found(tmp_path, names, problem):
    found = wheel.check_tags(archive(tmp_path, {}, **names)).problems
    assert any(problem in each for each in found)


def test_a_wheel_of_another_system_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not for macOS on arm64"):
        wheel.check_tags(archive(tmp_path, {}, tag="cp313-cp313-linux_x86_64"))


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({}, "jax_gluon/a.py is missing"),
        ({"jax_gluon/a.py": b"return\n"}, "jax_gluon/a.py differs from the source tree's"),
        ({"jax_gluon/_plugin.so": b""}, "jax_gluon/_plugin.so does not belong here"),
        ({"libjax_gluon_metal.so": b"\x7fELF"}, "libjax_gluon_metal.so is a binary for Linux"),
    ],
)
def test_wrong_contents_are_found(tmp_path, package, members, problem):
    assert problem in wheel.check_contents(archive(tmp_path, members), package).problems


def test_altered_files_are_found(tmp_path):
    given = archive(tmp_path, {"jax_gluon/a.py": b"pass\n"})
    given.members["jax_gluon/a.py"] = b"fail\n"
    assert wheel.check_record(given).problems == ("jax_gluon/a.py is not what RECORD says",)
    given.members["jax_gluon/b.py"] = b""
    assert "RECORD and the archive name different files" in wheel.check_record(given).problems


def enumerators_of(name, value, pyobjc, metal_cpp, monkeypatch, entries=None):
    monkeypatch.setattr(reviewed, "ENUMERATORS", entries or {})
    return enumerators.check(
        Interface(enumerators={name: value}),
        PyObjC(enumerators=pyobjc),
        MetalCpp(enumerators=metal_cpp),
    ).problems


def test_enumerators_are_those_of_each_source(monkeypatch):
    check = enumerators_of
    assert check("A", 1, {"A": 1}, {"A": 1}, monkeypatch) == ()
    assert check("A", -1, {"A": 2**64 - 1}, {}, monkeypatch) == ()
    assert check("A", 1, {"A": 2}, {"A": 1}, monkeypatch) == ("A is 1, 2 in PyObjC",)
    assert check("A", 1, {"A": 1}, {"A": 2}, monkeypatch) == ("A is 1, 2 in metal-cpp",)
    (problem,) = check("A", 1, {}, {}, monkeypatch)
    assert problem == "A = 1 is known to neither PyObjC nor metal-cpp"


def test_reviewed_enumerators_pass_for_their_value_and_while_needed(monkeypatch):
    entries = {"A": (1, "")}
    assert enumerators_of("A", 1, {"A": 1}, {"A": 2}, monkeypatch, entries) == ()
    assert "A is 3, 1 in PyObjC" in enumerators_of("A", 3, {"A": 1}, {}, monkeypatch, entries)
    (problem,) = enumerators_of("A", 1, {"A": 1}, {"A": 1}, monkeypatch, entries)
    assert problem == "A is in reviewed.ENUMERATORS without need"


METHOD = Method("MTLThing", "-", "put:", "v24@0:8Q16")


@pytest.mark.parametrize(
    ("oracle", "problem"),
    [
        (
            dict(pyobjc=PyObjC(encodings={("MTLThing", "-", "put:"): "v20@0:8I16"})),
            "Apple's headers",
        ),
        (dict(metal_cpp=MetalCpp(methods={("MTLThing", "put:"): {("v", "I")}})), "vI in metal-cpp"),
        (dict(pyobjc=PyObjC(methods={("MTLThing", "put:"): {2: "Z"}})), "the argument 0 is Q, Z"),
        (dict(pyobjc=PyObjC(methods={("MTLThing", "put:"): {-1: "@"}})), "the result is v, @"),
    ],
    ids=["PyObjC", "metal-cpp", "metadata's argument", "metadata's result"],
)
def test_wrong_types_are_found(oracle, problem):
    known = messages.Oracles(**{"pyobjc": PyObjC(), "metal_cpp": MetalCpp(), **oracle})
    _, problems = known.judge(METHOD)
    assert len(problems) == 1
    assert problem in problems[0]


def test_right_types_are_confirmed():
    exact = PyObjC(
        encodings={("MTLThing", "-", "put:"): METHOD.encoding},
        methods={("MTLThing", "put:"): {2: "Q"}},
    )
    overloads = MetalCpp(methods={("MTLThing", "put:"): {("v", "Q"), ("v", "@")}})
    assert messages.Oracles(exact, MetalCpp()).judge(METHOD) == (True, [])
    assert messages.Oracles(PyObjC(), overloads).judge(METHOD) == (True, [])
    # Metadata alone gives types of some arguments: not of all.
    partial = PyObjC(methods={("MTLThing", "put:"): {2: "Q"}})
    assert messages.Oracles(partial, MetalCpp()).judge(METHOD) == (False, [])


def test_functions_are_those_of_pyobjc():
    ours = Interface(functions={"MTLMake": "@8Q0", "MTLUnused": "v0"})
    good, bad = PyObjC(functions={"MTLMake": "@Q"}), PyObjC(functions={"MTLMake": "@I"})
    assert messages.check_functions({"_MTLMake"}, ours, good).problems == ()
    (problem,) = messages.check_functions({"_MTLMake"}, ours, bad).problems
    assert problem == "MTLMake is @Q, @I in PyObjC's metadata"


@pytest.mark.parametrize(
    ("evidence", "problem"),
    [
        ({}, "_f (Metal) is not known on macOS 13: none imports it"),
        (
            {"_f": Evidence("Metal", (14, 0), "x")},
            "_f (Metal) is not known on macOS 13: x needs macOS 14",
        ),
        (
            {"_f": Evidence("libobjc", (11, 0), "x")},
            "_f is taken from Metal, elsewhere from libobjc",
        ),
    ],
    ids=["unknown", "newer", "elsewhere"],
)
def test_imports_without_evidence_are_found(monkeypatch, evidence, problem):
    monkeypatch.setattr(imports.symbols, "imports", lambda _: {"_f": "Metal"})
    monkeypatch.setattr(reviewed, "IMPORTS", {})
    assert imports.check(None, evidence, (13, 0)).problems == (problem,)


def test_reviewed_imports_pass_while_needed(monkeypatch):
    monkeypatch.setattr(imports.symbols, "imports", lambda _: {"_f": "Metal"})
    monkeypatch.setattr(reviewed, "IMPORTS", {"_f": ("Metal", "")})
    assert imports.check(None, {}, (13, 0)).problems == ()
    known = {"_f": Evidence("Metal", (11, 0), "x")}
    (problem,) = imports.check(None, known, (13, 0)).problems
    assert problem == "_f is in reviewed.IMPORTS without need"
