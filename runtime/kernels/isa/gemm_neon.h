// Integer kernels on 128-bit registers with sdot, and with smmla where kMatrix. A pass covers 8 of a block's 16 rows and kM
// tokens. int4 codes 0..15 are used as signed bytes, int8 codes as they are (no offset).
#ifndef MOEC_GEMM_NEON_H_
#define MOEC_GEMM_NEON_H_

#include <arm_neon.h>

namespace moec {
namespace {

#define MOEC_INLINE inline __attribute__((always_inline))

// One unit of 8 inputs for 8 rows: w[half of the inputs][quad of rows], 4 rows x 4 inputs each.
template <int kKind>
MOEC_INLINE void load_unit(const uint8_t* codes, int8x16_t (&w)[2][2]) {
  for (int quad = 0; quad < 2; ++quad) {
    if (kKind == MOEC_INT4) {
      const uint8x16_t v = vld1q_u8(codes + 16 * quad);
      w[0][quad] = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15)));
      w[1][quad] = vreinterpretq_s8_u8(vshrq_n_u8(v, 4));
    } else {
      w[0][quad] = vreinterpretq_s8_u8(vld1q_u8(codes + 16 * quad));
      w[1][quad] = vreinterpretq_s8_u8(vld1q_u8(codes + 64 + 16 * quad));
    }
  }
}

// Sums of 8 rows x kM tokens by sdot: sum[quad][token], lanes are rows.
template <int kM>
struct DotSums {
  int32x4_t sum[2][kM];

  MOEC_INLINE void begin(const int32_t* correction) {
    for (int t = 0; t < kM; ++t) sum[0][t] = sum[1][t] = vdupq_n_s32(correction[t]);
  }
  template <int kKind>
  MOEC_INLINE void add_unit(const uint8_t* codes, const int8_t* q, int64_t stride) {
    int8x16_t w[2][2];
    load_unit<kKind>(codes, w);
    for (int t = 0; t < kM; ++t) {
      const int8x8_t a = vld1_s8(q + t * stride);
      for (int quad = 0; quad < 2; ++quad) {
        sum[quad][t] = vdotq_lane_s32(sum[quad][t], w[0][quad], a, 0);
        sum[quad][t] = vdotq_lane_s32(sum[quad][t], w[1][quad], a, 1);
      }
    }
  }
  MOEC_INLINE int32x4_t rows(int quad, int t) const { return sum[quad][t]; }
};

#if defined(__ARM_FEATURE_MATMUL_INT8)
// The same by smmla, tokens in pairs: sum[quad][row pair][token pair] = {r0 t0, r0 t1, r1 t0, r1 t1}.
template <int kM>
struct MatrixSums {
  static_assert(kM % 2 == 0, "tokens come in pairs");
  int32x4_t sum[2][2][kM / 2];

  MOEC_INLINE void begin(const int32_t* correction) {
    for (int p = 0; p < kM / 2; ++p) {
      const int32x2_t c = vld1_s32(correction + 2 * p);
      for (int quad = 0; quad < 2; ++quad) sum[quad][0][p] = sum[quad][1][p] = vcombine_s32(c, c);
    }
  }
  template <int kKind>
  MOEC_INLINE void add_unit(const uint8_t* codes, const int8_t* q, int64_t stride) {
    int8x16_t w[2][2];
    load_unit<kKind>(codes, w);
    int8x16_t pairs[2][2];  // [quad][row pair]: 2 rows x 8 inputs
    for (int quad = 0; quad < 2; ++quad) {
      const int32x4_t low = vreinterpretq_s32_s8(w[0][quad]), high = vreinterpretq_s32_s8(w[1][quad]);
      pairs[quad][0] = vreinterpretq_s8_s32(vzip1q_s32(low, high));
      pairs[quad][1] = vreinterpretq_s8_s32(vzip2q_s32(low, high));
    }
    for (int p = 0; p < kM / 2; ++p) {
      const int8x16_t a = vcombine_s8(vld1_s8(q + 2 * p * stride), vld1_s8(q + (2 * p + 1) * stride));
      for (int quad = 0; quad < 2; ++quad) {
        for (int r = 0; r < 2; ++r) sum[quad][r][p] = vmmlaq_s32(sum[quad][r][p], pairs[quad][r], a);
      }
    }
  }
  MOEC_INLINE int32x4_t rows(int quad, int t) const {
    const int32x4_t a = sum[quad][0][t / 2], b = sum[quad][1][t / 2];
    return t % 2 ? vuzp2q_s32(a, b) : vuzp1q_s32(a, b);
  }
};
#endif

MOEC_INLINE float32x4_t load_scales4(const uint8_t* p, bool f32) {
  return f32 ? vreinterpretq_f32_u8(vld1q_u8(p)) : vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}

MOEC_INLINE void store_outputs4(float* y, float32x4_t v, const float* bias, int n) {
  if (n >= 4) {
    vst1q_f32(y, bias ? vaddq_f32(v, vld1q_f32(bias)) : v);
    return;
  }
  float t[4];
  vst1q_f32(t, v);
  for (int i = 0; i < n; ++i) y[i] = bias ? t[i] + bias[i] : t[i];
}

// Eight rows times kM tokens. codes and scales point at the first of the eight rows; outputs: how many of them exist.
template <int kKind, bool kAxisOut, bool kByBlock, int kM, typename Sums>
void gemm_half_block(const GemmTask& a, const uint8_t* codes, const uint8_t* scales, int64_t row, float* y, const float* bias,
                     int outputs) {
  constexpr int64_t kUnitBytes = kKind == MOEC_INT4 ? 64 : 128;
  const QuantizedRows rows = a.rows.from(row);
  const int8_t* q = rows.q;
  const int64_t stride = rows.stride;
  float32x4_t total[2][kM];
  Sums sums;
  if (kByBlock) {
    const int64_t scale_stride = a.f32_scales ? 64 : 32;
    const int32_t* correction = rows.correction;
    const float* activation_scale = rows.scale;
    int64_t rest_of_group = a.group;
    for (int t = 0; t < kM; ++t) total[0][t] = total[1][t] = vdupq_n_f32(0.0f);
    for (int64_t k = 0; k < a.padded_k; k += 32, correction += rows.part_stride, activation_scale += rows.part_stride) {
      sums.begin(correction);
      const int64_t end = kAxisOut && a.padded_k - k < 32 ? a.padded_k : k + 32;
      for (int64_t i = k; i < end; i += 8, codes += kUnitBytes, q += 8) sums.template add_unit<kKind>(codes, q, stride);
      for (int quad = 0; quad < 2; ++quad) {
        const float32x4_t s =
            kAxisOut ? vdupq_n_f32(0.0f) : load_scales4(scales + quad * (a.f32_scales ? 16 : 8), a.f32_scales);
        for (int t = 0; t < kM; ++t) {
          const float32x4_t part = vcvtq_f32_s32(sums.rows(quad, t));
          total[quad][t] = kAxisOut ? vfmaq_n_f32(total[quad][t], part, activation_scale[t])
                                    : vfmaq_f32(total[quad][t], vmulq_n_f32(part, activation_scale[t]), s);
        }
      }
      if (!kAxisOut && (rest_of_group -= 32) == 0) {
        rest_of_group = a.group;
        scales += scale_stride;
      }
    }
  } else if (kAxisOut) {
    sums.begin(rows.correction);
    for (int64_t k = 0; k < a.padded_k; k += 8, codes += kUnitBytes, q += 8) sums.template add_unit<kKind>(codes, q, stride);
    for (int t = 0; t < kM; ++t) {
      for (int quad = 0; quad < 2; ++quad) total[quad][t] = vcvtq_f32_s32(sums.rows(quad, t));
    }
  } else {
    const int64_t groups = a.padded_k / a.group, scale_stride = a.f32_scales ? 64 : 32;
    const int32_t* correction = rows.correction;
    for (int t = 0; t < kM; ++t) total[0][t] = total[1][t] = vdupq_n_f32(0.0f);
    for (int64_t g = 0; g < groups; ++g, correction += rows.part_stride, scales += scale_stride) {
      sums.begin(correction);
      for (int64_t k = 0; k < a.group; k += 8, codes += kUnitBytes, q += 8) sums.template add_unit<kKind>(codes, q, stride);
      for (int quad = 0; quad < 2; ++quad) {
        const float32x4_t s = load_scales4(scales + quad * (a.f32_scales ? 16 : 8), a.f32_scales);
        for (int t = 0; t < kM; ++t) total[quad][t] = vfmaq_f32(total[quad][t], vcvtq_f32_s32(sums.rows(quad, t)), s);
      }
    }
  }
  for (int t = 0; t < kM; ++t) {
    for (int quad = 0; quad < 2; ++quad) {
      const float32x4_t v = kByBlock ? total[quad][t] : vmulq_n_f32(total[quad][t], rows.scale[t]);
      store_outputs4(y + t * a.y_stride + 4 * quad, v, bias ? bias + 4 * quad : nullptr, outputs - 4 * quad);
    }
  }
}

template <int kKind, bool kAxisOut, bool kByBlock, bool kMatrix>
void gemm_int8(const GemmTask& a) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  constexpr bool kPairs = kMatrix;
  using Four = std::conditional_t<kPairs, MatrixSums<4>, DotSums<4>>;
  using Two = std::conditional_t<kPairs, MatrixSums<2>, DotSums<2>>;
#else
  static_assert(!kMatrix, "this file is compiled without smmla");
  using Four = DotSums<4>;
  using Two = DotSums<2>;
#endif
  const int64_t scale_stride = kAxisOut ? 0 : a.padded_k / a.group * (a.f32_scales ? 64 : 32);
  for (int64_t half = 0; half < 2 * a.blocks; ++half) {
    const int64_t block = half / 2, side = half % 2;
    const int outputs = a.outputs - half * 8 < 8 ? int(a.outputs - half * 8) : 8;
    if (outputs <= 0) break;
    const uint8_t* const codes = a.codes + block * a.block_bytes + side * 32;
    const uint8_t* const scales = kAxisOut ? nullptr : a.scales + block * scale_stride + side * (a.f32_scales ? 32 : 16);
    const float* const bias = a.bias ? a.bias + half * 8 : nullptr;
    float* const y = a.y + half * 8;
    int64_t row = 0;
    for (; row + 4 <= a.m; row += 4) {
      gemm_half_block<kKind, kAxisOut, kByBlock, 4, Four>(a, codes, scales, row, y + row * a.y_stride, bias, outputs);
    }
    if (row + 2 <= a.m) {
      gemm_half_block<kKind, kAxisOut, kByBlock, 2, Two>(a, codes, scales, row, y + row * a.y_stride, bias, outputs);
      row += 2;
    }
    if (row < a.m) {
      gemm_half_block<kKind, kAxisOut, kByBlock, 1, DotSums<1>>(a, codes, scales, row, y + row * a.y_stride, bias, outputs);
    }
  }
}

template <bool kMatrix>
inline Kernels table_neon() {
  Kernels t = generic_table(0);
  set_gemm_int8(t, [](auto kind, auto axis_out, auto by_block) {
    return gemm_int8<kind(), axis_out(), by_block(), kMatrix>;
  });
  return t;
}

}  // namespace
}  // namespace moec

#endif  // MOEC_GEMM_NEON_H_
