#include <type_traits>

#include "isa/simd_neon.h"
//
#include "isa/generic_kernels.h"
//
#include "isa/gemm_neon.h"

namespace moec {

const Kernels& i8mm_kernels() {
  static const Kernels table = table_neon<true>();
  return table;
}

}  // namespace moec
