"""The strict check: planted errors of address spaces, each found at its line, and programs that are
right, each accepted."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import subprocess

import pytest

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
LANGUAGE = pathlib.Path(__file__).parent / "language"
SHADERS = pathlib.Path(__file__).parents[2] / "shaders"


@dataclasses.dataclass(frozen=True)
class Bug:
    """A program whose line marked HERE is wrong, and what is said of it."""

    name: str
    text: str
    message: str


POINTER = "pointer type must have explicit address space qualifier"
REFERENCE = "a reference without an address space is one to thread memory, not to {} memory"
PROGRAM_SCOPE = "program scope variable must reside in constant address space"
OUT = "kernel void f(device float* out [[buffer(0)]]"

BUGS = [
    Bug(
        "unqualified pointer parameter",
        f"float first(float* p) {{ return p[0]; }} // HERE\n{OUT}) {{\nout[0] = 1;\n}}",
        POINTER,
    ),
    Bug(
        "unqualified pointer to threadgroup memory",
        f"{OUT}) {{\nthreadgroup float t[4];\nfloat* p = t; // HERE\nout[0] = p[0];\n}}",
        POINTER,
    ),
    Bug(
        "unqualified pointer member",
        f"struct A {{\nfloat* p; // HERE\n}};\n{OUT}) {{ A a; a.p = nullptr; out[0] = a.p != 0; }}",
        POINTER,
    ),
    Bug(
        "unqualified pointer result",
        f"float* g(int n); // HERE\n{OUT}) {{ out[0] = 1; }}",
        POINTER,
    ),
    Bug(
        "unqualified pointer alias",
        f"using P = float*; // HERE\n{OUT}) {{ out[0] = sizeof(P); }}",
        POINTER,
    ),
    Bug(
        "unqualified pointer in an instantiated template",
        "template <typename T>\nT first(T* p) { // HERE\nreturn p[0];\n}\n"
        f"{OUT}) {{ thread float* p = nullptr; out[0] = first<float>(p); }}",
        POINTER,
    ),
    Bug(
        "cast to an unqualified pointer",
        f"{OUT}) {{\nfloat4 v = *(float4*)out; // HERE\nout[0] = v.x;\n}}",
        POINTER,
    ),
    Bug(
        "unqualified pointer in a cast to a deduced type",
        f"{OUT}) {{\nauto p = (float*)out; // HERE\nout[0] = p[0];\n}}",
        POINTER,
    ),
    Bug(
        "kernel argument without an address space",
        "kernel void f(float* out [[buffer(0)]]) { // HERE\nout[0] = 1;\n}",
        "argument 'out' of a kernel has no attribute and no address space",
    ),
    Bug(
        "threadgroup argument that is a buffer",
        "kernel void f(device float* out [[buffer(0)]],\n"
        "threadgroup float* t [[buffer(1)]]) { // HERE\nout[0] = t[0];\n}",
        "argument 't' of a kernel has an attribute of another address space",
    ),
    Bug(
        "device argument that is threadgroup memory",
        "kernel void f(\ndevice float* out [[threadgroup(0)]]) { // HERE\nout[0] = 1;\n}",
        "argument 'out' of a kernel has an attribute of another address space",
    ),
    Bug(
        "device memory for an unqualified reference",
        f"void add(float& x) {{ x += 1; }}\n{OUT}) {{\nadd(out[0]); // HERE\n}}",
        REFERENCE.format("device"),
    ),
    Bug(
        "threadgroup memory for an unqualified const reference",
        "struct A { float x[2]; };\nfloat get(const A& a) { return a.x[0]; }\n"
        f"{OUT}) {{\nthreadgroup A a;\nout[0] = get(a); // HERE\n}}",
        REFERENCE.format("threadgroup"),
    ),
    Bug(
        "device memory for an unqualified reference of a template",
        "template <typename T> T get(const T& x) { return x; }\n"
        f"{OUT}) {{\nout[0] = get<float>(out[1]); // HERE\n}}",
        REFERENCE.format("device"),
    ),
    Bug(
        "device memory for an unqualified reference of a method",
        "struct A { float x; void set(const float& y) { x = y; } };\n"
        f"{OUT}) {{\nA a;\na.set(out[1]); // HERE\nout[0] = a.x;\n}}",
        REFERENCE.format("device"),
    ),
    Bug(
        "device memory for an unqualified reference variable",
        f"{OUT}) {{\nconst float& x = out[1]; // HERE\nout[0] = x;\n}}",
        REFERENCE.format("device"),
    ),
    Bug(
        "device memory for a thread reference",
        f"{OUT}) {{\nthread float& x = out[0]; // HERE\nx = 1;\n}}",
        "'thread float' to value of type 'device float' changes address space",
    ),
    Bug(
        "threadgroup memory as a device argument",
        f"float g(device float* p) {{ return p[0]; }}\n{OUT}) {{\nthreadgroup float t[4];\n"
        "out[0] = g(t); // HERE\n}",
        "no matching function for call to 'g'",
    ),
    Bug(
        "device memory as a threadgroup argument",
        f"float g(threadgroup float* p) {{ return p[0]; }}\n"
        f"{OUT}) {{\nout[0] = g(out); // HERE\n}}",
        "no matching function for call to 'g'",
    ),
    Bug(
        "device memory as a constant argument",
        f"float g(constant float* p) {{ return p[0]; }}\n{OUT}) {{\nout[0] = g(out); // HERE\n}}",
        "no matching function for call to 'g'",
    ),
    Bug(
        "constant memory as a device argument",
        f"float g(device const float* p) {{ return p[0]; }}\n{OUT}, constant float* c) {{\n"
        "out[0] = g(c); // HERE\n}",
        "no matching function for call to 'g'",
    ),
    Bug(
        "address of a local variable as a device argument",
        f"void g(device float* p) {{ p[0] = 1; }}\n{OUT}) {{\nfloat x = 1;\ng(&x); // HERE\n}}",
        "no matching function for call to 'g'",
    ),
    Bug(
        "const dropped",
        "void g(device float* p) { p[0] = 1; }\n"
        "kernel void f(device const float* in [[buffer(0)]]) {\ng(in); // HERE\n}",
        "no matching function for call to 'g'",
    ),
    Bug(
        "constant memory written",
        f"{OUT}, constant float* c) {{\nc[0] = out[0]; // HERE\n}}",
        "read-only variable is not assignable",
    ),
    Bug(
        "C cast across spaces",
        f"{OUT}) {{\nthreadgroup float t[4];\ndevice float* p = (device float*)t; // HERE\n"
        "out[0] = p[0];\n}",
        "converts between mismatching address spaces",
    ),
    Bug(
        "reinterpret_cast across spaces",
        f"{OUT}) {{\nauto p = reinterpret_cast<threadgroup float*>(out); // HERE\n"
        "out[0] = p[0];\n}",
        "from 'device float *' to 'threadgroup float *' is not allowed",
    ),
    Bug(
        "static_cast across spaces in a program with bfloat",
        f"{OUT}, device bfloat* b) {{\n"
        "auto p = static_cast<threadgroup void*>(b); // HERE\nout[0] = p != 0;\n}",
        "to 'threadgroup void *' is not allowed",
    ),
    Bug(
        "template deduced across spaces",
        "template <typename T> T g(device T* p, device T* q) { return p[0] + q[0]; }\n"
        f"{OUT}, threadgroup float* t [[threadgroup(0)]]) {{\nout[0] = g(out, t); // HERE\n}}",
        "no matching function for call to 'g'",
    ),
    Bug(
        "assignment to a member of another space",
        "struct A { device float* p; };\n"
        f"{OUT}, threadgroup float* t [[threadgroup(0)]]) {{\nA a;\na.p = t; // HERE\n"
        "out[0] = a.p[0];\n}",
        "assigning 'threadgroup float *' to 'device float *' changes address space",
    ),
    Bug(
        "result of another space",
        "device float* g(threadgroup float* t) {\nreturn t; // HERE\n}\n"
        f"{OUT}) {{ out[0] = 1; }}",
        "cannot initialize return object of type 'device float *'",
    ),
    Bug(
        "choice between pointers of two spaces",
        f"{OUT}, threadgroup float* t [[threadgroup(0)]]) {{\n"
        "out[0] = *(out[1] > 0 ? out : t); // HERE\n}",
        "incompatible operand types",
    ),
    Bug(
        "unqualified method of a device object",
        "struct A { float x; float get() const { return x; } };\n"
        f"{OUT}, device A* a) {{\nout[0] = a->get(); // HERE\n}}",
        "object parameter of type 'const thread A' with an expression of type 'device A'",
    ),
    Bug(
        "unqualified method, defined outside of its class, of a constant object",
        "struct A { float x; float get() const; };\nfloat A::get() const { return x; }\n"
        f"{OUT}, constant A& a) {{\nout[0] = a.get(); // HERE\n}}",
        "object parameter of type 'const thread A' with an expression of type 'constant A'",
    ),
    Bug(
        "unqualified operator of a device object",
        "struct A { float x; A operator+(A b) const { return {x + b.x}; } };\n"
        "kernel void f(device A* a [[buffer(0)]]) {\na[0] = a[1] + a[2]; // HERE\n}",
        "invalid operands to binary expression",
    ),
    Bug(
        "function constant that is not constant",
        f"bool is_on [[function_constant(0)]]; // HERE\n{OUT}) {{ out[0] = is_on; }}",
        "function constant 'is_on' must be in constant address space",
    ),
    Bug(
        "variable at program scope",
        f"const float scale = 2; // HERE\n{OUT}) {{ out[0] = scale; }}",
        PROGRAM_SCOPE,
    ),
    Bug(
        "static member that is not constant",
        f"struct A {{\nstatic constexpr int n = 4; // HERE\n}};\n{OUT}) {{ out[0] = A::n; }}",
        PROGRAM_SCOPE,
    ),
    Bug(
        "static local variable",
        f"{OUT}) {{\nstatic float n; // HERE\nout[0] = n;\n}}",
        "static local variable must reside in constant address space",
    ),
    Bug(
        "after a structure is copied from constant memory",
        "struct P { float a[2]; int n; };\n"
        "template <typename T> void g(thread const P& p, threadgroup T* t) { t[0] = p.a[0]; }\n"
        f"{OUT}, constant P& params) {{\nconst P p = params;\nP more[2] = {{params, p}};\n"
        "const P other = p.n > 0 ? params : more[0];\ng<float>(other, out); // HERE\n}",
        "no matching function for call to 'g'",
    ),
    Bug(
        "after an operator of a value that is no variable",
        "struct A { float x; A operator+(A b) const { return {x + b.x}; } };\n"
        "struct N { operator int() const { return 2; } };\nA make() { return {1}; }\n"
        "void g(thread const A& a, threadgroup float* t) { t[0] = a.x; }\n"
        f"{OUT}) {{\nA a = make() + make() + make();\ndevice float* p = out;\np += N{{}};\n"
        "g(make(), nullptr);\ng(a, p); // HERE\n}",
        "no matching function for call to 'g'",
    ),
    Bug(
        "atomic operation on thread memory",
        f"{OUT}) {{\natomic_int n;\n"
        "atomic_store_explicit(&n, 1, memory_order_relaxed); // HERE\nout[0] = 1;\n}",
        "no matching function for call to 'atomic_store_explicit'",
    ),
    Bug(
        "simdgroup_load from constant memory",
        f"{OUT}, constant float* c) {{\nsimdgroup_float8x8 m;\nsimdgroup_load(m, c); // HERE\n"
        "simdgroup_store(m, out);\n}",
        "no matching function for call to 'simdgroup_load'",
    ),
    Bug(
        "result of a function of the library in device memory",
        f"{OUT}) {{\nout[0] = modf(1.5f, out[1]); // HERE\n}}",
        "no matching function for call to 'modf'",
    ),
    Bug(
        "double",
        f"{OUT}) {{\ndouble x = 1; // HERE\nout[0] = x;\n}}",
        "'double' is not supported in Metal",
    ),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted(bug):
    import softmetal

    lines = (HEAD + bug.text).splitlines()
    (line,) = (i for i, text in enumerate(lines, 1) if "HERE" in text)
    with pytest.raises(softmetal.Error) as caught:
        softmetal.check(HEAD + bug.text)
    assert re.search(
        rf"^program_source:{line}:\d+: error: .*{re.escape(bug.message)}",
        str(caught.value),
        re.MULTILINE,
    ), caught.value
    # Nothing else is said to be wrong.
    found = re.findall(r"^program_source:(\d+):\d+: error:", str(caught.value), re.MULTILINE)
    assert set(found) == {str(line)}, caught.value
    assert not re.search("__global|__local|__private|__constant|__generic", str(caught.value))


IDIOMS = {
    "references without an address space": """
    void add(float& x) { x += 1; }
    void twice(float& x) { add(x); add(x); }
    template <typename T> void advance(const device T*& p, device T*& q) { p += 2; q += 2; }
    kernel void f(device float* out [[buffer(0)]], device const float* in [[buffer(1)]]) {
      float x = 1;
      twice(x);
      advance(in, out);
      out[0] = x + in[0];
    }""",
    "a class whose methods take the addresses of its members": """
    struct Tile {
      float a[4];
      Tile(float x) { fill(a, x); }
      static void fill(thread float* p, float x) { p[0] = x; }
      static float part(const thread float* p) { return p[1]; }
      thread float& at(int i) { return a[i]; }
      float sum() const { return a[0] + part(a); }
      template <typename U> void store(device U* p) const;
    };
    template <typename U> void Tile::store(device U* p) const { p[0] = sum(); }
    Tile make(float x) { return Tile(x); }
    kernel void f(device float* out [[buffer(0)]]) {
      Tile t(1.0f);
      t.at(1) = make(2).sum();
      t.store(out);
    }""",
    "operators of values that are no variables": """
    struct Complex {
      float r, i;
      Complex operator+(Complex o) const { return {r + o.r, i + o.i}; }
      Complex operator-() const { return {-r, -i}; }
    };
    kernel void f(device Complex* out [[buffer(0)]]) {
      Complex a = out[0], b = out[1], c = out[2];
      out[3] = -(a + b + c);
    }""",
    "references to values that are no variables": """
    struct A { float x; };
    struct B { float y; B(thread const A& a, int n) { y = a.x + n; } };
    A make() { return {1}; }
    float get(thread const A& a, int k = 1) { return a.x + k; }
    template <typename T> float get_of(thread const T& a) { return a.x; }
    float half_of(thread const short& n) { return n / 2; }
    kernel void f(device float* out [[buffer(0)]]) {
      B b(make(), 3);
      out[0] = get(make()) + get(A{2}, 3) + get_of(make()) + half_of(3) + b.y + B(make(), 1).y;
    }""",
    "structures copied between all address spaces": """
    struct P { float4 a; int n; packed_float3 b; };
    struct Q { P p[2]; float4x4 m; };
    P twice(P p) { p.a *= 2; return p; }
    kernel void f(device P* out [[buffer(0)]], constant Q& q [[buffer(1)]],
                  device const P* in [[buffer(2)]]) {
      threadgroup P t[4];
      t[0] = q.p[1];
      t[1] = in[0];
      t[1].a.xy = in[0].a.zw + q.p[0].a.xy;
      P p = q.p[0];
      p.b = in[1].b + packed_float3(1);
      out[0] = twice(t[1]);
      out[1] = twice(q.p[0]);
      out[2].a = q.m * in[0].a + q.m[1];
      out[3].a = in[0].n > 0 ? in[0].a : p.a;
    }""",
    "tables at program scope": """
    constant float table[3] = {1, 2, 3};
    constexpr constant static float more[2] = {1, 2};
    constant float4 v = {1, 2, 3, 4};
    struct Sizes { static constant constexpr int kRows = 4; };
    float at(constant float* p, int i) { return p[i]; }
    kernel void f(device float* out [[buffer(0)]]) {
      out[0] = at(table, 1) + at(more, 1) + v.x + Sizes::kRows;
    }""",
    "overloads and specialisations by address space": """
    template <typename T> struct element {};
    template <typename T> struct element<device T*> { using type = remove_cv_t<T>; };
    template <typename T> struct element<threadgroup T*> { using type = T; };
    float get(device const float* p) { return p[0]; }
    float get(threadgroup const float* p) { return p[0]; }
    float get(thread const float* p) { return p[0]; }
    float get(constant float* p) { return p[0]; }
    struct Number {
      float x;
      float get() const device { return x; }
      float get() const threadgroup { return x; }
      float get() const constant { return x; }
      float get() const thread { return x; }
    };
    kernel void f(device float* out [[buffer(0)]], constant float* c [[buffer(1)]],
                  device Number* n [[buffer(2)]], constant Number& m [[buffer(3)]]) {
      threadgroup float t[2];
      float x[2];
      element<device const float*>::type z = get(out) + get(t) + get(x) + get(c);
      Number own = n[1];
      out[0] = z + n->get() + m.get() + own.get();
    }""",
    "deduced types": """
    kernel void f(device float4* out [[buffer(0)]]) {
      threadgroup float t[2];
      auto p = &t[0];
      auto& q = out[1];
      auto x = out[0];
      const auto r = out + 1;
      thread auto& y = x;
      q = y + *p + *r;
    }""",
    "functions as template arguments": """
    void twice(thread float& x) { x *= 2; }
    template <typename T> void thrice(thread T& x) { x *= 3; }
    template <void (*op)(thread float&)> float apply(float x) { op(x); return x; }
    template <typename T, void (*op)(thread T&)> T apply_to(T x) { op(x); return x; }
    kernel void f(device float* out [[buffer(0)]]) {
      out[0] = apply<twice>(out[1]) + apply_to<float, thrice>(out[2]);
    }""",
    "a pointer moved by an integral constant": """
    kernel void f(device const float* in [[buffer(0)]], device float* out [[buffer(1)]]) {
      in += integral_constant<int, 2>{};
      out[0] = in[0];
    }""",
    "kernel templates with names and function constants": """
    constant bool masked [[function_constant(0)]];
    constant int n [[function_constant(1)]];
    constant bool deep = is_function_constant_defined(n) && n > 4;
    template <typename T, int N>
    [[kernel, max_total_threads_per_threadgroup(32)]] void scale(
        device T* out [[buffer(0)]], device const T* in [[buffer(1)]],
        device const bool* mask [[buffer(2), function_constant(masked)]],
        constant T& factor [[buffer(3)]], uint i [[thread_position_in_grid]],
        uint lane [[thread_index_in_simdgroup]]) {
      threadgroup T shared[N], more[2][N];
      shared[lane] = in[i] * factor;
      more[1][lane] = 2;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (!masked || mask[i]) out[i] = deep ? simd_sum(shared[lane ^ 1]) : more[1][0];
    }
    template [[host_name("scale_float")]] [[kernel]] decltype(scale<float, 32>) scale<float, 32>;
    template [[host_name("scale_bfloat")]] [[kernel]] decltype(scale<bfloat, 32>) scale<bfloat, 32>;
    """,
}


@pytest.mark.parametrize("name", IDIOMS)
def test_accepted(name):
    import softmetal

    softmetal.check(HEAD + IDIOMS[name])


@pytest.mark.parametrize("path", sorted(LANGUAGE.glob("*.metal")), ids=lambda path: path.stem)
def test_the_kernels_of_the_language_are_accepted(path):
    import softmetal

    softmetal.check(path)


@pytest.mark.parametrize("path", sorted(SHADERS.glob("*.metal")), ids=lambda path: path.stem)
def test_the_shaders_of_this_project_are_accepted(path):
    import softmetal

    softmetal.check(path, std="metal3.1")


def test_lambda_expressions_came_with_metal_3_2():
    import softmetal

    text = f"""{HEAD}{OUT}) {{
      auto twice = [](float x) {{ return 2 * x; }};
      out[0] = twice(out[0]);
    }}"""
    softmetal.check(text)
    softmetal.check(text, std="metal3.2")
    with pytest.raises(softmetal.Error, match=r"program_source:4:\d+: error: lambda expressions"):
        softmetal.check(text, std="metal3.1")
    with pytest.raises(softmetal.Error, match='std is "c\\+\\+17"; allowed: metal'):
        softmetal.check(text, std="c++17")


def test_command(tmp_path, capsys):
    import softmetal

    good, bad = tmp_path / "good.metal", tmp_path / "bad.metal"
    (tmp_path / "head.h").write_text("#include <metal_stdlib>\n")
    good.write_text(f'#include "head.h"\n{OUT}) {{ out[0] = N; }}\n')
    bad.write_text(f'#include "head.h"\n{OUT}) {{\n  float* p = out;\n  out[0] = p[0] + N;\n}}\n')
    assert softmetal.main(["check", str(good), "-D", "N=3"]) == 0
    assert softmetal.main(["check", str(good)]) == 1
    assert "undeclared identifier 'N'" in capsys.readouterr().err
    assert softmetal.main(["check", str(bad), "-D", "N", "-I", str(tmp_path)]) == 1
    assert f"{bad}:3:10: error: {POINTER}" in capsys.readouterr().err
    good.write_text(f"{HEAD}{OUT}) {{ auto f = [](int x) {{ return x; }}; out[0] = f(1); }}\n")
    assert softmetal.main(["check", str(good), "--std", "metal3.1"]) == 1


def test_program(tmp_path, device):
    file = tmp_path / "lambda.metal"
    file.write_text(f"{HEAD}{OUT}) {{ auto f = [](int x) {{ return x; }}; out[0] = f(1); }}\n")

    def run(*options):
        finished = subprocess.run(
            [device / "softmetal", "check", file, *options],
            capture_output=True,
            text=True,
            check=False,
        )
        return finished.returncode, finished.stderr

    assert run() == run("--std", "metal3.2") == (0, "")
    status, text = run("--std", "metal3.1")
    assert status == 1
    assert f"{file}:3:" in text
    assert "error: lambda expressions" in text
    assert run("--std") == (1, "softmetal: --std needs a value\n")
    for std in ("c++17", "metal3", "metal3.11"):
        assert run("--std", std) == (
            1,
            f"softmetal: --std {std}; allowed: metal2.3, metal3.1 and the like\n",
        )
