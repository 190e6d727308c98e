// Sixteen lanes as four 128-bit registers (Armv8.2-A with FP16 conversion). simd_scalar.h says what each function means.
#ifndef MOEC_SIMD_NEON_H_
#define MOEC_SIMD_NEON_H_

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace moec {
namespace {

struct F32x16 {
  float32x4_t v[4];
};
struct I32x16 {
  int32x4_t v[4];
};

template <typename Out, typename Function>
inline Out quarters(Function f) {
  return Out{{f(0), f(1), f(2), f(3)}};
}

inline F32x16 load(const float* p) {
  return quarters<F32x16>([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline F32x16 load_n(const float* p, int n) {
  float t[16] = {};
  std::memcpy(t, p, size_t(n) * 4);
  return load(t);
}
inline void store(float* p, const F32x16& x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
inline void store_n(float* p, const F32x16& x, int n) {
  float t[16];
  store(t, x);
  std::memcpy(p, t, size_t(n) * 4);
}
inline F32x16 set1(float x) {
  return quarters<F32x16>([&](int) { return vdupq_n_f32(x); });
}
inline F32x16 add(const F32x16& x, const F32x16& y) {
  return quarters<F32x16>([&](int i) { return vaddq_f32(x.v[i], y.v[i]); });
}
inline F32x16 sub(const F32x16& x, const F32x16& y) {
  return quarters<F32x16>([&](int i) { return vsubq_f32(x.v[i], y.v[i]); });
}
inline F32x16 mul(const F32x16& x, const F32x16& y) {
  return quarters<F32x16>([&](int i) { return vmulq_f32(x.v[i], y.v[i]); });
}
inline F32x16 div(const F32x16& x, const F32x16& y) {
  return quarters<F32x16>([&](int i) { return vdivq_f32(x.v[i], y.v[i]); });
}
inline F32x16 fma(const F32x16& x, const F32x16& y, const F32x16& z) {
  return quarters<F32x16>([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); });
}
inline F32x16 minimum(const F32x16& x, const F32x16& y) {
  return quarters<F32x16>([&](int i) { return vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]); });
}
inline F32x16 maximum(const F32x16& x, const F32x16& y) {
  return quarters<F32x16>([&](int i) { return vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]); });
}
inline I32x16 bits(const F32x16& x) {
  return quarters<I32x16>([&](int i) { return vreinterpretq_s32_f32(x.v[i]); });
}
inline F32x16 from_bits(const I32x16& x) {
  return quarters<F32x16>([&](int i) { return vreinterpretq_f32_s32(x.v[i]); });
}
inline I32x16 iset1(int32_t x) {
  return quarters<I32x16>([&](int) { return vdupq_n_s32(x); });
}
inline I32x16 iadd(const I32x16& x, const I32x16& y) {
  return quarters<I32x16>([&](int i) { return vaddq_s32(x.v[i], y.v[i]); });
}
inline I32x16 iand(const I32x16& x, const I32x16& y) {
  return quarters<I32x16>([&](int i) { return vandq_s32(x.v[i], y.v[i]); });
}
inline I32x16 imax(const I32x16& x, const I32x16& y) {
  return quarters<I32x16>([&](int i) { return vmaxq_s32(x.v[i], y.v[i]); });
}
template <int kShift>
inline I32x16 shift_left(const I32x16& x) {
  return quarters<I32x16>([&](int i) { return vshlq_n_s32(x.v[i], kShift); });
}
template <int kShift>
inline I32x16 shift_right(const I32x16& x) {
  // the instruction has no shift by 0
  return quarters<I32x16>([&](int i) { return kShift ? vshrq_n_s32(x.v[i], kShift ? kShift : 1) : x.v[i]; });
}
// Out of range saturates and NaN gives 0 here, unlike x86; no caller depends on either.
inline I32x16 round_to_int(const F32x16& x) {
  return quarters<I32x16>([&](int i) { return vcvtnq_s32_f32(x.v[i]); });
}
inline F32x16 to_float(const I32x16& x) {
  return quarters<F32x16>([&](int i) { return vcvtq_f32_s32(x.v[i]); });
}
inline float reduce_add(const F32x16& x) {
  const float32x4_t s4 = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x2_t s2 = vadd_f32(vget_low_f32(s4), vget_high_f32(s4));
  return vget_lane_f32(s2, 0) + vget_lane_f32(s2, 1);
}
inline int32_t reduce_iadd(const I32x16& x) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3])));
}
inline int32_t reduce_imax(const I32x16& x) {
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.v[0], x.v[1]), vmaxq_s32(x.v[2], x.v[3])));
}
inline void store_int8(int8_t* p, const I32x16& x) {
  const int16x8_t low = vcombine_s16(vmovn_s32(x.v[0]), vmovn_s32(x.v[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(x.v[2]), vmovn_s32(x.v[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
inline void store_int8_64(int8_t* p, const I32x16& a, const I32x16& b, const I32x16& c, const I32x16& d) {
  store_int8(p, a);
  store_int8(p + 16, b);
  store_int8(p + 32, c);
  store_int8(p + 48, d);
}
inline I32x16 load_int32(const uint8_t* p) {
  return quarters<I32x16>([&](int i) { return vreinterpretq_s32_u8(vld1q_u8(p + 16 * i)); });
}
inline void store_int32(uint8_t* p, const I32x16& x) {
  for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, vreinterpretq_u8_s32(x.v[i]));
}
inline I32x16 lookup(const uint8_t* table, const I32x16& x) {
  const uint8x16_t t = vld1q_u8(table);
  return quarters<I32x16>([&](int i) { return vreinterpretq_s32_u8(vqtbl1q_u8(t, vreinterpretq_u8_s32(x.v[i]))); });
}
inline F32x16 load_half(const uint8_t* p) {
  return quarters<F32x16>([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * i))); });
}

}  // namespace
}  // namespace moec

#endif  // MOEC_SIMD_NEON_H_
