#include "simd_avx2.h"
//
#include "generic_kernels.h"
//
#include "gemm_avx2.h"

namespace moec {

const Kernels& avxvnni_kernels() {
  static const Kernels table = table_256<true>("avxvnni");
  return table;
}

}  // namespace moec
