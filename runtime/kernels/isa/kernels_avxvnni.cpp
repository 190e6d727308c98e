#include "isa/simd_avx2.h"
//
#include "isa/generic_kernels.h"
//
#include "isa/gemm_avx2.h"

namespace moec {

const Kernels& avxvnni_kernels() {
  static const Kernels table = table_256<true>();
  return table;
}

}  // namespace moec
