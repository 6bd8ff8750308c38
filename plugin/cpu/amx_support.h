// Whether this process may use AMX.
#pragma once

namespace jax_gluon::cpu {

// The operating system is asked once, at the first call: it then keeps room for tiles in every
// thread. False where build or processor have no AMX.
bool may_use_amx();

// Why the operating system refuses the AMX that build and processor have; empty where it does not.
const char* amx_refusal();

}  // namespace jax_gluon::cpu
