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
inline void store(float* p, V v) { vst1q_f32(p, v); }
inline V set1(float x) { return vdupq_n_f32(x); }
inline V zero() { return vdupq_n_f32(0.0f); }
inline V add(V a, V b) { return vaddq_f32(a, b); }
inline V sub(V a, V b) { return vsubq_f32(a, b); }
inline V div(V a, V b) { return vdivq_f32(a, b); }
inline V mul(V a, V b) { return vmulq_f32(a, b); }
inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline V min(V a, V b) { return vminq_f32(a, b); }
inline V max(V a, V b) { return vmaxq_f32(a, b); }
inline V absolute(V a) { return vabsq_f32(a); }
inline V round(V a) { return vrndnq_f32(a); }
inline V scale2(V p, V n) {
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), vshlq_n_s32(vcvtnq_s32_f32(n), 23)));
}
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

using I = int32x4_t;
using Code = int8_t;
constexpr int64_t kPack = 4, kCodeKeys = 4, kCodeCols = 2, kCodeRows = 3, kCodeValueCols = 4, kCodeDecodeRows = 3, kCodeDecodeCols = 4;
constexpr int kPlanes = 2;

inline I izero() { return vdupq_n_s32(0); }
inline I iload(const void* p) {
  I v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void istore(void* p, I v) { __builtin_memcpy(p, &v, sizeof v); }
inline I broadcast(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return vdupq_n_s32(word);
}
inline I iadd(I a, I b) { return vaddq_s32(a, b); }
inline I combine(I high, I low) { return vaddq_s32(vshlq_n_s32(high, 8), low); }
inline I dot(I sum, I a, I b) { return vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)); }
inline I wide(const int8_t* p) { return iload(p); }
inline void widen(const int8_t* from, Code* to) { istore(to, iload(from)); }
inline I gather(const int8_t* const* row, int64_t at) {
  const uint8_t columns[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  int32_t words[4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(words + i, row[i] + at, sizeof words[i]);
  const uint8x16_t rows = vreinterpretq_u8_s32(vld1q_s32(words));
  return vreinterpretq_s32_u8(vqtbl1q_u8(rows, vld1q_u8(columns)));
}
inline V to_float(I v) { return vcvtq_f32_s32(v); }
inline I to_int(V v) { return vcvtnq_s32_f32(v); }
inline I ireduce(const I* part) { return vpaddq_s32(vpaddq_s32(part[0], part[1]), vpaddq_s32(part[2], part[3])); }
inline I bytes_of(I a, I b, I c, I d) { return vsliq_n_s32(vsliq_n_s32(vsliq_n_s32(a, b, 8), c, 16), d, 24); }
inline void pack_rows(const I* codes, I* words) {
  words[0] = bytes_of(vrshrq_n_s32(codes[0], 8), vrshrq_n_s32(codes[1], 8), vrshrq_n_s32(codes[2], 8), vrshrq_n_s32(codes[3], 8));
  words[1] = bytes_of(codes[0], codes[1], codes[2], codes[3]);
}
inline void pack_keys(void* p, I v) {
  const int8x8_t bytes = vmovn_s16(vcombine_s16(vmovn_s32(vrshrq_n_s32(v, 8)), vmovn_s32(v)));
  __builtin_memcpy(p, &bytes, sizeof bytes);
}

#include "attention_simd.inl"

const AttentionKernels kKernels = {kLanes, kLanes * kPack, decode, prepare, tile, fold_row, quantize_row, rms_norm_row, rope_row};

}  // namespace

const AttentionKernels& neon_attention() { return kKernels; }

}  // namespace moec
