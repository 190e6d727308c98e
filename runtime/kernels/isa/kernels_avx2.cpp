#include "isa/simd_avx2.h"
//
#include "isa/generic_kernels.h"
//
#include "isa/gemm_avx2.h"

namespace moec {

const Kernels& avx2_kernels() {
  static const Kernels table = table_256<false>();
  return table;
}

}  // namespace moec
