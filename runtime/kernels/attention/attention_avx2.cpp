// AVX2 with FMA: 8 floats a register, 16 registers.
#include <immintrin.h>

#include "attention_kernels.h"

namespace moec {
namespace {

using V = __m256;
constexpr int64_t kLanes = 8, kRows = 6, kCols = 2, kDecodeRows = 3, kKeysTogether = 2;
constexpr int64_t kScoreKeys = 4, kScoreCols = 1;
constexpr int kOrder[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7};

inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline V load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V set1(float x) { return _mm256_set1_ps(x); }
inline V zero() { return _mm256_setzero_ps(); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline V absolute(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V exp2i(V n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline V less_equal_select(V a, V b, V x, V y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
inline float hsum(V v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float hmax(V v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline V reduce(const V* part) {
  const V a = _mm256_hadd_ps(part[0], part[1]), b = _mm256_hadd_ps(part[2], part[3]);
  const V c = _mm256_hadd_ps(part[4], part[5]), d = _mm256_hadd_ps(part[6], part[7]);
  const V low = _mm256_hadd_ps(a, b), high = _mm256_hadd_ps(c, d);
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

inline void store_int8(int8_t* p, V v) {
  const V low = _mm256_max_ps(v, _mm256_set1_ps(-127.0f));
  const __m256i i = _mm256_cvtps_epi32(_mm256_min_ps(low, _mm256_set1_ps(127.0f)));
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline V swap_pairs(V v) { return _mm256_permute_ps(v, 0xB1); }
inline V duplicate_pairs(const float* c) {
  const __m256i twice = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
  return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(c)), twice);
}
inline V alternate_sign(V v) { return _mm256_xor_ps(v, _mm256_castsi256_ps(_mm256_set1_epi64x(0x80000000LL))); }

#include "attention_simd.inl"

const AttentionKernels kKernels = {kLanes, decode, tile, fold_row, quantize_row, rms_norm_row, rope_row};

}  // namespace

const AttentionKernels& avx2_attention() { return kKernels; }

}  // namespace moec
