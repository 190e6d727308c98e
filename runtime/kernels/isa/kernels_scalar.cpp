// The reference: plain C++ for every machine. What an output is, step by step; the other files compute the same bits.
#include "isa/simd_scalar.h"
//
#include "isa/generic_kernels.h"

namespace moec {
namespace {

// The codes of 4 inputs of a row, with the offset that the packed int4 codes carry; int8 codes have none here.
template <int kKind>
inline int32_t code(const uint8_t* block, int64_t row, int64_t k) {
  const int64_t half = k % 8 / 4, i = k % 4;
  if (kKind == MOEC_INT8) return int8_t(block[k / 8 * 128 + 64 * half + 4 * row + i]);
  const uint8_t byte = block[k / 8 * 64 + 4 * row + i];
  return half ? byte >> 4 : byte & 15;
}

template <int kKind, bool kAxisOut>
void gemm_int8(const GemmTask& a) {
  const int64_t groups = kAxisOut ? 1 : a.padded_k / a.group;
  for (int64_t n = 0; n < a.outputs; ++n) {
    const uint8_t* const codes = a.codes + n / 16 * a.block_bytes;
    const int64_t row = n % 16;
    for (int64_t m = 0; m < a.m; ++m) {
      const int8_t* const q = a.rows.q + m * a.rows.stride;
      const int32_t* const correction = a.rows.correction + m;
      float total = 0.0f;
      for (int64_t g = 0; g < groups; ++g) {
        int32_t sum = correction[g * a.rows.correction_stride];
        const int64_t begin = kAxisOut ? 0 : g * a.group, end = kAxisOut ? a.padded_k : begin + a.group;
        for (int64_t k = begin; k < end; ++k) sum += code<kKind>(codes, row, k) * q[k];
        if (kAxisOut) {
          total = float(sum);
          break;
        }
        const int64_t i = (n / 16 * groups + g) * 16 + row;
        float scale;
        if (a.f32_scales) {
          std::memcpy(&scale, a.scales + i * 4, 4);
        } else {
          uint16_t half;
          std::memcpy(&half, a.scales + i * 2, 2);
          scale = half_to_float(half);
        }
        total = std::fma(float(sum), scale, total);
      }
      const float y = total * a.rows.scale[m];
      a.y[m * a.y_stride + n] = a.bias ? y + a.bias[n] : y;
    }
  }
}

}  // namespace

const Kernels& scalar_kernels() {
  static const Kernels table = [] {
    Kernels t = generic_table(0);
    t.gemm_int8[0][0] = gemm_int8<MOEC_INT4, false>;
    t.gemm_int8[0][1] = gemm_int8<MOEC_INT4, true>;
    t.gemm_int8[1][0] = gemm_int8<MOEC_INT8, false>;
    t.gemm_int8[1][1] = gemm_int8<MOEC_INT8, true>;
    return t;
  }();
  return table;
}

}  // namespace moec
