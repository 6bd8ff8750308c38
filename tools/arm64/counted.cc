// The inner loops of the arm64 kernels under names of their own, for counts.py. TARGET is a struct
// of plugin/cpu/simd; its header comes from the command line.
#include "cpu/forward/subtile_softmax.h"
#include "cpu/tiles/block_cores.h"
#include "cpu/tiles/microkernel.h"

namespace jax_gluon::cpu {
namespace {

// Keys of the block that probabilities are rows of.
constexpr int kKeys = 64;

template <class Core>
void scores(const void* rows, const void* panel, int64_t lanes, void* out) {
  using Lane = typename Core::Lane;
  score_tile<Core>(static_cast<const Lane*>(rows), static_cast<const Lane*>(panel), lanes, out,
                   kKeys);
}

template <class Core>
void values(const void* p, const void* panel, int64_t lanes, float* out, const float* factors) {
  using Lane = typename Core::Lane;
  value_tile<Core, kKeys / Core::kGroup>(
      static_cast<const Lane*>(p), static_cast<const Lane*>(panel), lanes, out, kKeys, factors);
}

template <class Core>
void softmax_of_codes(const KeyScales& keys, const typename SubtileSoftmax<Core>::Rows& rows,
                      typename SubtileSoftmax<Core>::Group& group) {
  SubtileSoftmax<Core>::template run_rows_int8<1, false, false, false>(keys, rows, 0, group);
}

template <class Core>
void softmax_of_floats(const typename SubtileSoftmax<Core>::Rows& rows,
                       typename SubtileSoftmax<Core>::Group& group) {
  SubtileSoftmax<Core>::template run_row<false>(rows, kKeys, 0, group);
}

#ifdef TARGET_HAS_BLOCKS
using Codes = BlockInt8Core<TARGET>;
using Pairs = BlockBf16Core<TARGET>;
#else
using Codes = Int8Core<TARGET>;
#endif
using Floats = F32Core<TARGET>;

}  // namespace

// What the compiler must not leave out.
extern const void* const kCounted[] = {
    reinterpret_cast<const void*>(&scores<Floats>),
    reinterpret_cast<const void*>(&values<Floats>),
    reinterpret_cast<const void*>(&transposed_tile<TARGET, kKeys>),
    reinterpret_cast<const void*>(&softmax_of_floats<Floats>),
    reinterpret_cast<const void*>(&scores<Codes>),
    reinterpret_cast<const void*>(&values<Codes>),
    reinterpret_cast<const void*>(&softmax_of_codes<Codes>),
#ifdef TARGET_HAS_BLOCKS
    reinterpret_cast<const void*>(&scores<Pairs>),
    reinterpret_cast<const void*>(&values<Pairs>),
    reinterpret_cast<const void*>(&softmax_of_floats<Pairs>),
#endif
};

}  // namespace jax_gluon::cpu
