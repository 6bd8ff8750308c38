"""Metal text to images: what the rewriter has to understand, and errors at the text's lines."""

from __future__ import annotations

import numpy as np
import pytest

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"


def names(library):
    return [kernel["name"] for kernel in library.declared["kernels"]]


def arguments(library, kernel):
    found = next(k for k in library.declared["kernels"] if k["name"] == kernel)
    return {a["name"]: a for a in found["arguments"]}


def test_forms_of_a_kernel():
    import softmetal

    library = softmetal.Library(
        HEAD
        + """
    kernel void plain(device float* x) {}
    [[kernel]] void attribute(device float* x) {}
    [[kernel, max_total_threads_per_threadgroup(2 * 64)]] void limited(device float* x) {}
    namespace inner { kernel void in_a_namespace(device float* x) {} }
    template <typename T, int N> kernel void many(device T* x [[buffer(0)]]) { x[0] = N; }
    template [[host_name("by_decltype")]] [[kernel]] decltype(many<float, 3>) many<float, 3>;
    typedef decltype(many<half, 4>) many_t;
    template [[host_name("by_typedef")]] kernel many_t many<half, 4>;
    template [[host_name("by_" "signature")]] kernel void many<int, 5>(device int* x [[buffer(0)]]);
    """
    )
    assert names(library) == [
        "plain", "attribute", "limited", "in_a_namespace", "by_decltype", "by_typedef",
        "by_signature",
    ]  # fmt: skip
    limits = {
        k["name"]: k["max_total_threads_per_threadgroup"] for k in library.declared["kernels"]
    }
    assert limits["limited"] == 128
    x = np.zeros(1, np.float16)
    library.kernel("by_typedef")(grid=1, threads=1, buffers=[x])
    assert x[0] == 4


def test_arguments_are_reflected():
    import softmetal

    library = softmetal.Library(
        HEAD
        + """
    struct Params { float4 a; int n; };
    enum { kSlot = 7 };
    constant bool has_mask [[function_constant(0)]];
    kernel void f(device const half* in, device float* out, constant Params& p [[buffer(kSlot)]],
                  device atomic_uint* after, threadgroup float4* memory [[threadgroup(2)]],
                  device char* mask [[buffer(20), function_constant(has_mask)]],
                  uint i [[thread_position_in_grid]]) { out[i] = p.n; }
    """
    )
    found = arguments(library, "f")
    assert {name: a["index"] for name, a in found.items() if a["kind"] < 2} == {
        "in": 0, "out": 1, "p": 7, "after": 8, "memory": 2, "mask": 20,
    }  # fmt: skip
    assert [found[name]["writable"] for name in ("in", "out", "p")] == [False, True, False]
    assert (found["p"]["reference"], found["p"]["size"], found["p"]["alignment"]) == (True, 32, 16)
    assert (found["memory"]["address_space"], found["memory"]["size"]) == ("threadgroup", 16)
    assert not found["mask"]["enabled"]  # the constant has no value, so it is false


def test_function_constants():
    import softmetal

    library = softmetal.Library(
        HEAD
        + """
    constant int n [[function_constant(0)]];
    constant float4 v [[function_constant(5)]];
    constant bool given = is_function_constant_defined(v);
    constant constexpr int twice = 2 * 8;
    static constant constexpr int derived = n + twice;
    kernel void f(device float* out [[buffer(0)]]) {
      out[0] = derived; out[1] = given ? v.z : -1;
    }"""
    )
    out = np.zeros(2, np.float32)
    library.kernel("f", {0: 5})(grid=1, threads=1, buffers=[out])
    assert out.tolist() == [21, -1]
    library.kernel("f", {"n": -6, "v": np.arange(4)})(grid=1, threads=1, buffers=[out])
    assert out.tolist() == [10, 2]


def test_threadgroup_variables():
    import softmetal

    library = softmetal.Library(
        HEAD
        + """
    template <typename T> struct Pair { T a, b; };
    template <typename T, int N> void g(device float* out, uint t) {
      threadgroup Pair<T> pairs[N], last;
      threadgroup T more[2][N + 1];
      alignas(64) threadgroup uchar bytes[3];
      threadgroup T* pointer = more[1];
      pairs[t].a = t; pairs[t].b = 1; pointer[t] = 2; bytes[t % 3] = 3; last.b = 4;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      out[t] = pairs[N - 1 - t].a + pairs[t].b + more[1][t] + bytes[0] + last.b;
    }
    kernel void f(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
      g<float, 32>(out, t);
      for (int i = 0; i < 2; ++i) { threadgroup int n; n = i; out[32 + t] += n; }
    }"""
    )
    out = np.zeros(64, np.float32)
    counters = library.kernel("f")(grid=1, threads=32, buffers=[out])
    np.testing.assert_array_equal(out[:32], 31 - np.arange(32) + 1 + 2 + 3 + 4)
    assert counters.threadgroup_memory_peak == 32 * 8 + 8 + 2 * 33 * 4 + 3 + 4


def test_static_threadgroup_memory_is_reflected():
    import softmetal

    library = softmetal.Library(
        HEAD
        + """
    void twice(thread float& x) { x *= 2; }
    template <typename T, int N = 4, void (*op)(thread float&) = twice, typename... More>
    [[kernel]] void f(device T* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
      constexpr int kRows = 2 * N;
      threadgroup T rows[kRows][3], last;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if constexpr (sizeof(T) == 2) {
        threadgroup float wide[N];
        wide[t % N] = t;
        last = wide[0];
      } else if (t > 100) {
        threadgroup uchar rare[5];
        rare[t % 5] = 1;
        last = rare[0];
      }
      rows[t % kRows][0] = 1;
      float x = rows[0][0] + last;
      op(x);
      out[t] = x;
    }
    template [[host_name("f_float")]] [[kernel]] decltype(f<float, 8>) f<float, 8>;
    template [[host_name("f_half")]] [[kernel]] decltype(f<half, 8, twice, int, uint>)
        f<half, 8, twice, int, uint>;
    kernel void none(device float* out [[buffer(0)]], threadgroup float* more [[threadgroup(0)]]) {}
    namespace inner {
    kernel void one(device float* out [[buffer(0)]]) { threadgroup float4 x; x = 1; out[0] = x.y; }
    }
    """
    )
    found = {k["name"]: k["static_threadgroup_memory"] for k in library.declared["kernels"]}
    assert found == {
        "f_float": (16 * 3 + 1) * 4 + 5,
        "f_half": (16 * 3 + 1) * 2 + 8 * 4,
        "none": 0,
        "one": 16,
    }


def test_declarations_that_differ_in_address_spaces_alone():
    import softmetal

    library = softmetal.Library(
        HEAD
        + """
    template <typename T> struct element {};
    template <typename T> struct element<device T*> { using type = T; };
    template <typename T> struct element<threadgroup T*> { using type = T; };
    template <typename T> struct element<constant T*> { using type = T; };
    struct Number {
      float x;
      float get() const device { return x; }
      float get() const threadgroup { return x; }
      float get() const thread { return x; }
    };
    inline float read(device const float* p) { return *p; }
    inline float read(threadgroup const float* p) { return *p; }
    kernel void f(device float* out [[buffer(0)]]) {
      threadgroup float local; local = 2;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      Number n{3}; element<device float*>::type e = 4;
      out[0] = read(out) + read(&local) + n.get() + e;
    }"""
    )
    out = np.ones(1, np.float32)
    library.kernel("f")(grid=1, threads=1, buffers=[out])
    assert out[0] == 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("out[0] = missing;", "program_source:5:.*undeclared identifier 'missing'"),
        ("double x = 1; out[0] = x;", "program_source:5:.*'double' is not supported in Metal"),
        ("out[0] = 1;; }}", "program_source:.*unmatched"),
        ("threadgroup int n = 3; out[0] = n;", "program_source:5:.*'n' cannot be initialized"),
        ("goto end; end: out[0] = 1;", "'goto' is not supported in Metal"),
    ],
)
def test_errors_are_at_the_line_of_the_text(line, message):
    import softmetal

    with pytest.raises(softmetal.Error, match=message):
        softmetal.Library(f"{HEAD}// a comment\nkernel void f(device float* out) {{\n{line}\n}}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernel decltype f;", "program_source:1:"),
        ("kernel void f{i}(device int* x) { { } x[0] = 1; }", "a kernel without a name"),
        ("template kernel void f(device int* x) {}", "program_source:1:"),
        ("[[function_constant(0)]];", "a function constant without a name"),
        ("struct alignas", "program_source:1:"),
        ("void f() { threadgroup alignas int x; }", "program_source:1:"),
        (f"kernel void f(device int* x [[buffer({10**30})]], device int* y) {{}}", "too large"),
    ],
)
def test_malformed_text_is_an_error(text, message):
    import softmetal

    for compiled in (softmetal.Library, softmetal.check):
        with pytest.raises(softmetal.Error, match=message):
            compiled(text)


def test_a_library_comes_from_the_cache(tmp_path, monkeypatch):
    import softmetal

    monkeypatch.setenv("SOFTMETAL_CACHE_DIR", str(tmp_path))
    text = HEAD + "kernel void f(device float* out) { out[0] = N; }"
    first, again, other = (
        softmetal.Library(text, macros=macros) for macros in ({"N": 1}, {"N": 1}, {"N": 2})
    )
    assert first.image_path == again.image_path != other.image_path
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_included_is_part_of_the_text(tmp_path, monkeypatch):
    import softmetal

    monkeypatch.setenv("SOFTMETAL_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "f.metal").write_text(
        '#include "n.h"\n' + HEAD + "kernel void f(device float* out) { out[0] = N; }"
    )
    paths = []
    for n in (1, 2, 1):
        (tmp_path / "n.h").write_text(f"#define N {n}\n")
        paths.append(softmetal.Library(tmp_path / "f.metal").image_path)
    assert paths[0] == paths[2] != paths[1]


def test_a_missing_compiler_is_named(monkeypatch):
    import softmetal

    monkeypatch.setenv("SOFTMETAL_CLANG", "no-such-clang")
    with pytest.raises(softmetal.Error, match=r"cannot run no-such-clang.*clang-19"):
        softmetal.Library("kernel void f() {}")


def test_argument_without_attribute_or_address_space():
    import softmetal

    with pytest.raises(softmetal.Error, match="argument 'n' of a kernel has no attribute"):
        softmetal.Library("kernel void f(int n) {}")
