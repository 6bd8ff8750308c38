"""Attention of other frameworks on the CPU, each in its best form; none of them is needed.

Every function takes a dtype, a problem and the number of threads, and gives what
`benchmarks.implementations.make` does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.problem import Problem

Made = tuple[Callable[[], Any], Callable[[Any], np.ndarray] | None]


def _head_major(problem: Problem) -> list[np.ndarray]:
    """query, key, value and the cotangent, `[B, N, T, H]`."""
    return [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in problem.operands()]


def torch(dtype: str, problem: Problem, threads: int) -> Made:
    import torch

    torch.set_num_threads(threads)
    element = getattr(torch, dtype)
    query, key, value, d_out = (torch.from_numpy(x).to(element) for x in _head_major(problem))
    bias = problem.bias()
    mask = None if bias is None else torch.from_numpy(bias).to(element)

    def attention(*operands: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(
            *operands, attn_mask=mask, is_causal=problem.is_causal,
            enable_gqa=problem.kv_heads != problem.N,
        )  # fmt: skip

    if problem.direction == "both":
        inputs = tuple(x.requires_grad_() for x in (query, key, value))
        return lambda: torch.autograd.grad(attention(*inputs), inputs, d_out), None

    def forward() -> Any:
        with torch.no_grad():
            return attention(query, key, value)

    return forward, lambda out: out[0, 0].double().numpy()


def openvino(dtype: str, problem: Problem, threads: int) -> Made:
    """`ScaledDotProductAttention` of operands in shared memory; bfloat16 is what it computes in."""
    import openvino as ov
    from openvino import opset13

    arrays = _head_major(problem)[:3]
    if (bias := problem.bias()) is not None:
        arrays.append(bias)
    parameters = [opset13.parameter(x.shape, np.float32) for x in arrays]
    node = opset13.scaled_dot_product_attention(*parameters, causal=problem.is_causal)
    settings = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.compile_model(ov.Model([node], parameters), "CPU", settings).create_infer_request()
    tensors = [ov.Tensor(x, shared_memory=True) for x in arrays]

    def run() -> np.ndarray:
        return request.infer(tensors, share_inputs=True, share_outputs=True)[0]

    return run, lambda out: out[0, 0].astype(np.float64)


def onnxruntime(dtype: str, problem: Problem, threads: int) -> Made:
    """`MultiHeadAttention`, which is flash attention where nothing is masked or added."""
    del dtype
    import onnx
    import onnxruntime

    arrays = {
        name: np.ascontiguousarray(x.reshape(*x.shape[:2], -1))
        for name, x in zip(("query", "key", "value"), problem.operands(), strict=False)
    }
    kinds = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, x.shape)
        for name, x in arrays.items()
    ]
    inputs = list(arrays)
    if (bias := problem.bias()) is not None:
        inputs += ["", "", "bias"]
        arrays["bias"] = bias
        kinds.append(onnx.helper.make_tensor_value_info("bias", onnx.TensorProto.FLOAT, bias.shape))
    node = onnx.helper.make_node(
        "MultiHeadAttention", inputs, ["out"], domain="com.microsoft", num_heads=problem.N,
        unidirectional=int(problem.is_causal),
    )  # fmt: skip
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
    operators = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "attention", kinds, [out]), opset_imports=operators,
        ir_version=8,
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def head(results: list[np.ndarray]) -> np.ndarray:
        return results[0][0, :, : problem.value_dim].astype(np.float64)

    return lambda: session.run(None, arrays), head


PEERS: dict[str, Callable[[str, Problem, int], Made]] = {
    "torch": torch,
    "openvino": openvino,
    "onnxruntime": onnxruntime,
}


def is_installed(family: str) -> bool:
    needed = ("onnx", "onnxruntime") if family == "onnxruntime" else (family,)
    return all(importlib.util.find_spec(name) is not None for name in needed)


def takes(family: str, problem: Problem) -> bool:
    """Whether the peer computes the problem without operands that are made for it."""
    if family == "torch":
        return True
    return problem.direction == "forward" and problem.kv_heads == problem.N
