// Integer kernels on 512-bit registers with dpbusd: a pass covers a block's 16 rows and kM tokens. int8 codes are offset by
// 128 to be unsigned, which the correction undoes.
#include "simd_avx512.h"
//
#include "generic_kernels.h"

namespace moec {
namespace {

constexpr int kTile = 12;  // tokens: 24 accumulators leave room for weights and the mask

inline __m512i load512(const uint8_t* p) { return _mm512_loadu_si512(p); }

// Four activations in every lane; the compiler folds it into dpbusd as a broadcast operand.
inline __m512i broadcast4(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}

// Adds `units` units of 8 inputs to sum[kM].
template <int kKind, int kM>
inline __attribute__((always_inline)) void add_units(const uint8_t* codes, int units, const int8_t* q, int64_t stride,
                                                     __m512i* sum) {
  const __m512i low = _mm512_set1_epi8(15), flip = _mm512_set1_epi8(-128);
#pragma GCC unroll 4
  for (int j = 0; j < units; ++j) {
    __m512i w0, w1;
    if (kKind == MOEC_INT4) {
      const __m512i w = load512(codes + 64 * j);
      w0 = _mm512_and_si512(w, low);
      w1 = _mm512_and_si512(_mm512_srli_epi16(w, 4), low);
    } else {
      w0 = _mm512_xor_si512(load512(codes + 128 * j), flip);
      w1 = _mm512_xor_si512(load512(codes + 128 * j + 64), flip);
    }
#pragma GCC unroll 16
    for (int t = 0; t < kM; ++t) sum[t] = _mm512_dpbusd_epi32(sum[t], w0, broadcast4(q + t * stride + 8 * j));
#pragma GCC unroll 16
    for (int t = 0; t < kM; ++t) sum[t] = _mm512_dpbusd_epi32(sum[t], w1, broadcast4(q + t * stride + 8 * j + 4));
  }
}

template <int kKind, bool kAxisOut, int kM>
void gemm_block(const GemmTask& a, const uint8_t* codes, const uint8_t* scales, int64_t row, float* y, const float* bias,
                int outputs) {
  constexpr int64_t kUnitBytes = kKind == MOEC_INT4 ? 64 : 128;
  const QuantizedRows rows = a.rows.from(row);
  const int8_t* q = rows.q;
  __m512 total[kM];
  if (kAxisOut) {
    __m512i sum[kM];
    for (int t = 0; t < kM; ++t) sum[t] = _mm512_set1_epi32(rows.correction[t]);
    int64_t units = a.padded_k / 8;
    for (; units >= 4; units -= 4, codes += 4 * kUnitBytes, q += 32) add_units<kKind, kM>(codes, 4, q, rows.stride, sum);
    for (; units > 0; --units, codes += kUnitBytes, q += 8) add_units<kKind, kM>(codes, 1, q, rows.stride, sum);
    for (int t = 0; t < kM; ++t) total[t] = _mm512_cvtepi32_ps(sum[t]);
  } else {
    const int64_t groups = a.padded_k / a.group, scale_stride = a.f32_scales ? 64 : 32;
    for (int t = 0; t < kM; ++t) total[t] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g) {
      __m512i sum[kM];
      for (int t = 0; t < kM; ++t) sum[t] = _mm512_set1_epi32(rows.correction[t * rows.correction_stride + g]);
      for (int64_t i = 0; i < a.group; i += 32, codes += 4 * kUnitBytes, q += 32) {
        add_units<kKind, kM>(codes, 4, q, rows.stride, sum);
      }
      const __m512 s = load_scales(scales + g * scale_stride, a.f32_scales).a;
      for (int t = 0; t < kM; ++t) total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t]), s, total[t]);
    }
  }
  for (int t = 0; t < kM; ++t) {
    store_outputs(y + t * a.y_stride, {_mm512_mul_ps(total[t], _mm512_set1_ps(rows.scale[t]))}, bias, outputs);
  }
}

using BlockFunction = void (*)(const GemmTask&, const uint8_t*, const uint8_t*, int64_t, float*, const float*, int);

template <int kKind, bool kAxisOut>
void gemm_int8(const GemmTask& a) {
  static constexpr BlockFunction kBlock[kTile + 1] = {
      nullptr,
      gemm_block<kKind, kAxisOut, 1>, gemm_block<kKind, kAxisOut, 2>, gemm_block<kKind, kAxisOut, 3>,
      gemm_block<kKind, kAxisOut, 4>, gemm_block<kKind, kAxisOut, 5>, gemm_block<kKind, kAxisOut, 6>,
      gemm_block<kKind, kAxisOut, 7>, gemm_block<kKind, kAxisOut, 8>, gemm_block<kKind, kAxisOut, 9>,
      gemm_block<kKind, kAxisOut, 10>, gemm_block<kKind, kAxisOut, 11>, gemm_block<kKind, kAxisOut, 12>,
  };
  const int64_t scale_stride = kAxisOut ? 0 : a.padded_k / a.group * (a.f32_scales ? 64 : 32);
  const int64_t tiles = (a.m + kTile - 1) / kTile;  // of nearly equal size: two tiles of 7 beat 12 and 2
  for (int64_t block = 0; block < a.blocks; ++block) {
    const uint8_t* const codes = a.codes + block * a.block_bytes;
    const uint8_t* const scales = kAxisOut ? nullptr : a.scales + block * scale_stride;
    const int outputs = a.outputs - block * 16 < 16 ? int(a.outputs - block * 16) : 16;
    const float* const bias = a.bias ? a.bias + block * 16 : nullptr;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = a.m * i / tiles, rows = a.m * (i + 1) / tiles - row;
      kBlock[rows](a, codes, scales, row, a.y + row * a.y_stride + block * 16, bias, outputs);
    }
  }
}

}  // namespace

const Kernels& avx512vnni_kernels() {
  static const Kernels table = [] {
    Kernels t = generic_table("avx512vnni", 128);
    t.gemm_int8[0][0] = gemm_int8<MOEC_INT4, false>;
    t.gemm_int8[0][1] = gemm_int8<MOEC_INT4, true>;
    t.gemm_int8[1][0] = gemm_int8<MOEC_INT8, false>;
    t.gemm_int8[1][1] = gemm_int8<MOEC_INT8, true>;
    return t;
  }();
  return table;
}

}  // namespace moec
