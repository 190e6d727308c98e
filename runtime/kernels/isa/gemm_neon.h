// Integer kernels on 128-bit registers with sdot, and what those with smmla share with them. int4 codes 0..15 are used as
// signed bytes, int8 codes and levels as they are (no offset).
//
// Integer sums become floats without a conversion: a sum begins at the bits of the float 1.5 * 2^23, whose last place is 1, so
// that sums below 2^22 only change its mantissa, and one subtraction leaves float(sum), exactly. The instruction that converts
// takes twice the vector pipes of the big cores.
#ifndef MOEC_GEMM_NEON_H_
#define MOEC_GEMM_NEON_H_

#include <arm_neon.h>

#include <utility>

namespace moec {
namespace {

#define MOEC_INLINE inline __attribute__((always_inline))
#define MOEC_ALWAYS __attribute__((always_inline))

// f(0), f(1) .. f(kN - 1), of constants: an array that is indexed by them is registers from the start. Where a loop is unrolled
// afterwards, compilers keep such arrays in memory, too.
template <typename F, int... kI>
MOEC_INLINE void repeat_each(F f, std::integer_sequence<int, kI...>) {
  (f(std::integral_constant<int, kI>()), ...);
}
template <int kN, typename F>
MOEC_INLINE void repeat(F f) {
  repeat_each(f, std::make_integer_sequence<int, kN>());
}

constexpr int32_t kBias = 0x4B400000;  // the bits of kBiasFloat
constexpr float kBiasFloat = 12582912.0f;

// Whether sums over `group` inputs stay below 2^22.
template <int kKind>
MOEC_INLINE bool sums_are_small(int64_t group) {
  constexpr int64_t kMost = ((1 << 22) - 1) / (127 * largest_of(kKind));
  return group <= kMost;
}

// float(sum) of a sum that began at kBias.
MOEC_INLINE float32x4_t to_float_biased(int32x4_t sum, bool small) {
  if (__builtin_expect(small, true)) return vsubq_f32(vreinterpretq_f32_s32(sum), vdupq_n_f32(kBiasFloat));
  return vcvtq_f32_s32(vsubq_s32(sum, vdupq_n_s32(kBias)));
}

MOEC_INLINE float32x4_t load_scales4(const uint8_t* p, bool f32) {
  if (__builtin_expect(f32, false)) return vreinterpretq_f32_u8(vld1q_u8(p));
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}

__attribute__((noinline)) void store_few(float* y, float32x4_t v, const float* bias, int n) {
  float t[4];
  vst1q_f32(t, v);
  for (int i = 0; i < n && i < 4; ++i) y[i] = bias ? t[i] + bias[i] : t[i];
}

// Four outputs of a row, or the n that exist; with the bias added.
MOEC_INLINE void store_outputs4(float* y, float32x4_t v, const float* bias, int n) {
  if (n < 4) return store_few(y, v, bias, n);
  vst1q_f32(y, bias ? vaddq_f32(v, vld1q_f32(bias)) : v);
}

// sum + 4 inputs of 4 rows times inputs 4 kLane.. of a token. Spelled out for g++ 12, which around the intrinsic copies sums
// between registers, and spills them.
template <int kLane>
MOEC_INLINE int32x4_t multiply_lane(int32x4_t sum, int8x16_t rows, int8x16_t token) {
#if defined(__clang__)
  return vdotq_laneq_s32(sum, rows, token, kLane);
#else
  asm("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(sum) : "w"(rows), "w"(token), "i"(kLane));
  return sum;
#endif
}

// g++ hoists loads until sums are spilled, where they fill the registers; the big cores reorder by themselves.
#if defined(__clang__)
#define MOEC_IN_ORDER
#else
#define MOEC_IN_ORDER __attribute__((optimize("no-schedule-insns")))
#endif

// What the 16 bytes of nibbles of one half of the inputs stand for.
template <int kKind>
MOEC_INLINE int8x16_t expand(uint8x16_t nibbles) {
  if (!has_levels(kKind)) return vreinterpretq_s8_u8(nibbles);
  return vreinterpretq_s8_u8(vqtbl1q_u8(vld1q_u8(kLevelTable<kKind>.bytes), nibbles));
}

// Both codes of a byte, as nibbles, of rows 4 * quad.. of a unit.
template <int kKind>
MOEC_INLINE uint8x16_t load_nibbles(const uint8_t* unit, int quad) {
  if (kKind != MOEC_NL3) return vld1q_u8(unit + 16 * quad);
  const uint8x16_t low = vshlq_u8(vld1q_u8(unit + 16 * (quad % 2)), vdupq_n_s8(int8_t(-2 * (quad / 2))));
  const uint8x16_t third = vshlq_u8(vld1q_u8(unit + 32), vdupq_n_s8(int8_t(2 - quad)));
  return vorrq_u8(vandq_u8(low, vdupq_n_u8(0x33)), vandq_u8(third, vdupq_n_u8(0x44)));
}

// The codes of rows 4 * quad..: w[half of a unit's inputs].
template <int kKind>
MOEC_INLINE void load_quad(const uint8_t* unit, int quad, int8x16_t (&w)[2]) {
  if (is_nibble(kKind)) {
    const uint8x16_t v = load_nibbles<kKind>(unit, quad);
    w[0] = expand<kKind>(vandq_u8(v, vdupq_n_u8(15)));
    w[1] = expand<kKind>(vshrq_n_u8(v, 4));
  } else {
    w[0] = vreinterpretq_s8_u8(vld1q_u8(unit + 16 * quad));
    w[1] = vreinterpretq_s8_u8(vld1q_u8(unit + 16 * quad + 64));
  }
}

// Quads of nl3 share bytes: their codes are addressed from the unit. Those of other kinds are addressed by their own first byte,
// so that addresses are one register and a constant.
template <int kKind>
MOEC_INLINE const uint8_t* codes_of(const uint8_t* unit, int quad) {
  return kKind == MOEC_NL3 ? unit : unit + 16 * quad;
}
template <int kKind>
MOEC_INLINE int quad_of(int quad) {
  return kKind == MOEC_NL3 ? quad : 0;
}

// Adds the products of 8 inputs, or of 16, of kQ quads of rows, from `quad` on, and kM tokens.
template <int kKind, int kQ, int kM, int kUnits>
MOEC_INLINE void dot_units(const uint8_t* codes, int quad, const int8_t* q, int64_t stride, int32x4_t (&sum)[kQ][kM]) {
  constexpr int64_t kUnitBytes = unit_bytes_of(kKind);
  int8x16_t a[kM];  // the 16 inputs of each token
  repeat<kM>([&](auto t) MOEC_ALWAYS {
    a[t] = kUnits == 2 ? vld1q_s8(q + t * stride) : vcombine_s8(vld1_s8(q + t * stride), vdup_n_s8(0));
  });
  repeat<kQ>([&](auto i) MOEC_ALWAYS {
    int8x16_t w[2];
    load_quad<kKind>(codes, quad + i, w);
    repeat<kM>([&](auto t) MOEC_ALWAYS { sum[i][t] = multiply_lane<0>(sum[i][t], w[0], a[t]); });
    repeat<kM>([&](auto t) MOEC_ALWAYS { sum[i][t] = multiply_lane<1>(sum[i][t], w[1], a[t]); });
  });
  if (kUnits == 1) return;
  repeat<kQ>([&](auto i) MOEC_ALWAYS {
    int8x16_t w[2];
    load_quad<kKind>(codes + kUnitBytes, quad + i, w);
    repeat<kM>([&](auto t) MOEC_ALWAYS { sum[i][t] = multiply_lane<2>(sum[i][t], w[0], a[t]); });
    repeat<kM>([&](auto t) MOEC_ALWAYS { sum[i][t] = multiply_lane<3>(sum[i][t], w[1], a[t]); });
  });
}

// kQ quads of a block's rows, from `first` on, times kM tokens. scales point at the first of these rows; outputs: how many exist.
// k32: a part, whose sum becomes a float, is 32 inputs long.
template <int kKind, bool kAxisOut, bool kByBlock, bool k32, int kQ, int kM>
MOEC_INLINE void multiply_quads(const GemmTask& a, const uint8_t* codes, int first, const uint8_t* scales, int64_t row,
                                float* y, const float* bias, int outputs) {
  codes = codes_of<kKind>(codes, first);
  const int quad = quad_of<kKind>(first);
  constexpr int64_t kUnitBytes = unit_bytes_of(kKind);
  constexpr bool kParts = kByBlock || !kAxisOut;
  const QuantizedRows rows = a.rows.from(row);
  const int8_t* q = rows.q;
  const int64_t stride = rows.stride, scale_stride = a.f32_scales ? 64 : 32, quad_scales = a.f32_scales ? 16 : 8;
  const int64_t part = k32 ? 32 : kAxisOut ? a.padded_k : a.group;
  const bool small = k32 || sums_are_small<kKind>(a.group);
  const int32_t* correction = rows.correction;
  const float* activation_scale = rows.scale;
  int64_t rest_of_group = a.group;
  float32x4_t total[kQ][kM];
  repeat<kQ * kM>([&](auto i) MOEC_ALWAYS { total[i / kM][i % kM] = vdupq_n_f32(0.0f); });
  for (int64_t k = 0; k < a.padded_k; k += part, correction += rows.part_stride) {
    int32x4_t sum[kQ][kM];
    repeat<kM>([&](auto t) MOEC_ALWAYS {
      const int32x4_t c = vdupq_n_s32(correction[t] + (kParts ? kBias : 0));
      repeat<kQ>([&](auto i) MOEC_ALWAYS { sum[i][t] = c; });
    });
    const auto multiply32 = [&]() MOEC_ALWAYS {
      dot_units<kKind, kQ, kM, 2>(codes, quad, q, stride, sum);
      dot_units<kKind, kQ, kM, 2>(codes + 2 * kUnitBytes, quad, q + 16, stride, sum);
      codes += 4 * kUnitBytes;
      q += 32;
    };
    if (k32 && (!kAxisOut || a.padded_k - k >= 32)) {
      multiply32();
    } else if (!kAxisOut) {
      for (int64_t i = 0; i < part; i += 32) multiply32();
    } else {  // a row may end anywhere
      int64_t rest = a.padded_k - k;
      for (; rest >= 32; rest -= 32) multiply32();
      for (; rest > 0; rest -= 8, codes += kUnitBytes, q += 8) dot_units<kKind, kQ, kM, 1>(codes, quad, q, stride, sum);
    }
    repeat<kQ>([&](auto i) MOEC_ALWAYS {
      const float32x4_t s = kAxisOut ? vdupq_n_f32(0.0f) : load_scales4(scales + quad_scales * i, a.f32_scales);
      repeat<kM>([&](auto t) MOEC_ALWAYS {
        const float32x4_t v = kParts ? to_float_biased(sum[i][t], small) : vcvtq_f32_s32(sum[i][t]);
        if (kByBlock) {
          total[i][t] = kAxisOut ? vfmaq_n_f32(total[i][t], v, activation_scale[t])
                                 : vfmaq_f32(total[i][t], vmulq_n_f32(v, activation_scale[t]), s);
        } else {
          total[i][t] = kAxisOut ? v : vfmaq_f32(total[i][t], v, s);
        }
      });
    });
    if (kByBlock) activation_scale += rows.part_stride;
    if (kAxisOut || (kByBlock && (rest_of_group -= 32) > 0)) continue;
    rest_of_group = a.group;
    scales += scale_stride;
  }
  repeat<kM>([&](auto t) MOEC_ALWAYS {
    repeat<kQ>([&](auto i) MOEC_ALWAYS {
      if (outputs <= 4 * i) return;
      const float32x4_t v = kByBlock ? total[i][t] : vmulq_n_f32(total[i][t], rows.scale[t]);
      store_outputs4(y + t * a.y_stride + 4 * i, v, bias ? bias + 4 * i : nullptr, outputs - 4 * i);
    });
  });
}

template <int kKind, bool kAxisOut, bool kByBlock, bool k32, int kQ, int kM>
__attribute__((noinline)) void gemm_dots(const GemmTask& a, const uint8_t* codes, int first, const uint8_t* scales, int64_t row,
                                         float* y, const float* bias, int outputs) {
  multiply_quads<kKind, kAxisOut, kByBlock, k32, kQ, kM>(a, codes, first, scales, row, y, bias, outputs);
}

template <int kKind, bool kAxisOut, bool kByBlock, bool k32>
MOEC_IN_ORDER __attribute__((noinline)) void gemm_four_dots(const GemmTask& a, const uint8_t* codes, int first,
                                                            const uint8_t* scales, int64_t row, float* y, const float* bias,
                                                            int outputs) {
  multiply_quads<kKind, kAxisOut, kByBlock, k32, 2, 4>(a, codes, first, scales, row, y, bias, outputs);
}

// All blocks, the tokens in tiles of up to 4 and of nearly equal size. Sums and totals of 16 rows x 1 or 2 tokens, or of 8 rows
// x 3 or 4, take 8 to 16 registers of the 32.
template <int kKind, bool kAxisOut, bool kByBlock, bool k32>
void gemm_all_dots(const GemmTask& a) {
  const int64_t scale_stride = kAxisOut ? 0 : a.padded_k / a.group * (a.f32_scales ? 64 : 32);
  const int64_t side_scales = a.f32_scales ? 32 : 16;
  const int64_t tiles = (a.m + 3) / 4;
  for (int64_t block = 0; block < a.blocks; ++block) {
    const uint8_t* const codes = a.codes + block * a.block_bytes;
    const uint8_t* const scales = kAxisOut ? nullptr : a.scales + block * scale_stride;
    const int outputs = a.outputs - block * 16 < 16 ? int(a.outputs - block * 16) : 16;
    const float* const bias = a.bias ? a.bias + block * 16 : nullptr;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = a.m * i / tiles, count = a.m * (i + 1) / tiles - row;
      float* const y = a.y + row * a.y_stride + block * 16;
      if (count <= 2) {
        const auto f = count == 1 ? gemm_dots<kKind, kAxisOut, kByBlock, k32, 4, 1>
                                  : gemm_dots<kKind, kAxisOut, kByBlock, k32, 4, 2>;
        f(a, codes, 0, scales, row, y, bias, outputs);
        continue;
      }
      const auto f = count == 3 ? gemm_dots<kKind, kAxisOut, kByBlock, k32, 2, 3>
                                : gemm_four_dots<kKind, kAxisOut, kByBlock, k32>;
      f(a, codes, 0, scales, row, y, bias, outputs < 8 ? outputs : 8);
      if (outputs <= 8) continue;
      f(a, codes, 2, kAxisOut ? nullptr : scales + side_scales, row, y + 8, bias ? bias + 8 : nullptr, outputs - 8);
    }
  }
}

template <int kKind, bool kAxisOut, bool kByBlock>
void gemm_by_dots(const GemmTask& a) {
  if (kByBlock) return gemm_all_dots<kKind, kAxisOut, kByBlock, kByBlock>(a);
  if (!kAxisOut && a.group == 32) return gemm_all_dots<kKind, kAxisOut, kByBlock, !kAxisOut>(a);
  gemm_all_dots<kKind, kAxisOut, kByBlock, kByBlock>(a);
}

}  // namespace
}  // namespace moec

#endif  // MOEC_GEMM_NEON_H_
