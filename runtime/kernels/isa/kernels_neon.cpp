#include "isa/simd_neon.h"
//
#include "isa/generic_kernels.h"
//
#include "isa/gemm_neon.h"

namespace moec {

const Kernels& neon_kernels() {
  static const Kernels table = [] {
    Kernels t = generic_table(0);
    set_gemm_int8(t, [](auto kind, auto axis_out, auto by_block) {
      return gemm_by_dots<kind(), axis_out(), by_block()>;
    });
    return t;
  }();
  return table;
}

}  // namespace moec
