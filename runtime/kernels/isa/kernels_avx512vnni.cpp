// Integer kernels on 512-bit registers with dpbusd: a pass covers kB blocks of 16 rows and kM tokens, so that one broadcast
// of four activations serves kB products. int8 codes and levels are offset to be unsigned, which the correction undoes.
#include <utility>

#include "isa/simd_avx512.h"
//
#include "isa/generic_kernels.h"

namespace moec {
namespace {

// Tokens of a pass. 2 blocks x 6 tokens of integer and of float sums are 24 of the 32 registers; with groups along the
// output and one scale a token there are no float sums.
constexpr int tile_of(bool axis_out, bool by_block) { return axis_out && !by_block ? 8 : 6; }

#define MOEC_UNROLL _Pragma("GCC unroll 16")

inline __m512i load512(const uint8_t* p) { return _mm512_loadu_si512(p); }

// Four activations in every lane.
inline __m512i broadcast4(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}

// What nibbles stand for, with the offset.
template <int kKind>
inline __m512i expand(__m512i nibbles) {
  if (!has_levels(kKind)) return nibbles;
  return _mm512_shuffle_epi8(load_table(kLevelTable<kKind, has_small_levels(kKind) ? small_offset(kKind) : 128>.bytes), nibbles);
}

// Both codes of a byte, as nibbles, of the 16 rows of a unit.
template <int kKind>
inline __attribute__((always_inline)) __m512i load_nibbles(const uint8_t* unit) {
  if (kKind != MOEC_NL3) return load512(unit);
  const __m512i low = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(unit)));
  const __m512i third = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(unit + 32)));
  // the second half's lower bits move down by 2; third bits of the quarters up by 2, 1, 0 and down by 1
  const __m512i down = _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2);
  const __m512i turn = _mm512_setr_epi32(2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0, 31, 31, 31, 31);
  return _mm512_or_si512(_mm512_and_si512(_mm512_srlv_epi64(low, down), _mm512_set1_epi8(0x33)),
                         _mm512_and_si512(_mm512_rolv_epi32(third, turn), _mm512_set1_epi8(0x44)));
}

// Adds one unit of 8 inputs to sum[kB][kM]. block_bytes: from a block's codes to the next one's.
template <int kKind, int kB, int kM>
inline __attribute__((always_inline)) void add_unit(const uint8_t* codes, int64_t block_bytes, const int8_t* q, int64_t stride,
                                                    __m512i (&even)[kB][kM], __m512i (&odd)[kB][kM]) {
  __m512i w[2][kB];
  MOEC_UNROLL
  for (int b = 0; b < kB; ++b) {
    const uint8_t* const p = codes + b * block_bytes;
    // the next blocks, while these are multiplied; for one token they are read once and need no room in outer caches
    constexpr int kLocality = kM == 1 ? 0 : 3;
    __builtin_prefetch(p + kB * block_bytes, 0, kLocality);
    if (!is_nibble(kKind)) __builtin_prefetch(p + kB * block_bytes + 64, 0, kLocality);
    if (is_nibble(kKind)) {
      const __m512i both = load_nibbles<kKind>(p), low = _mm512_set1_epi8(15);
      w[0][b] = expand<kKind>(_mm512_and_si512(both, low));
      w[1][b] = expand<kKind>(_mm512_and_si512(_mm512_srli_epi16(both, 4), low));
    } else {
      w[0][b] = _mm512_xor_si512(load512(p), _mm512_set1_epi8(-128));
      w[1][b] = _mm512_xor_si512(load512(p + 64), _mm512_set1_epi8(-128));
    }
  }
  MOEC_UNROLL
  for (int t = 0; t < kM; ++t) {
    const __m512i a = broadcast4(q + t * stride);
    MOEC_UNROLL
    for (int b = 0; b < kB; ++b) even[b][t] = _mm512_dpbusd_epi32(even[b][t], w[0][b], a);
  }
  MOEC_UNROLL
  for (int t = 0; t < kM; ++t) {
    const __m512i a = broadcast4(q + t * stride + 4);
    MOEC_UNROLL
    for (int b = 0; b < kB; ++b) odd[b][t] = _mm512_dpbusd_epi32(odd[b][t], w[1][b], a);
  }
}

template <int kKind, bool kAxisOut, bool kByBlock, int kB, int kM>
void gemm_blocks(const GemmTask& a, const uint8_t* codes, const uint8_t* scales, int64_t row, float* y, const float* bias,
                 int outputs) {
  constexpr int64_t kUnitBytes = unit_bytes_of(kKind);
  constexpr bool kSplit = kB * kM <= 4;  // few chains of additions: two for each output hide the latency
  const QuantizedRows rows = a.rows.from(row);
  const int8_t* q = rows.q;
  const int64_t stride = rows.stride, block_bytes = a.block_bytes;
  __m512i sum[kB][kM], other[kB][kM];
  __m512 total[kB][kM];
  const auto begin = [&](const int32_t* correction) __attribute__((always_inline)) {
    MOEC_UNROLL
    for (int t = 0; t < kM; ++t) {
      const __m512i c = _mm512_set1_epi32(correction[t]);
      MOEC_UNROLL
      for (int b = 0; b < kB; ++b) {
        sum[b][t] = c;
        if (kSplit) other[b][t] = _mm512_setzero_si512();
      }
    }
  };
  const auto join = [&]() __attribute__((always_inline)) {
    MOEC_UNROLL
    for (int i = 0; kSplit && i < kB * kM; ++i) {
      sum[i / kM][i % kM] = _mm512_add_epi32(sum[i / kM][i % kM], other[i / kM][i % kM]);
    }
  };
  if (kByBlock) {
    const int64_t groups = kAxisOut ? 1 : a.padded_k / a.group, scale_stride = a.f32_scales ? 64 : 32;
    MOEC_UNROLL
    for (int i = 0; i < kB * kM; ++i) total[i / kM][i % kM] = _mm512_setzero_ps();
    const int32_t* correction = rows.correction;
    const float* activation_scale = rows.scale;
    int64_t rest_of_group = a.group;
    for (int64_t k = 0; k < a.padded_k; k += 32, correction += rows.part_stride, activation_scale += rows.part_stride) {
      begin(correction);
      if (!kAxisOut || k + 32 <= a.padded_k) {
        add_unit<kKind, kB, kM>(codes, block_bytes, q, stride, sum, kSplit ? other : sum);
        add_unit<kKind, kB, kM>(codes + kUnitBytes, block_bytes, q + 8, stride, sum, kSplit ? other : sum);
        add_unit<kKind, kB, kM>(codes + 2 * kUnitBytes, block_bytes, q + 16, stride, sum, kSplit ? other : sum);
        add_unit<kKind, kB, kM>(codes + 3 * kUnitBytes, block_bytes, q + 24, stride, sum, kSplit ? other : sum);
        codes += 4 * kUnitBytes;
        q += 32;
      } else {
        for (int64_t i = k; i < a.padded_k; i += 8, codes += kUnitBytes, q += 8) {
          add_unit<kKind, kB, kM>(codes, block_bytes, q, stride, sum, kSplit ? other : sum);
        }
      }
      join();
      MOEC_UNROLL
      for (int b = 0; b < kB; ++b) {
        const __m512 s = kAxisOut ? _mm512_setzero_ps() : load_scales(scales + b * groups * scale_stride, a.f32_scales).a;
        if (!kAxisOut) __builtin_prefetch(scales + (kB + b) * groups * scale_stride);
        MOEC_UNROLL
        for (int t = 0; t < kM; ++t) {
          const __m512 part = _mm512_cvtepi32_ps(sum[b][t]), as = _mm512_set1_ps(activation_scale[t]);
          total[b][t] = kAxisOut ? _mm512_fmadd_ps(part, as, total[b][t])
                                 : _mm512_fmadd_ps(_mm512_mul_ps(part, as), s, total[b][t]);
        }
      }
      if (!kAxisOut && (rest_of_group -= 32) == 0) {
        rest_of_group = a.group;
        scales += scale_stride;
      }
    }
  } else if (kAxisOut) {
    begin(rows.correction);
    const uint8_t* const end = codes + block_bytes;
    for (; codes < end; codes += kUnitBytes, q += 8) {
      add_unit<kKind, kB, kM>(codes, block_bytes, q, stride, sum, kSplit ? other : sum);
    }
    join();
    MOEC_UNROLL
    for (int i = 0; i < kB * kM; ++i) total[i / kM][i % kM] = _mm512_cvtepi32_ps(sum[i / kM][i % kM]);
  } else {
    const int64_t groups = a.padded_k / a.group, scale_stride = a.f32_scales ? 64 : 32;
    MOEC_UNROLL
    for (int i = 0; i < kB * kM; ++i) total[i / kM][i % kM] = _mm512_setzero_ps();
    const int32_t* correction = rows.correction;
    for (int64_t g = 0; g < groups; ++g, correction += rows.part_stride, scales += scale_stride) {
      begin(correction);
      for (int64_t i = 0; i < a.group; i += 32, codes += 4 * kUnitBytes, q += 32) {
        add_unit<kKind, kB, kM>(codes, block_bytes, q, stride, sum, kSplit ? other : sum);
        add_unit<kKind, kB, kM>(codes + kUnitBytes, block_bytes, q + 8, stride, sum, kSplit ? other : sum);
        add_unit<kKind, kB, kM>(codes + 2 * kUnitBytes, block_bytes, q + 16, stride, sum, kSplit ? other : sum);
        add_unit<kKind, kB, kM>(codes + 3 * kUnitBytes, block_bytes, q + 24, stride, sum, kSplit ? other : sum);
      }
      join();
      MOEC_UNROLL
      for (int b = 0; b < kB; ++b) {
        const __m512 s = load_scales(scales + b * groups * scale_stride, a.f32_scales).a;
        __builtin_prefetch(scales + (kB + b) * groups * scale_stride);
        MOEC_UNROLL
        for (int t = 0; t < kM; ++t) total[b][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[b][t]), s, total[b][t]);
      }
    }
  }
  for (int t = 0; t < kM; ++t) {
    const __m512 scale = _mm512_set1_ps(kByBlock ? 1.0f : rows.scale[t]);
    MOEC_UNROLL
    for (int b = 0; b < kB; ++b) {
      const int exist = outputs - 16 * b < 16 ? outputs - 16 * b : 16;
      store_outputs(y + t * a.y_stride + 16 * b, {kByBlock ? total[b][t] : _mm512_mul_ps(total[b][t], scale)}, bias ? bias + 16 * b : nullptr, exist);
    }
  }
}

using BlocksFunction = void (*)(const GemmTask&, const uint8_t*, const uint8_t*, int64_t, float*, const float*, int);

template <int kKind, bool kAxisOut, bool kByBlock, int kB, int... kTokens>
BlocksFunction pick(int64_t tokens, std::integer_sequence<int, kTokens...>) {
  static constexpr BlocksFunction kFunctions[] = {
      gemm_blocks<kKind, kAxisOut, kByBlock, kB, kTokens + 1>...};
  return kFunctions[tokens - 1];
}

template <int kKind, bool kAxisOut, bool kByBlock, int kB>
BlocksFunction blocks_function(int64_t tokens) {
  return pick<kKind, kAxisOut, kByBlock, kB>(tokens, std::make_integer_sequence<int, tile_of(kAxisOut, kByBlock)>{});
}

template <int kKind, bool kAxisOut, bool kByBlock>
void gemm_int8(const GemmTask& a) {
  const int64_t scale_stride = kAxisOut ? 0 : a.padded_k / a.group * (a.f32_scales ? 64 : 32);
  constexpr int kTile = tile_of(kAxisOut, kByBlock);
  const int64_t tiles = (a.m + kTile - 1) / kTile;  // of nearly equal size: 4 and 4 tokens beat 6 and 2
  for (int64_t block = 0; block < a.blocks; block += 2) {
    const uint8_t* const codes = a.codes + block * a.block_bytes;
    const uint8_t* const scales = kAxisOut ? nullptr : a.scales + block * scale_stride;
    const bool both = block + 1 < a.blocks;
    const int rest = a.outputs - block * 16 < 32 ? int(a.outputs - block * 16) : 32;
    const int outputs = both || rest < 16 ? rest : 16;
    const float* const bias = a.bias ? a.bias + block * 16 : nullptr;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = a.m * i / tiles, rows = a.m * (i + 1) / tiles - row;
      const BlocksFunction f = both ? blocks_function<kKind, kAxisOut, kByBlock, 2>(rows)
                                    : blocks_function<kKind, kAxisOut, kByBlock, 1>(rows);
      f(a, codes, scales, row, a.y + row * a.y_stride + block * 16, bias, outputs);
    }
  }
}

}  // namespace

const Kernels& avx512vnni_kernels() {
  static const Kernels table = [] {
    Kernels t = generic_table(128);
    set_gemm_int8(t, [](auto kind, auto axis_out, auto by_block) {
      return gemm_int8<kind(), axis_out(), by_block()>;
    });
    return t;
  }();
  return table;
}

}  // namespace moec
