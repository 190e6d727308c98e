#include <type_traits>

#include "simd_neon.h"
//
#include "generic_kernels.h"
//
#include "gemm_neon.h"

namespace moec {

const Kernels& neon_kernels() {
  static const Kernels table = table_neon<false>("neon");
  return table;
}

}  // namespace moec
