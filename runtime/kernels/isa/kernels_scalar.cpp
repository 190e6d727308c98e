// The reference: plain C++ for every machine. What an output is, step by step; the other files compute the same bits.
#include "isa/simd_scalar.h"
//
#include "isa/generic_kernels.h"

namespace moec {
namespace {

// What the code of an input of a row stands for, with the offset that packed int4 codes carry; other kinds have none here.
template <int kKind>
inline int32_t code(const uint8_t* block, int64_t row, int64_t k) {
  const int32_t bits = code_in_unit(kKind, block + k / 8 * unit_bytes_of(kKind), row, k % 8);
  return kKind == MOEC_INT8 ? int8_t(bits) : has_levels(kKind) ? int8_t(kLevelTable<kKind>.bytes[bits]) : bits;
}

inline float weight_scale(const uint8_t* scales, bool f32, int64_t i) {
  if (f32) {
    float scale;
    std::memcpy(&scale, scales + i * 4, 4);
    return scale;
  }
  uint16_t half;
  std::memcpy(&half, scales + i * 2, 2);
  return half_to_float(half);
}

template <int kKind>
inline int32_t dot(const uint8_t* codes, int64_t row, const int8_t* q, int64_t begin, int64_t end, int32_t sum) {
  for (int64_t k = begin; k < end; ++k) sum += code<kKind>(codes, row, k) * q[k];
  return sum;
}

template <int kKind, bool kAxisOut, bool kByBlock>
void gemm_int8(const GemmTask& a) {
  const int64_t groups = kAxisOut ? 1 : a.padded_k / a.group;
  const int64_t part = kByBlock ? 32 : kAxisOut ? a.padded_k : a.group;
  for (int64_t n = 0; n < a.outputs; ++n) {
    const uint8_t* const codes = a.codes + n / 16 * a.block_bytes;
    const int64_t row = n % 16;
    for (int64_t m = 0; m < a.m; ++m) {
      const int8_t* const q = a.rows.q + m * a.rows.stride;
      const int32_t* correction = a.rows.correction + m;
      const float* activation_scale = a.rows.scale + m;
      float total = 0.0f;
      for (int64_t k = 0; k < a.padded_k; k += part, correction += a.rows.part_stride) {
        const int64_t end = k + part < a.padded_k ? k + part : a.padded_k;
        float sum = float(dot<kKind>(codes, row, q, k, end, *correction));
        const float scale = kAxisOut ? 1.0f : weight_scale(a.scales, a.f32_scales, (n / 16 * groups + k / a.group) * 16 + row);
        if (kByBlock && !kAxisOut) sum *= *activation_scale;
        if (kByBlock) {
          total = std::fma(sum, kAxisOut ? *activation_scale : scale, total);
          activation_scale += a.rows.part_stride;
        } else {
          total = kAxisOut ? sum : std::fma(sum, scale, total);
        }
      }
      const float y = kByBlock ? total : total * a.rows.scale[m];
      a.y[m * a.y_stride + n] = a.bias ? y + a.bias[n] : y;
    }
  }
}

}  // namespace

const Kernels& scalar_kernels() {
  static const Kernels table = [] {
    Kernels t = generic_table(0);
    set_gemm_int8(t, [](auto kind, auto axis_out, auto by_block) {
      return gemm_int8<kind(), axis_out(), by_block()>;
    });
    return t;
  }();
  return table;
}

}  // namespace moec
