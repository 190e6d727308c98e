// Sixteen lanes in plain C++: the reference for the vector types of simd_avx2.h, simd_avx512.h and simd_neon.h.
// min, max and clamp return the second operand when one is NaN, as x86 does.
#ifndef MOEC_SIMD_SCALAR_H_
#define MOEC_SIMD_SCALAR_H_

#include <cmath>
#include <cstdint>
#include <cstring>

namespace moec {
namespace {

struct F32x16 {
  float v[16];
};
struct I32x16 {
  int32_t v[16];
};

template <typename Out, typename Function>
inline Out lanes(Function f) {
  Out r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(i);
  return r;
}

inline F32x16 load(const float* p) {
  F32x16 r;
  std::memcpy(r.v, p, 64);
  return r;
}
inline F32x16 load_n(const float* p, int n) {
  return lanes<F32x16>([&](int i) { return i < n ? p[i] : 0.0f; });
}
inline void store(float* p, const F32x16& a) { std::memcpy(p, a.v, 64); }
inline void store_n(float* p, const F32x16& a, int n) { std::memcpy(p, a.v, size_t(n) * 4); }
inline F32x16 set1(float x) {
  return lanes<F32x16>([&](int) { return x; });
}
inline F32x16 add(const F32x16& a, const F32x16& b) {
  return lanes<F32x16>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32x16 sub(const F32x16& a, const F32x16& b) {
  return lanes<F32x16>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F32x16 mul(const F32x16& a, const F32x16& b) {
  return lanes<F32x16>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32x16 div(const F32x16& a, const F32x16& b) {
  return lanes<F32x16>([&](int i) { return a.v[i] / b.v[i]; });
}
// a * b + c
inline F32x16 fma(const F32x16& a, const F32x16& b, const F32x16& c) {
  return lanes<F32x16>([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
inline F32x16 minimum(const F32x16& a, const F32x16& b) {
  return lanes<F32x16>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 maximum(const F32x16& a, const F32x16& b) {
  return lanes<F32x16>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline I32x16 bits(const F32x16& a) {
  I32x16 r;
  std::memcpy(r.v, a.v, 64);
  return r;
}
inline F32x16 from_bits(const I32x16& a) {
  F32x16 r;
  std::memcpy(r.v, a.v, 64);
  return r;
}
inline I32x16 iset1(int32_t x) {
  return lanes<I32x16>([&](int) { return x; });
}
inline I32x16 iadd(const I32x16& a, const I32x16& b) {
  return lanes<I32x16>([&](int i) { return int32_t(uint32_t(a.v[i]) + uint32_t(b.v[i])); });
}
inline I32x16 iand(const I32x16& a, const I32x16& b) {
  return lanes<I32x16>([&](int i) { return a.v[i] & b.v[i]; });
}
inline I32x16 imax(const I32x16& a, const I32x16& b) {
  return lanes<I32x16>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
template <int kShift>
inline I32x16 shift_left(const I32x16& a) {
  return lanes<I32x16>([&](int i) { return int32_t(uint32_t(a.v[i]) << kShift); });
}
template <int kShift>
inline I32x16 shift_right(const I32x16& a) {  // arithmetic
  return lanes<I32x16>([&](int i) { return a.v[i] >> kShift; });
}
// Nearest, ties to even; a NaN or a number out of range gives INT32_MIN.
inline I32x16 round_to_int(const F32x16& a) {
  return lanes<I32x16>([&](int i) {
    const float x = a.v[i];
    return x >= -2147483648.0f && x < 2147483648.0f ? int32_t(std::nearbyintf(x)) : INT32_MIN;
  });
}
inline F32x16 to_float(const I32x16& a) {
  return lanes<F32x16>([&](int i) { return float(a.v[i]); });
}
inline float reduce_add(const F32x16& a) {  // lanes 8, 4, 2, 1 apart
  float s[8];
  for (int i = 0; i < 8; ++i) s[i] = a.v[i] + a.v[i + 8];
  for (int i = 0; i < 4; ++i) s[i] = s[i] + s[i + 4];
  for (int i = 0; i < 2; ++i) s[i] = s[i] + s[i + 2];
  return s[0] + s[1];
}
inline int32_t reduce_iadd(const I32x16& a) {
  uint32_t s = 0;
  for (int i = 0; i < 16; ++i) s += uint32_t(a.v[i]);
  return int32_t(s);
}
inline int32_t reduce_imax(const I32x16& a) {
  int32_t m = a.v[0];
  for (int i = 1; i < 16; ++i) m = m > a.v[i] ? m : a.v[i];
  return m;
}
// Lanes that fit int8 as 16 bytes.
inline void store_int8(int8_t* p, const I32x16& a) {
  for (int i = 0; i < 16; ++i) p[i] = int8_t(a.v[i]);
}
inline void store_int8_64(int8_t* p, const I32x16& a, const I32x16& b, const I32x16& c, const I32x16& d) {
  store_int8(p, a);
  store_int8(p + 16, b);
  store_int8(p + 32, c);
  store_int8(p + 48, d);
}
inline I32x16 load_int32(const uint8_t* p) {
  I32x16 r;
  std::memcpy(r.v, p, 64);
  return r;
}

inline void store_int32(uint8_t* p, const I32x16& x) { std::memcpy(p, x.v, 64); }
// Every byte of x, 0..15 each, replaced by that byte of a table of 16.
inline I32x16 lookup(const uint8_t* table, const I32x16& x) {
  uint8_t b[64];
  std::memcpy(b, x.v, 64);
  for (uint8_t& byte : b) byte = table[byte];
  I32x16 r;
  std::memcpy(r.v, b, 64);
  return r;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7FFF;
  uint32_t u;
  if (rest >= 0x7C00) {
    u = sign | 0x7F800000 | (rest & 0x3FF) << 13 | (rest > 0x7C00 ? 0x400000 : 0);  // NaNs come out quiet
  } else if (rest >= 0x400) {
    u = sign | ((rest << 13) + (112u << 23));
  } else {
    const float magnitude = float(rest) * 5.9604644775390625e-08f;  // 2^-24
    std::memcpy(&u, &magnitude, 4);
    u |= sign;
  }
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline F32x16 load_half(const uint8_t* p) {
  uint16_t h[16];
  std::memcpy(h, p, 32);
  return lanes<F32x16>([&](int i) { return half_to_float(h[i]); });
}

}  // namespace
}  // namespace moec

#endif  // MOEC_SIMD_SCALAR_H_
