#include <type_traits>

#include "simd_neon.h"
//
#include "generic_kernels.h"
//
#include "gemm_neon.h"

namespace moec {

const Kernels& i8mm_kernels() {
  static const Kernels table = table_neon<true>("i8mm");
  return table;
}

}  // namespace moec
