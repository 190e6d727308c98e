// Integer kernels on 256-bit registers, with maddubs (AVX2) or dpbusd (AVX-VNNI). Included after simd_avx2.h and
// generic_kernels.h. A pass covers 8 of a block's 16 rows and kM tokens.
//
// AVX2: int4 codes are 0..15, so a pair product is at most 2 * 15 * 127 = 3810 and eight of them (32 inputs) fit int16.
// int8 codes need |w| and the sign moved to the activation; a pair is at most 2 * 128 * 127 = 32512 and is widened at once.
// AVX-VNNI: int8 codes are offset by 128 to be unsigned, which the correction undoes.
#ifndef MOEC_GEMM_AVX2_H_
#define MOEC_GEMM_AVX2_H_

#include <immintrin.h>

#include <cstring>

namespace moec {
namespace {

inline __m256i load256(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// Four activations in every lane.
inline __m256i broadcast4(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}

template <bool kVnni>
inline __m256i dot_unsigned(__m256i sum, __m256i w, __m256i q) {
#if defined(__AVXVNNI__)
  if (kVnni) return _mm256_dpbusd_avx_epi32(sum, w, q);
#endif
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, q));
}

inline __m256i dot_signed(__m256i sum, __m256i w, __m256i magnitude, __m256i q) {
  const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(q, w));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Adds `units` (at most 4: int16 sums of AVX2 hold 32 inputs) units of 8 inputs to sum[kM].
template <int kKind, bool kVnni, int kM>
inline void add_units(const uint8_t* codes, int units, const int8_t* q, int64_t stride, __m256i* sum) {
  if (kKind == MOEC_INT4) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256i part[kM];
    if (!kVnni) {
      for (int t = 0; t < kM; ++t) part[t] = _mm256_setzero_si256();
    }
    __m256i* const to = kVnni ? sum : part;
    for (int j = 0; j < units; ++j) {
      const __m256i w = load256(codes + 64 * j);
      const __m256i w0 = _mm256_and_si256(w, low), w1 = _mm256_and_si256(_mm256_srli_epi16(w, 4), low);
      for (int t = 0; t < kM; ++t) to[t] = dot_unsigned<kVnni>(to[t], w0, broadcast4(q + t * stride + 8 * j));
      for (int t = 0; t < kM; ++t) to[t] = dot_unsigned<kVnni>(to[t], w1, broadcast4(q + t * stride + 8 * j + 4));
    }
    if (!kVnni) {
      for (int t = 0; t < kM; ++t) sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(part[t], _mm256_set1_epi16(1)));
    }
    return;
  }
  for (int j = 0; j < 2 * units; ++j) {
    const __m256i w = load256(codes + 64 * j);
    if (kVnni) {
      const __m256i u = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
      for (int t = 0; t < kM; ++t) sum[t] = dot_unsigned<true>(sum[t], u, broadcast4(q + t * stride + 4 * j));
    } else {
      const __m256i magnitude = _mm256_abs_epi8(w);
      for (int t = 0; t < kM; ++t) sum[t] = dot_signed(sum[t], w, magnitude, broadcast4(q + t * stride + 4 * j));
    }
  }
}

inline __m256 load_scales8(const uint8_t* p, bool f32) {
  return f32 ? _mm256_castsi256_ps(load256(p)) : _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline void store_outputs8(float* y, __m256 v, const float* bias, int n) {
  if (n >= 8) {
    _mm256_storeu_ps(y, bias ? _mm256_add_ps(v, _mm256_loadu_ps(bias)) : v);
    return;
  }
  alignas(32) float t[8];
  _mm256_store_ps(t, v);
  for (int i = 0; i < n; ++i) y[i] = bias ? t[i] + bias[i] : t[i];
}

// Eight rows times kM tokens. codes and scales point at the first of the eight rows; outputs: how many of them exist.
template <int kKind, bool kAxisOut, bool kVnni, int kM>
void gemm_half_block(const GemmTask& a, const uint8_t* codes, const uint8_t* scales, int64_t row, float* y, const float* bias,
                     int outputs) {
  constexpr int64_t kUnitBytes = kKind == MOEC_INT4 ? 64 : 128;
  const QuantizedRows rows = a.rows.from(row);
  const int8_t* q = rows.q;
  __m256 total[kM];
  if (kAxisOut) {
    __m256i sum[kM];
    for (int t = 0; t < kM; ++t) sum[t] = _mm256_set1_epi32(rows.correction[t]);
    int64_t units = a.padded_k / 8;
    for (; units >= 4; units -= 4, codes += 4 * kUnitBytes, q += 32) {
      add_units<kKind, kVnni, kM>(codes, 4, q, rows.stride, sum);
    }
    if (units) add_units<kKind, kVnni, kM>(codes, int(units), q, rows.stride, sum);
    for (int t = 0; t < kM; ++t) total[t] = _mm256_cvtepi32_ps(sum[t]);
  } else {
    const int64_t groups = a.padded_k / a.group, scale_stride = a.f32_scales ? 64 : 32;
    for (int t = 0; t < kM; ++t) total[t] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; ++g) {
      __m256i sum[kM];
      for (int t = 0; t < kM; ++t) sum[t] = _mm256_set1_epi32(rows.correction[g * rows.correction_stride + t]);
      for (int64_t i = 0; i < a.group; i += 32, codes += 4 * kUnitBytes, q += 32) {
        add_units<kKind, kVnni, kM>(codes, 4, q, rows.stride, sum);
      }
      const __m256 s = load_scales8(scales + g * scale_stride, a.f32_scales);
      for (int t = 0; t < kM; ++t) total[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t]), s, total[t]);
    }
  }
  for (int t = 0; t < kM; ++t) {
    store_outputs8(y + t * a.y_stride, _mm256_mul_ps(total[t], _mm256_set1_ps(rows.scale[t])), bias, outputs);
  }
}

template <int kKind, bool kAxisOut, bool kVnni>
void gemm_int8(const GemmTask& a) {
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
      gemm_half_block<kKind, kAxisOut, kVnni, 4>(a, codes, scales, row, y + row * a.y_stride, bias, outputs);
    }
    switch (a.m - row) {
      case 3: gemm_half_block<kKind, kAxisOut, kVnni, 3>(a, codes, scales, row, y + row * a.y_stride, bias, outputs); break;
      case 2: gemm_half_block<kKind, kAxisOut, kVnni, 2>(a, codes, scales, row, y + row * a.y_stride, bias, outputs); break;
      case 1: gemm_half_block<kKind, kAxisOut, kVnni, 1>(a, codes, scales, row, y + row * a.y_stride, bias, outputs); break;
    }
  }
}

template <bool kVnni>
inline Kernels table_256(const char* name) {
  Kernels t = generic_table(name, kVnni ? 128 : 0);
  t.gemm_int8[0][0] = gemm_int8<MOEC_INT4, false, kVnni>;
  t.gemm_int8[0][1] = gemm_int8<MOEC_INT4, true, kVnni>;
  t.gemm_int8[1][0] = gemm_int8<MOEC_INT8, false, kVnni>;
  t.gemm_int8[1][1] = gemm_int8<MOEC_INT8, true, kVnni>;
  return t;
}

}  // namespace
}  // namespace moec

#endif  // MOEC_GEMM_AVX2_H_
