// The kernels that a device has for a problem: what Python chooses from.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "kernels.h"

namespace jax_gluon {

// A problem as names and values: the extents T, S, N, K, H and V, the names of the dtypes of query,
// key and value as `query_dtype` and so on, and the attributes of an attention call that say what
// is asked for and how operands are stored.
struct KernelQuery {
  std::map<std::string, int64_t> numbers;
  std::map<std::string, std::string> names;
};

// The offers of "cpu" or "metal" for "forward", "backward" or "backward_bias". Throws
// std::invalid_argument for other names and for what a query lacks.
KernelOffers find_offers(const std::string& device, const std::string& pass,
                         const KernelQuery& query);
int64_t max_visible_keys(const KernelQuery& query);

}  // namespace jax_gluon
