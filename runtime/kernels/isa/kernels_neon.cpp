#include <type_traits>

#include "isa/simd_neon.h"
//
#include "isa/generic_kernels.h"
//
#include "isa/gemm_neon.h"

namespace moec {

const Kernels& neon_kernels() {
  static const Kernels table = table_neon<false>();
  return table;
}

}  // namespace moec
