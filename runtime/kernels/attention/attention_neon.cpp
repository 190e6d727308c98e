// NEON of armv8: 4 floats a register, 32 registers.
#include <arm_neon.h>

#include "attention_kernels.h"

namespace moec {
namespace {

using V = float32x4_t;
constexpr int64_t kLanes = 4, kRows = 6, kCols = 4, kDecodeRows = 5, kKeysTogether = 4;
constexpr int64_t kScoreKeys = 4, kScoreCols = 2;
constexpr int kOrder[kLanes] = {0, 1, 2, 3};

inline V load(const float* p) { return vld1q_f32(p); }
inline V load(const int8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
}
inline void store(float* p, V v) { vst1q_f32(p, v); }
inline V set1(float x) { return vdupq_n_f32(x); }
inline V zero() { return vdupq_n_f32(0.0f); }
inline V add(V a, V b) { return vaddq_f32(a, b); }
inline V sub(V a, V b) { return vsubq_f32(a, b); }
inline V div(V a, V b) { return vdivq_f32(a, b); }
inline V mul(V a, V b) { return vmulq_f32(a, b); }
inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline V max(V a, V b) { return vmaxq_f32(a, b); }
inline V absolute(V a) { return vabsq_f32(a); }
inline V round(V a) { return vrndnq_f32(a); }
inline V exp2i(V n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23)); }
inline V less_equal_select(V a, V b, V x, V y) { return vbslq_f32(vcleq_f32(a, b), x, y); }
inline float hsum(V v) { return vaddvq_f32(v); }
inline float hmax(V v) { return vmaxvq_f32(v); }
inline V reduce(const V* part) { return vpaddq_f32(vpaddq_f32(part[0], part[1]), vpaddq_f32(part[2], part[3])); }

inline void store_int8(int8_t* p, V v) {
  const V clamped = vminq_f32(vmaxq_f32(v, vdupq_n_f32(-127.0f)), vdupq_n_f32(127.0f));
  const int16x4_t words = vmovn_s32(vcvtnq_s32_f32(clamped));
  const uint32_t four = vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(words, words))), 0);
  __builtin_memcpy(p, &four, sizeof four);
}
inline V swap_pairs(V v) { return vrev64q_f32(v); }
inline V duplicate_pairs(const float* c) {
  const float32x2_t two = vld1_f32(c);
  return vzip1q_f32(vcombine_f32(two, two), vcombine_f32(two, two));
}
inline V alternate_sign(V v) {
  const uint32x4_t sign = vreinterpretq_u32_u64(vdupq_n_u64(0x80000000ULL));
  return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(v), sign));
}

#include "attention_simd.inl"

const AttentionKernels kKernels = {kLanes, decode, tile, fold_row, quantize_row, rms_norm_row, rope_row};

}  // namespace

const AttentionKernels& neon_attention() { return kKernels; }

}  // namespace moec
