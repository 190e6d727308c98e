// Integer kernels on 256-bit registers, with maddubs (AVX2) or dpbusd (AVX-VNNI). Included after simd_avx2.h and
// generic_kernels.h. A pass covers a block's 16 rows and kM tokens.
//
// AVX2: int4 codes are 0..15, so a pair product is at most 2 * 15 * 127 = 3810 and eight of them (32 inputs) fit int16. FP4
// levels with their offset are 0..24, those of NL3 0..29: 7366 at most, and four (16 inputs). int8 codes and IQ4_NL levels need
// |w| and the sign moved to the activation; a pair is at most 2 * 128 * 127 = 32512 and is widened at once.
// AVX-VNNI: int8 codes and IQ4_NL levels are offset by 128 to be unsigned, which the correction undoes.
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

#define MOEC_UNROLL _Pragma("GCC unroll 16")

// Adds w * q to sum: int32 lanes by dpbusd, or int16 lanes by maddubs.
template <bool kVnni>
inline __m256i dot_unsigned(__m256i sum, __m256i w, __m256i q) {
#if defined(__AVXVNNI__)
  if (kVnni) return _mm256_dpbusd_avx_epi32(sum, w, q);
#endif
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, q));
  asm("" : "+x"(sum));  // or the compiler regroups the additions and spills every product
  return sum;
}

inline __m256i dot_signed(__m256i sum, __m256i w, __m256i magnitude, __m256i q) {
  const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(q, w));
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  asm("" : "+x"(sum));
  return sum;
}

// Whether products are of an unsigned weight, not of a magnitude and a sign.
constexpr bool is_unsigned(int kind, bool vnni) { return vnni || kind == MOEC_INT4 || has_small_levels(kind); }
constexpr int offset_of(int kind, bool vnni) { return has_small_levels(kind) ? small_offset(kind) : vnni ? 128 : 0; }

// What nibbles stand for, with the offset.
template <int kKind, bool kVnni>
inline __m256i expand(__m256i nibbles) {
  if (!has_levels(kKind)) return nibbles;
  return _mm256_shuffle_epi8(load_table(kLevelTable<kKind, offset_of(kKind, kVnni)>.bytes), nibbles);
}

// Both codes of a byte, as nibbles, of 8 rows of a unit: the first 8 or the last.
template <int kKind, int kHalf>
inline __attribute__((always_inline)) __m256i load_nibbles(const uint8_t* unit) {
  if (kKind != MOEC_NL3) return load256(unit + 32 * kHalf);
  const __m256i low = load256(unit);
  const __m256i third = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(unit + 32)));
  // bits of quarters 0 and 1 of the nibbles move up by 2 and 1, those of 2 and 3 by 0 and down by 1
  const __m256i by = kHalf ? _mm256_setr_epi64x(0, 0, 0x0000000100000001, 0x0000000100000001)
                           : _mm256_setr_epi64x(0x0000000200000002, 0x0000000200000002, 0x0000000100000001, 0x0000000100000001);
  const __m256i moved = kHalf ? _mm256_srlv_epi32(third, by) : _mm256_sllv_epi32(third, by);
  return _mm256_or_si256(_mm256_and_si256(kHalf ? _mm256_srli_epi16(low, 2) : low, _mm256_set1_epi8(0x33)),
                         _mm256_and_si256(moved, _mm256_set1_epi8(0x44)));
}

// The weights of inputs 4 * kPart .. of 8 rows of a unit.
template <int kKind, bool kVnni, int kPart, int kHalf>
inline __attribute__((always_inline)) __m256i load_rows(const uint8_t* codes) {
  if (is_nibble(kKind)) {
    const __m256i both = load_nibbles<kKind, kHalf>(codes);
    return expand<kKind, kVnni>(_mm256_and_si256(kPart ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15)));
  }
  const __m256i w = load256(codes + 64 * kPart + 32 * kHalf);
  return kVnni ? _mm256_xor_si256(w, _mm256_set1_epi8(-128)) : w;
}

template <int kKind, bool kVnni, int kM, int kPart>
inline __attribute__((always_inline)) void add_part(const uint8_t* codes, const int8_t* q, int64_t stride,
                                                    __m256i (&sum)[2][kM]) {
  constexpr bool kUnsigned = is_unsigned(kKind, kVnni);
  const __m256i w0 = load_rows<kKind, kVnni, kPart, 0>(codes), w1 = load_rows<kKind, kVnni, kPart, 1>(codes);
  const __m256i m0 = kUnsigned ? w0 : _mm256_abs_epi8(w0), m1 = kUnsigned ? w1 : _mm256_abs_epi8(w1);
  MOEC_UNROLL
  for (int t = 0; t < kM; ++t) {
    const __m256i a = broadcast4(q + t * stride + 4 * kPart);
    sum[0][t] = kUnsigned ? dot_unsigned<kVnni>(sum[0][t], w0, a) : dot_signed(sum[0][t], w0, m0, a);
    sum[1][t] = kUnsigned ? dot_unsigned<kVnni>(sum[1][t], w1, a) : dot_signed(sum[1][t], w1, m1, a);
  }
}

// Adds one unit of 8 inputs to sum[2][kM], the two halves of a block. Unsigned weights without VNNI: the sums are int16.
template <int kKind, bool kVnni, int kM>
inline __attribute__((always_inline)) void add_unit(const uint8_t* codes, int64_t block_bytes, const int8_t* q, int64_t stride,
                                                    __m256i (&sum)[2][kM]) {
  // the next block, while this one is multiplied; for one token it is read once and needs no room in outer caches
  constexpr int kLocality = kM == 1 ? 0 : 3;
  __builtin_prefetch(codes + block_bytes, 0, kLocality);
  if (!is_nibble(kKind)) __builtin_prefetch(codes + block_bytes + 64, 0, kLocality);
  add_part<kKind, kVnni, kM, 0>(codes, q, stride, sum);
  add_part<kKind, kVnni, kM, 1>(codes, q, stride, sum);
}

// Adds as many units as 16 bits can sum.
template <int kKind, int kM>
inline __attribute__((always_inline)) void add_narrow(const uint8_t* codes, int units, int64_t block_bytes, const int8_t* q,
                                                      int64_t stride, __m256i (&sum)[2][kM]) {
  constexpr int64_t kUnitBytes = unit_bytes_of(kKind);
  __m256i part[2][kM];
  MOEC_UNROLL
  for (int t = 0; t < kM; ++t) part[0][t] = part[1][t] = _mm256_setzero_si256();
  for (int j = 0; j < units; ++j) add_unit<kKind, false, kM>(codes + kUnitBytes * j, block_bytes, q + 8 * j, stride, part);
  MOEC_UNROLL
  for (int t = 0; t < kM; ++t) {
    for (int h = 0; h < 2; ++h) {
      sum[h][t] = _mm256_add_epi32(sum[h][t], _mm256_madd_epi16(part[h][t], _mm256_set1_epi16(1)));
    }
  }
}

// Adds `units` units, 4 at most, to sum[2][kM] of int32 lanes.
template <int kKind, bool kVnni, int kM>
inline __attribute__((always_inline)) void add_units(const uint8_t* codes, int units, int64_t block_bytes, const int8_t* q,
                                                     int64_t stride, __m256i (&sum)[2][kM]) {
  constexpr int64_t kUnitBytes = unit_bytes_of(kKind);
  if (kVnni || !is_unsigned(kKind, kVnni)) {
    for (int j = 0; j < units; ++j) add_unit<kKind, kVnni, kM>(codes + kUnitBytes * j, block_bytes, q + 8 * j, stride, sum);
    return;
  }
  constexpr int kMost = has_small_levels(kKind) ? 2 : 4;
  if (kMost == 4 || units <= kMost) return add_narrow<kKind, kM>(codes, units, block_bytes, q, stride, sum);
  add_narrow<kKind, kM>(codes, kMost, block_bytes, q, stride, sum);
  add_narrow<kKind, kM>(codes + kUnitBytes * kMost, units - kMost, block_bytes, q + 8 * kMost, stride, sum);
}

inline __m256 load_scales8(const uint8_t* p, bool f32) {
  return f32 ? _mm256_castsi256_ps(load256(p)) : _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// One block times kM tokens. Sums of groups live in memory: registers go to the products of one group.
template <int kKind, bool kAxisOut, bool kByBlock, bool kVnni, int kM>
void gemm_block(const GemmTask& a, const uint8_t* codes, const uint8_t* scales, int64_t row, float* y, const float* bias,
                int outputs) {
  constexpr int64_t kUnitBytes = unit_bytes_of(kKind);
  const QuantizedRows rows = a.rows.from(row);
  const int8_t* q = rows.q;
  const int64_t stride = rows.stride, block_bytes = a.block_bytes;
  __m256 total[2][kM];
  __m256i sum[2][kM];
  const int32_t* correction = rows.correction;
  if (kByBlock) {
    const int64_t groups = kAxisOut ? 1 : a.padded_k / a.group, scale_stride = a.f32_scales ? 64 : 32;
    const float* activation_scale = rows.scale;
    int64_t rest_of_group = a.group;
    for (int t = 0; t < kM; ++t) total[0][t] = total[1][t] = _mm256_setzero_ps();
    for (int64_t k = 0; k < a.padded_k; k += 32, correction += rows.part_stride, activation_scale += rows.part_stride) {
      MOEC_UNROLL
      for (int t = 0; t < kM; ++t) sum[0][t] = sum[1][t] = _mm256_set1_epi32(correction[t]);
      const int units = kAxisOut && a.padded_k - k < 32 ? int(a.padded_k - k) / 8 : 4;
      add_units<kKind, kVnni, kM>(codes, units, block_bytes, q, stride, sum);
      codes += units * kUnitBytes;
      q += 32;
      MOEC_UNROLL
      for (int h = 0; h < 2; ++h) {
        const __m256 s = kAxisOut ? _mm256_setzero_ps() : load_scales8(scales + h * (a.f32_scales ? 32 : 16), a.f32_scales);
        if (!kAxisOut) __builtin_prefetch(scales + groups * scale_stride);
        MOEC_UNROLL
        for (int t = 0; t < kM; ++t) {
          const __m256 part = _mm256_cvtepi32_ps(sum[h][t]), as = _mm256_set1_ps(activation_scale[t]);
          total[h][t] = kAxisOut ? _mm256_fmadd_ps(part, as, total[h][t])
                                 : _mm256_fmadd_ps(_mm256_mul_ps(part, as), s, total[h][t]);
        }
      }
      if (!kAxisOut && (rest_of_group -= 32) == 0) {
        rest_of_group = a.group;
        scales += scale_stride;
      }
    }
  } else if (kAxisOut) {
    MOEC_UNROLL
    for (int t = 0; t < kM; ++t) sum[0][t] = sum[1][t] = _mm256_set1_epi32(correction[t]);
    int64_t units = a.padded_k / 8;
    for (; units >= 4; units -= 4, codes += 4 * kUnitBytes, q += 32) {
      add_units<kKind, kVnni, kM>(codes, 4, block_bytes, q, stride, sum);
    }
    if (units) add_units<kKind, kVnni, kM>(codes, int(units), block_bytes, q, stride, sum);
    for (int t = 0; t < kM; ++t) {
      for (int h = 0; h < 2; ++h) total[h][t] = _mm256_cvtepi32_ps(sum[h][t]);
    }
  } else {
    const int64_t groups = a.padded_k / a.group, scale_stride = a.f32_scales ? 64 : 32;
    for (int t = 0; t < kM; ++t) total[0][t] = total[1][t] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, correction += rows.part_stride, scales += scale_stride) {
      MOEC_UNROLL
      for (int t = 0; t < kM; ++t) sum[0][t] = sum[1][t] = _mm256_set1_epi32(correction[t]);
      for (int64_t i = 0; i < a.group; i += 32, codes += 4 * kUnitBytes, q += 32) {
        add_units<kKind, kVnni, kM>(codes, 4, block_bytes, q, stride, sum);
      }
      MOEC_UNROLL
      for (int h = 0; h < 2; ++h) {
        const __m256 s = load_scales8(scales + h * (a.f32_scales ? 32 : 16), a.f32_scales);
        __builtin_prefetch(scales + groups * scale_stride);
        MOEC_UNROLL
        for (int t = 0; t < kM; ++t) total[h][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[h][t]), s, total[h][t]);
      }
    }
  }
  for (int t = 0; t < kM; ++t) {
    const __m256 scale = _mm256_set1_ps(kByBlock ? 1.0f : rows.scale[t]);
    for (int h = 0; h < 2; ++h) total[h][t] = kByBlock ? total[h][t] : _mm256_mul_ps(total[h][t], scale);
    store_outputs(y + t * a.y_stride, {total[0][t], total[1][t]}, bias, outputs);
  }
}

template <int kKind, bool kAxisOut, bool kByBlock, bool kVnni>
void gemm_int8(const GemmTask& a) {
  constexpr int kTile = 4;
  const int64_t scale_stride = kAxisOut ? 0 : a.padded_k / a.group * (a.f32_scales ? 64 : 32);
  const int64_t tiles = (a.m + kTile - 1) / kTile;  // of nearly equal size
  for (int64_t block = 0; block < a.blocks; ++block) {
    const uint8_t* const codes = a.codes + block * a.block_bytes;
    const uint8_t* const scales = kAxisOut ? nullptr : a.scales + block * scale_stride;
    const int outputs = a.outputs - block * 16 < 16 ? int(a.outputs - block * 16) : 16;
    const float* const bias = a.bias ? a.bias + block * 16 : nullptr;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = a.m * i / tiles, rows = a.m * (i + 1) / tiles - row;
      float* const y = a.y + row * a.y_stride + block * 16;
      switch (rows) {
        case 1: gemm_block<kKind, kAxisOut, kByBlock, kVnni, 1>(a, codes, scales, row, y, bias, outputs); break;
        case 2: gemm_block<kKind, kAxisOut, kByBlock, kVnni, 2>(a, codes, scales, row, y, bias, outputs); break;
        case 3: gemm_block<kKind, kAxisOut, kByBlock, kVnni, 3>(a, codes, scales, row, y, bias, outputs); break;
        default: gemm_block<kKind, kAxisOut, kByBlock, kVnni, 4>(a, codes, scales, row, y, bias, outputs); break;
      }
    }
  }
}

template <bool kVnni>
inline Kernels table_256() {
  Kernels t = generic_table(kVnni ? 128 : 0);
  for_each_kind([&](auto kind) {
    if (has_small_levels(kind())) t.code_offset[kind() - 1] = small_offset(kind());
  });
  set_gemm_int8(t, [](auto kind, auto axis_out, auto by_block) {
    return gemm_int8<kind(), axis_out(), by_block(), kVnni>;
  });
  return t;
}

}  // namespace
}  // namespace moec

#endif  // MOEC_GEMM_AVX2_H_
