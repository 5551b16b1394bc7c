// The passes over scores of topk.h, compiled for several instruction sets.
#include "topk.h"

namespace topk {

FASTRCNN_CLONES int64_t at_least(const float* values, int64_t count, float limit, uint32_t* found) {
  return collect<false>(values, count, limit, found);
}
FASTRCNN_CLONES int64_t at_least(const double* values, int64_t count, double limit, uint32_t* found) {
  return collect<false>(values, count, limit, found);
}
FASTRCNN_CLONES int64_t at_least(const BFloat16* values, int64_t count, float limit, uint32_t* found) {
  return collect<false>(values, count, limit, found);
}
FASTRCNN_CLONES int64_t at_least(const Float16* values, int64_t count, float limit, uint32_t* found) {
  return collect<false>(values, count, limit, found);
}
FASTRCNN_CLONES int64_t above(const float* values, int64_t count, float limit, uint32_t* found) {
  return collect<true>(values, count, limit, found);
}
FASTRCNN_CLONES int64_t above(const double* values, int64_t count, double limit, uint32_t* found) {
  return collect<true>(values, count, limit, found);
}
FASTRCNN_CLONES int64_t above(const BFloat16* values, int64_t count, float limit, uint32_t* found) {
  return collect<true>(values, count, limit, found);
}
FASTRCNN_CLONES int64_t above(const Float16* values, int64_t count, float limit, uint32_t* found) {
  return collect<true>(values, count, limit, found);
}

}  // namespace topk
