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
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V set1(float x) { return _mm256_set1_ps(x); }
inline V zero() { return _mm256_setzero_ps(); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V min(V a, V b) { return _mm256_min_ps(a, b); }
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline V absolute(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V scale2(V p, V n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
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

using I = __m256i;
using Code = int16_t;
constexpr int64_t kPack = 2, kCodeKeys = 4, kCodeCols = 2, kCodeRows = 6, kCodeValueCols = 2, kCodeDecodeRows = 3, kCodeDecodeCols = 2;
constexpr int kPlanes = 1;

inline I izero() { return _mm256_setzero_si256(); }
inline I iload(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void istore(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline I broadcast(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return _mm256_set1_epi32(word);
}
inline I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
inline I combine(I high, I low) { return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low); }
inline I dot(I sum, I a, I b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
inline I wide(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void widen(const int8_t* from, Code* to) { istore(to, wide(from)); }
inline I gather(const int8_t* const* row, int64_t at) {
  const __m128i a = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row[0] + at));
  return _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row[1] + at))));
}
inline V to_float(I v) { return _mm256_cvtepi32_ps(v); }
inline I to_int(V v) { return _mm256_cvtps_epi32(v); }
inline I ireduce(const I* part) {
  const I a = _mm256_hadd_epi32(part[0], part[1]), b = _mm256_hadd_epi32(part[2], part[3]);
  const I c = _mm256_hadd_epi32(part[4], part[5]), d = _mm256_hadd_epi32(part[6], part[7]);
  const I low = _mm256_hadd_epi32(a, b), high = _mm256_hadd_epi32(c, d);
  return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}
inline void pack_rows(const I* codes, I* words) { words[0] = _mm256_or_si256(codes[0], _mm256_slli_epi32(codes[1], 16)); }
inline void pack_keys(void* p, I v) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}

#include "attention_simd.inl"

const AttentionKernels kKernels = {kLanes, kLanes * kPack, decode, prepare, tile, fold_row, quantize_row, rms_norm_row, rope_row};

}  // namespace

const AttentionKernels& avx2_attention() { return kKernels; }

}  // namespace moec
