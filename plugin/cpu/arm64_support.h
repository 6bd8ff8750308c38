// What an arm64 processor has beyond the instructions that all have.
#pragma once

namespace jax_gluon::cpu {

// Dot products of bytes; products of matrices of bytes and of bfloat16. False on other processors.
bool has_dotprod();
bool has_i8mm_and_bf16();

}  // namespace jax_gluon::cpu
