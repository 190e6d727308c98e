// Sixteen lanes as one 512-bit register (AVX-512 F, BW, DQ, VL). simd_scalar.h says what each function means.
#ifndef MOEC_SIMD_AVX512_H_
#define MOEC_SIMD_AVX512_H_

// GCC 12 takes the deliberately undefined operands inside its own AVX-512 header for mistakes.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

namespace moec {
namespace {

struct F32x16 {
  __m512 a;
};
struct I32x16 {
  __m512i a;
};

inline __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1); }

inline F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F32x16 load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline void store(float* p, F32x16 x) { _mm512_storeu_ps(p, x.a); }
inline void store_n(float* p, F32x16 x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.a); }
inline F32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
inline F32x16 add(F32x16 x, F32x16 y) { return {_mm512_add_ps(x.a, y.a)}; }
inline F32x16 sub(F32x16 x, F32x16 y) { return {_mm512_sub_ps(x.a, y.a)}; }
inline F32x16 mul(F32x16 x, F32x16 y) { return {_mm512_mul_ps(x.a, y.a)}; }
inline F32x16 div(F32x16 x, F32x16 y) { return {_mm512_div_ps(x.a, y.a)}; }
inline F32x16 fma(F32x16 x, F32x16 y, F32x16 z) { return {_mm512_fmadd_ps(x.a, y.a, z.a)}; }
inline F32x16 minimum(F32x16 x, F32x16 y) { return {_mm512_min_ps(x.a, y.a)}; }
inline F32x16 maximum(F32x16 x, F32x16 y) { return {_mm512_max_ps(x.a, y.a)}; }
inline I32x16 bits(F32x16 x) { return {_mm512_castps_si512(x.a)}; }
inline F32x16 from_bits(I32x16 x) { return {_mm512_castsi512_ps(x.a)}; }
inline I32x16 iset1(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I32x16 iadd(I32x16 x, I32x16 y) { return {_mm512_add_epi32(x.a, y.a)}; }
inline I32x16 iand(I32x16 x, I32x16 y) { return {_mm512_and_si512(x.a, y.a)}; }
inline I32x16 imax(I32x16 x, I32x16 y) { return {_mm512_max_epi32(x.a, y.a)}; }
template <int kShift>
inline I32x16 shift_left(I32x16 x) {
  return {_mm512_slli_epi32(x.a, kShift)};
}
template <int kShift>
inline I32x16 shift_right(I32x16 x) {
  return {_mm512_srai_epi32(x.a, kShift)};
}
inline I32x16 round_to_int(F32x16 x) { return {_mm512_cvtps_epi32(x.a)}; }
inline F32x16 to_float(I32x16 x) { return {_mm512_cvtepi32_ps(x.a)}; }
inline float reduce_add(F32x16 x) {
  const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(x.a), _mm512_extractf32x8_ps(x.a, 1));
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
inline int32_t reduce_iadd(I32x16 x) { return _mm512_reduce_add_epi32(x.a); }
inline int32_t reduce_imax(I32x16 x) { return _mm512_reduce_max_epi32(x.a); }
inline void store_int8(int8_t* p, I32x16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.a));
}
inline void store_int8_64(int8_t* p, I32x16 x, I32x16 y, I32x16 z, I32x16 w) {
  // packing works within 128-bit quarters
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(x.a, y.a), _mm512_packs_epi32(z.a, w.a));
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, bytes));
}
inline I32x16 load_int32(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_int32(uint8_t* p, I32x16 x) { _mm512_storeu_si512(p, x.a); }
inline __m512i load_table(const uint8_t* table) {  // in all 128-bit quarters, within which bytes are looked up
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}
inline I32x16 lookup(const uint8_t* table, I32x16 x) { return {_mm512_shuffle_epi8(load_table(table), x.a)}; }
inline F32x16 load_half(const uint8_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

}  // namespace
}  // namespace moec

#endif  // MOEC_SIMD_AVX512_H_
