"""What the device does not have, or Metal does not allow."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("texture2d<float> t;", "textures are not supported"),
        ("constexpr sampler s(coord::normalized);", "samplers are not supported"),
        ("raytracing::intersector<> i;", "ray tracing is not supported"),
        ("float4 v(0); v.xx = float2(1);", "put_xx"),
        ("simdgroup_matrix<int, 8, 8> m;", "elements of float, half or bfloat"),
        ("simdgroup_matrix<float, 4, 4> m;", "8 columns and 8 rows"),
        ("float4 v = float4(half4(1)) + half4(1);", "invalid operands"),
        ("auto x = as_type<half>(1.0f);", "same size"),
    ],
)
def test_refused(tmp_path, statement: str, message: str, device):
    """What the device does not have, or Metal does not allow, is a compile error that says so."""
    import softmetal

    file = tmp_path / "refused.metal"
    file.write_text(
        "#include <metal_stdlib>\nusing namespace metal;\n"
        f"kernel void f(device float* out [[buffer(0)]]) {{ {statement} }}\n"
    )
    with pytest.raises(softmetal.Error, match=message):
        softmetal.Library(str(file))
