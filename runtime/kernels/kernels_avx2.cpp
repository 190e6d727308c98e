#include "simd_avx2.h"
//
#include "generic_kernels.h"
//
#include "gemm_avx2.h"

namespace moec {

const Kernels& avx2_kernels() {
  static const Kernels table = table_256<false>("avx2");
  return table;
}

}  // namespace moec
