#include "isa/simd_neon.h"
//
#include "isa/generic_kernels.h"
//
#include "isa/gemm_neon.h"
//
#include "isa/gemm_i8mm.h"

namespace moec {

const Kernels& i8mm_kernels() {
  static const Kernels table = [] {
    Kernels t = generic_table(0);
    t.gemm_space = Space::bytes;
    set_gemm_int8(t, [](auto kind, auto axis_out, auto by_block) {
      return gemm_by_matrices<kind(), axis_out(), by_block()>;
    });
    return t;
  }();
  return table;
}

}  // namespace moec
