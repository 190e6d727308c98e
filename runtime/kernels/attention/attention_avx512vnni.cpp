// AVX-512 (F, BW, DQ, VL): 16 floats a register, 32 registers.
#include <immintrin.h>

#include "attention_kernels.h"

namespace moec {
namespace {

using V = __m512;
constexpr int64_t kLanes = 16, kRows = 6, kCols = 4, kDecodeRows = 5, kKeysTogether = 4;
constexpr int64_t kScoreKeys = 8, kScoreCols = 1;
constexpr int kOrder[kLanes] = {0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15};

inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V set1(float x) { return _mm512_set1_ps(x); }
inline V zero() { return _mm512_setzero_ps(); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V min(V a, V b) { return _mm512_min_ps(a, b); }
inline V max(V a, V b) { return _mm512_max_ps(a, b); }
inline V absolute(V a) { return _mm512_abs_ps(a); }
inline V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V scale2(V p, V n) { return _mm512_scalef_ps(p, n); }
inline V less_equal_select(V a, V b, V x, V y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), y, x); }
inline float hsum(V v) { return _mm512_reduce_add_ps(v); }
inline float hmax(V v) { return _mm512_reduce_max_ps(v); }

// Sums of 128-bit quarters: (a0 + a1, a2 + a3, b0 + b1, b2 + b3).
inline V add_quarters(V a, V b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}
// Quarter j holds four partial sums of part[4 j], stride 4: the order that the last two steps leave in place.
inline V quarters_of(const V* part) {
  return add_quarters(add_quarters(part[0], part[4]), add_quarters(part[8], part[12]));
}
inline V reduce(const V* part) {
  const V a = quarters_of(part), b = quarters_of(part + 1), c = quarters_of(part + 2), d = quarters_of(part + 3);
  const V ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const V cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}

inline void store_int8(int8_t* p, V v) {
  const V low = _mm512_max_ps(v, _mm512_set1_ps(-127.0f));
  const __m512i i = _mm512_cvtps_epi32(_mm512_min_ps(low, _mm512_set1_ps(127.0f)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(i));
}
inline V swap_pairs(V v) { return _mm512_permute_ps(v, 0xB1); }
inline V duplicate_pairs(const float* c) {
  const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(c)));
}
inline V alternate_sign(V v) {
  return _mm512_xor_ps(v, _mm512_castsi512_ps(_mm512_set1_epi64(0x80000000LL)));
}

using I = __m512i;
using Code = int16_t;
constexpr int64_t kPack = 2, kCodeKeys = 8, kCodeCols = 2, kCodeRows = 6, kCodeValueCols = 4, kCodeDecodeRows = 3, kCodeDecodeCols = 4;
constexpr int kPlanes = 1;

inline I izero() { return _mm512_setzero_si512(); }
inline I iload(const void* p) { return _mm512_loadu_si512(p); }
inline void istore(void* p, I v) { _mm512_storeu_si512(p, v); }
inline I broadcast(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return _mm512_set1_epi32(word);
}
inline I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
inline I combine(I high, I low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
inline I dot(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }
inline I wide(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void widen(const int8_t* from, Code* to) { istore(to, wide(from)); }
inline I gather(const int8_t* const* row, int64_t at) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[0] + at));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[1] + at));
  return _mm512_cvtepi8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b)));
}
inline V to_float(I v) { return _mm512_cvtepi32_ps(v); }
inline I to_int(V v) { return _mm512_cvtps_epi32(v); }
inline I add_quarters(I a, I b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
}
inline I quarters_of(const I* part) { return add_quarters(add_quarters(part[0], part[4]), add_quarters(part[8], part[12])); }
inline I ireduce(const I* part) {
  const I a = quarters_of(part), b = quarters_of(part + 1), c = quarters_of(part + 2), d = quarters_of(part + 3);
  const I ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const I cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}
inline void pack_rows(const I* codes, I* words) { words[0] = _mm512_or_si512(codes[0], _mm512_slli_epi32(codes[1], 16)); }
inline void pack_keys(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v)); }

#include "attention_simd.inl"

const AttentionKernels kKernels = {kLanes, kLanes * kPack, decode, prepare, tile, fold_row, quantize_row, rms_norm_row, rope_row};

}  // namespace

const AttentionKernels& avx512vnni_attention() { return kKernels; }

}  // namespace moec
