"""Matrices of 8 by 8 that a simdgroup holds together."""

from __future__ import annotations

import numpy as np
import pytest

from .feature import Feature, library, rng, run, to_bfloat


def features() -> list[Feature]:
    memory = rng().integers(-8, 9, (16, 24)).astype(np.float32)

    def stored(m):
        last = np.full((8, 16), 0, np.float32)
        last[:, 8:] = m[:8, 2:10]
        return np.concatenate(
            [
                m[:8, :8].ravel(),
                m[4:12, 8:16].ravel(),
                m[:8, :8].T.ravel(),
                m[:8, 2:10].T.ravel(),
                last.ravel(),
            ]
        )

    a, b, c = rng().integers(-4, 5, (3, 8, 8)).astype(np.float32)
    d = a @ b + c
    wide = rng().integers(-4, 5, (2, 128)).astype(np.float32)
    mixed = wide[0].reshape(8, 16) @ wide[1].reshape(16, 8)
    rows = np.empty((8, 8), int)
    for lane in range(32):
        q = lane // 4
        row, column = (q & 4) + lane // 2 % 4, (q & 2) * 2 + lane % 2 * 2
        rows[row, column : column + 2] = lane
    order = np.argsort(rows.ravel(), kind="stable")
    left = 2 * a + np.tile([1, 0], (8, 4))
    p1, p2 = (2 * a) @ b, left @ b
    eye = np.eye(8, dtype=np.float32)
    moves = [
        Feature(
            f"simdgroup_matrix of {name}: load and store, stride, origin, transposed",
            f"simdgroup_matrix:load_and_store_{name}",
            [cast(stored(memory))],
            [cast(memory)],
            threads=(32,),
            initial=[cast(np.zeros(384, np.float32))],
        )
        for name, cast in {
            "float": lambda x: x,
            "half": lambda x: x.astype(np.float16),
            "bfloat": to_bfloat,
        }.items()
    ]
    return [
        *moves,
        Feature(
            "simdgroup_matrix: filled, diagonal",
            "simdgroup_matrix:fill",
            [np.concatenate([np.full((8, 8), 3.5), 2 * eye, np.ones((8, 8))]).astype("f4")],
            threads=(32,),
        ),
        Feature(
            "simdgroup_matrix: multiply, multiply_accumulate, operator*",
            "simdgroup_matrix:multiply",
            [np.concatenate([a @ b, d, d @ b + c, a @ b, 3 * a])],
            [np.stack([a, b, c])],
            threads=(32,),
        ),
        Feature(
            "simdgroup_matrix: half factors, float sum",
            "simdgroup_matrix:multiply_half_float",
            [mixed],
            [wide.astype(np.float16)],
            threads=(32,),
        ),
        Feature(
            "simdgroup_matrix: bfloat factors, float sum",
            "simdgroup_matrix:multiply_bfloat_float",
            [mixed],
            [to_bfloat(wide)],
            threads=(32,),
        ),
        Feature(
            "simdgroup_matrix: half factors, half sum",
            "simdgroup_matrix:multiply_half_half",
            [mixed.astype(np.float16)],
            [wide.astype(np.float16)],
            threads=(32,),
        ),
        Feature(
            "simdgroup_matrix: thread_elements",
            "simdgroup_matrix:elements",
            [
                np.concatenate(
                    [p1.ravel(), p2.ravel(), left.ravel()[order], rows.ravel(), left.ravel()]
                ).astype("f4")
            ],
            [np.stack([a, b])],
            threads=(32,),
        ),
        Feature(
            "simdgroup_matrix: load, product and store in place",
            "simdgroup_matrix:in_place",
            [a @ (a @ (a @ b))],
            [a],
            threads=(32,),
            initial=[b],
        ),
    ]


@pytest.mark.parametrize("feature", features(), ids=lambda feature: feature.name)
def test_feature(feature, device):
    run(feature)


def test_matrix_needs_a_whole_simdgroup(device):
    """A threadgroup of 16 threads is told so."""
    import softmetal

    kernel = library("simdgroup_matrix").kernel("fill", constants={})
    with pytest.raises(softmetal.Error, match="simdgroup of 32 threads"):
        kernel(grid=(1,), threads=(16,), buffers=[np.zeros(192, np.float32)])
