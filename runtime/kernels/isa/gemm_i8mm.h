// Integer kernels with smmla, after gemm_neon.h, for two tokens and more. smmla multiplies 2 rows x 8 inputs by 2 tokens x 8
// inputs, so both are put in that order first:
//   activations  once for a call: pairs of tokens, 16 inputs at a time as two operands. The first holds inputs 0-3 and 8-11 of
//                both tokens, the second 4-7 and 12-15; what a sum begins with and scales of blocks, repeated for the lanes.
//   codes        two neighbouring units of 4 rows are interleaved, which gives the same order of inputs. For one tile of
//                tokens this is done while they are multiplied; for more tiles a block's operands and scales are written once.
// A pass covers a strip of 4 rows and up to 6 pairs: their sums and totals are 24 of the 32 registers. Lanes of a sum are
// {row 0 token 0, row 0 token 1, row 1 token 0, row 1 token 1}.
#ifndef MOEC_GEMM_I8MM_H_
#define MOEC_GEMM_I8MM_H_

#include <arm_neon.h>

#include <cstring>

namespace moec {
namespace {

constexpr int64_t kPackedTokens = 48;  // whose activations are put in order together
constexpr int64_t kMostPairs = 6;

// Where a call keeps what it put in order.
struct Space {
  int64_t chunks, parts;
  int8_t* q;         // [tile][chunk of 16 inputs][pair][32]
  int32_t* begin;    // [tile][part][pair][4]
  float* scale;      // by block: [tile][part][pair][4]
  uint8_t* codes;    // of a block: [strip][chunk][64]
  float* scales;     // of a block: [strip][group][8]

  Space(uint8_t* base, int64_t padded_k) : chunks((padded_k + 15) / 16), parts((padded_k + 31) / 32) {
    constexpr int64_t kPairs = kPackedTokens / 2;
    q = reinterpret_cast<int8_t*>(base);
    begin = reinterpret_cast<int32_t*>(base + chunks * kPairs * 32);
    scale = reinterpret_cast<float*>(begin + parts * kPairs * 4);
    codes = reinterpret_cast<uint8_t*>(scale + parts * kPairs * 4);
    scales = reinterpret_cast<float*>(codes + chunks * 256);
  }
  static int64_t bytes(int64_t padded_k) {
    const Space s(nullptr, padded_k);
    return s.chunks * (kPackedTokens / 2 * 32 + 256) + s.parts * (kPackedTokens / 2 * 32 + 128);
  }
};

// The operands of 16 inputs (whole), or of the 8 that a row ends with, for 4 rows: w[half of each unit's inputs][pair of rows].
// codes, quad: codes_of and quad_of of the rows.
template <int kKind>
MOEC_INLINE void load_chunk(const uint8_t* codes, int quad, bool whole, int8x16_t (&w)[2][2]) {
  constexpr int64_t kUnitBytes = unit_bytes_of(kKind);
  const uint8_t* const next = whole ? codes + kUnitBytes : codes;  // activations are zero there
  const auto words = [](const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); };
  if (is_nibble(kKind)) {
    const uint32x4_t a = vreinterpretq_u32_u8(load_nibbles<kKind>(codes, quad));
    const uint32x4_t b = vreinterpretq_u32_u8(load_nibbles<kKind>(next, quad));
    const uint8x16_t rows[2] = {vreinterpretq_u8_u32(vzip1q_u32(a, b)), vreinterpretq_u8_u32(vzip2q_u32(a, b))};
    repeat<2>([&](auto r) MOEC_ALWAYS {
      w[0][r] = expand<kKind>(vandq_u8(rows[r], vdupq_n_u8(15)));
      w[1][r] = expand<kKind>(vshrq_n_u8(rows[r], 4));
    });
    return;
  }
  repeat<2>([&](auto half) MOEC_ALWAYS {
    const uint32x4_t a = words(codes + 64 * half), b = words(next + 64 * half);
    w[half][0] = vreinterpretq_s8_u32(vzip1q_u32(a, b));
    w[half][1] = vreinterpretq_s8_u32(vzip2q_u32(a, b));
  });
}

// sum + 2 rows times 2 tokens, 8 inputs. Spelled out as multiply_lane is.
MOEC_INLINE int32x4_t multiply_rows(int32x4_t sum, int8x16_t rows, int8x16_t tokens) {
#if defined(__clang__)
  return vmmlaq_s32(sum, rows, tokens);
#else
  asm("smmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(rows), "w"(tokens));
  return sum;
#endif
}

// Two registers in one instruction. g++ 12 schedules its loads first and pairs few of them.
template <int kOffset>
MOEC_INLINE void load_two(const void* p, int8x16_t& a, int8x16_t& b) {
#if defined(__clang__)
  a = vld1q_s8(static_cast<const int8_t*>(p) + kOffset);
  b = vld1q_s8(static_cast<const int8_t*>(p) + kOffset + 16);
#else
  asm("ldp %q0, %q1, [%2, %3]" : "=w"(a), "=w"(b) : "r"(p), "i"(kOffset), "m"(*static_cast<const int8_t(*)[]>(p)));
#endif
}

// One strip of rows times the pairs of one tile.
struct StripTask {
  const uint8_t* codes;   // as packed, codes_of the strip's rows; or operands in Space's order
  int quad;               // quad_of them
  const uint8_t* scales;  // likewise; NULL with groups along the output
  const int8_t* q;
  const int32_t* begin;
  const float* part_scale;  // by block
  const float* row_scale;   // [tokens] otherwise
  float* y;
  const float* bias;
  int tokens, outputs;
};

// k32: a part, whose sum becomes a float, is 32 inputs long.
template <int kKind, bool kAxisOut, bool kByBlock, bool k32, bool kReady, int kP>
MOEC_IN_ORDER __attribute__((noinline)) void gemm_strip(const GemmTask& a, const StripTask& s) {
  constexpr int64_t kUnitBytes = unit_bytes_of(kKind);
  constexpr bool kParts = kByBlock || !kAxisOut;
  const uint8_t *codes = s.codes, *scales = s.scales;
  const int quad = kKind == MOEC_NL3 ? s.quad : 0;
  const int8_t* q = s.q;
  const int32_t* begin = s.begin;
  const float* part_scale = s.part_scale;
  const int64_t part = k32 ? 32 : kAxisOut ? a.padded_k : a.group, scale_stride = kReady || !a.f32_scales ? 32 : 64;
  const bool small = k32 || sums_are_small<kKind>(a.group);
  int64_t rest_of_group = a.group;
  float32x4_t total[2][kP];
  repeat<kP>([&](auto p) MOEC_ALWAYS { total[0][p] = total[1][p] = vdupq_n_f32(0.0f); });
  for (int64_t k = 0; k < a.padded_k; k += part) {
    int32x4_t sum[2][kP];
    const int32_t* again = begin;
    asm("" : "+r"(again));
    // both rows' sums begin equally: loaded twice, since a copy would take a vector pipe
    repeat<2 * kP>([&](auto i) MOEC_ALWAYS {
      constexpr int r = decltype(i)::value / kP, p = decltype(i)::value % kP;
      if (kP % 2 && p == kP - 1) {
        sum[r][p] = vld1q_s32(r ? again + 4 * p : begin + 4 * p);
      } else if (p % 2 == 0) {
        int8x16_t a, b;
        load_two<16 * p>(r ? again : begin, a, b);
        sum[r][p] = vreinterpretq_s32_s8(a);
        sum[r][p + 1 < kP ? p + 1 : p] = vreinterpretq_s32_s8(b);
      }
    });
    begin += 4 * kP;
    // 16 inputs, `chunk` times that from where q and codes are
    const auto multiply = [&](auto chunk, bool whole) MOEC_ALWAYS {
      constexpr int kChunk = decltype(chunk)::value;
      int8x16_t w[2][2];
      if (kReady) {
        load_two<64 * kChunk>(codes, w[0][0], w[0][1]);
        load_two<64 * kChunk + 32>(codes, w[1][0], w[1][1]);
      } else {
        load_chunk<kKind>(codes + 2 * kUnitBytes * kChunk, quad, whole, w);
      }
      // two pairs at a time, so that a sum waits for four other products; one where registers are short
      constexpr int kMost = kP == 6 || (kP == 5 && !kReady) ? 1 : 2;
      repeat<(kP + kMost - 1) / kMost>([&](auto i) MOEC_ALWAYS {
        constexpr int kFirst = kMost * decltype(i)::value, kNow = kFirst + kMost <= kP ? kMost : kP - kFirst;
        int8x16_t x[2 * kNow];
        repeat<kNow>([&](auto j) MOEC_ALWAYS {
          load_two<32 * (kP * kChunk + kFirst + decltype(j)::value)>(q, x[2 * j], x[2 * j + 1]);
        });
        repeat<2 * kNow>([&](auto j) MOEC_ALWAYS {
          constexpr int p = kFirst + decltype(j)::value % kNow, half = decltype(j)::value / kNow;
          sum[0][p] = multiply_rows(sum[0][p], w[half][0], x[2 * (j % kNow) + half]);
          sum[1][p] = multiply_rows(sum[1][p], w[half][1], x[2 * (j % kNow) + half]);
        });
      });
    };
    const auto advance = [&](int chunks) MOEC_ALWAYS {
      q += 32 * kP * chunks;
      codes += (kReady ? 64 : 2 * kUnitBytes) * chunks;
    };
    constexpr std::integral_constant<int, 0> first;
    constexpr std::integral_constant<int, 1> second;
    const auto multiply32 = [&]() MOEC_ALWAYS {
      multiply(first, true);
      multiply(second, true);
      advance(2);
    };
    if (k32 && (!kAxisOut || a.padded_k - k >= 32)) {
      multiply32();
    } else if (!kAxisOut) {
      for (int64_t i = 0; i < part; i += 32) multiply32();
    } else {  // a row may end anywhere
      int64_t units = a.padded_k / 8 - k / 8;
      for (; units >= 4; units -= 4) multiply32();
      for (; units > 0; units -= 2) {
        multiply(first, units > 1);
        advance(1);
      }
    }
    if (!kParts) {
      repeat<2 * kP>([&](auto i) MOEC_ALWAYS { total[i / kP][i % kP] = vcvtq_f32_s32(sum[i / kP][i % kP]); });
      continue;
    }
    float32x4_t row_scales[2] = {};
    if (!kAxisOut && kReady) {
      row_scales[0] = vreinterpretq_f32_u8(vld1q_u8(scales));
      row_scales[1] = vreinterpretq_f32_u8(vld1q_u8(scales + 16));
    } else if (!kAxisOut) {
      const float32x4_t four = load_scales4(scales, a.f32_scales);
      row_scales[0] = vzip1q_f32(four, four);
      row_scales[1] = vzip2q_f32(four, four);
    }
    repeat<kP>([&](auto p) MOEC_ALWAYS {
      repeat<2>([&](auto r) MOEC_ALWAYS {
        const float32x4_t v = to_float_biased(sum[r][p], small);
        if (kByBlock) {
          const float32x4_t x = vld1q_f32(part_scale + 4 * p);
          total[r][p] = kAxisOut ? vfmaq_f32(total[r][p], v, x) : vfmaq_f32(total[r][p], vmulq_f32(v, x), row_scales[r]);
        } else {
          total[r][p] = vfmaq_f32(total[r][p], v, row_scales[r]);
        }
      });
    });
    if (kByBlock) part_scale += 4 * kP;
    if (kAxisOut || (kByBlock && (rest_of_group -= 32) > 0)) continue;
    rest_of_group = a.group;
    scales += scale_stride;
  }
  const auto finished = [&](auto t) MOEC_ALWAYS {
    constexpr int p = decltype(t)::value / 2;
    const float32x4_t v = t % 2 ? vuzp2q_f32(total[0][p], total[1][p]) : vuzp1q_f32(total[0][p], total[1][p]);
    return kByBlock ? v : vmulq_n_f32(v, s.row_scale[t]);
  };
  float* y = s.y;
  const int64_t y_stride = a.y_stride;
  if (s.outputs < 4 || s.bias) {
    repeat<2 * kP>([&](auto t) MOEC_ALWAYS {
      if (t < s.tokens) store_few(y + t * y_stride, finished(t), s.bias, s.outputs);
    });
    return;
  }
  repeat<2 * kP>([&](auto t) MOEC_ALWAYS {
    if (t == 2 * kP - 1 && s.tokens < 2 * kP) return;  // only the last pair may lack its second token
    vst1q_f32(y, finished(t));
    y += y_stride;
  });
}

template <int kKind, bool kAxisOut, bool kByBlock, bool k32, bool kReady>
MOEC_INLINE void gemm_strip_of(int64_t pairs, const GemmTask& a, const StripTask& s) {
  switch (pairs) {
    case 1: return gemm_strip<kKind, kAxisOut, kByBlock, k32, kReady, 1>(a, s);
    case 2: return gemm_strip<kKind, kAxisOut, kByBlock, k32, kReady, 2>(a, s);
    case 3: return gemm_strip<kKind, kAxisOut, kByBlock, k32, kReady, 3>(a, s);
    case 4: return gemm_strip<kKind, kAxisOut, kByBlock, k32, kReady, 4>(a, s);
    case 5: return gemm_strip<kKind, kAxisOut, kByBlock, k32, kReady, 5>(a, s);
    default: return gemm_strip<kKind, kAxisOut, kByBlock, k32, kReady, 6>(a, s);
  }
}

template <int kKind, bool kAxisOut, bool kByBlock, bool kReady>
MOEC_INLINE void gemm_strip_of(int64_t pairs, const GemmTask& a, const StripTask& s) {
  constexpr bool kMay32 = kByBlock || !kAxisOut, kMayLoop = !kByBlock;
  if (kMay32 && (!kMayLoop || a.group == 32)) return gemm_strip_of<kKind, kAxisOut, kByBlock, kMay32, kReady>(pairs, a, s);
  gemm_strip_of<kKind, kAxisOut, kByBlock, !kMayLoop, kReady>(pairs, a, s);
}

// Tokens of one tile in order: rows, of `count` tokens in `pairs` pairs.
template <bool kByBlock>
void gemm_order_rows(const QuantizedRows& rows, int64_t count, int64_t pairs, int64_t padded_k, int64_t parts, int32_t bias,
                     int8_t* q, int32_t* begin, float* scale) {
  for (int64_t p = 0; p < pairs; ++p) {
    const int8_t* const first = rows.q + 2 * p * rows.stride;
    const bool both = 2 * p + 1 < count;
    const int8_t* const second = both ? first + rows.stride : first;  // its products are not stored
    int8_t* to = q + 32 * p;
    const auto put = [&](int32x4_t a, int32x4_t b) __attribute__((always_inline)) {
      vst1q_s8(to, vreinterpretq_s8_s32(vuzp1q_s32(a, b)));
      vst1q_s8(to + 16, vreinterpretq_s8_s32(vuzp2q_s32(a, b)));
      to += 32 * pairs;
    };
    int64_t k = 0;
    for (; k + 16 <= padded_k; k += 16) {
      put(vreinterpretq_s32_s8(vld1q_s8(first + k)), vreinterpretq_s32_s8(vld1q_s8(second + k)));
    }
    const auto half = [k](const int8_t* p) { return vcombine_s32(vreinterpret_s32_s8(vld1_s8(p + k)), vdup_n_s32(0)); };
    if (k < padded_k) put(half(first), half(second));
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t at = i * rows.part_stride + 2 * p, other = at + both;
      const int32_t a = rows.correction[at] + bias, b = rows.correction[other] + bias;
      const int32x2_t two = vset_lane_s32(b, vdup_n_s32(a), 1);
      vst1q_s32(begin + (i * pairs + p) * 4, vcombine_s32(two, two));
      if (!kByBlock) continue;
      const float32x2_t scales = vset_lane_f32(rows.scale[other], vdup_n_f32(rows.scale[at]), 1);
      vst1q_f32(scale + (i * pairs + p) * 4, vcombine_f32(scales, scales));
    }
  }
}

// A block's operands and scales in order, strip by strip.
template <int kKind, bool kAxisOut>
void gemm_order_block(const GemmTask& a, const uint8_t* codes, const uint8_t* scales, const Space& space) {
  constexpr int64_t kUnitBytes = unit_bytes_of(kKind);
  const int64_t padded_k = a.padded_k, chunks = space.chunks;
  for (int strip = 0; strip < 4; ++strip) {
    uint8_t* to = space.codes + strip * chunks * 64;
    const uint8_t* from = codes_of<kKind>(codes, strip);
    const auto order = [&](bool whole) MOEC_ALWAYS {
      int8x16_t w[2][2];
      load_chunk<kKind>(from, quad_of<kKind>(strip), whole, w);
      repeat<4>([&](auto i) MOEC_ALWAYS { vst1q_u8(to + 16 * i, vreinterpretq_u8_s8(w[i / 2][i % 2])); });
      from += 2 * kUnitBytes;
      to += 64;
    };
    for (int64_t i = padded_k / 16; i > 0; --i) order(true);
    if (padded_k % 16) order(false);
    if (kAxisOut) continue;
    const int64_t groups = padded_k / a.group, group_scales = a.f32_scales ? 64 : 32;
    const bool f32 = a.f32_scales;
    const uint8_t* scale = scales + strip * group_scales / 4;
    float* out = space.scales + strip * groups * 8;
    for (int64_t g = 0; g < groups; ++g, scale += group_scales, out += 8) {
      const float32x4_t four = load_scales4(scale, f32);
      vst1q_f32(out, vzip1q_f32(four, four));
      vst1q_f32(out + 4, vzip2q_f32(four, four));
    }
  }
}

template <int kKind, bool kAxisOut, bool kByBlock>
void gemm_by_matrices(const GemmTask& a) {
  if (a.m == 1) return gemm_by_dots<kKind, kAxisOut, kByBlock>(a);
  const Space space(a.space, a.padded_k);
  const int64_t groups = kAxisOut ? 0 : a.padded_k / a.group, group_scales = a.f32_scales ? 64 : 32;
  const int64_t parts = kByBlock ? space.parts : kAxisOut ? 1 : groups;
  for (int64_t row = 0; row < a.m; row += kPackedTokens) {
    const int64_t count = a.m - row < kPackedTokens ? a.m - row : kPackedTokens, pairs = (count + 1) / 2;
    const int64_t tiles = (pairs + kMostPairs - 1) / kMostPairs;
    const auto first_of = [&](int64_t tile) { return pairs * tile / tiles; };
    const auto tokens_of = [&](int64_t tile) {
      const int64_t end = 2 * first_of(tile + 1);
      return (end < count ? end : count) - 2 * first_of(tile);
    };
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = first_of(tile);
      gemm_order_rows<kByBlock>(a.rows.from(row + 2 * first), tokens_of(tile), first_of(tile + 1) - first, a.padded_k, parts,
                                kByBlock || !kAxisOut ? kBias : 0, space.q + first * space.chunks * 32,
                                space.begin + first * parts * 4, space.scale + first * parts * 4);
    }
    for (int64_t block = 0; block < a.blocks; ++block) {
      const uint8_t* const codes = a.codes + block * a.block_bytes;
      const uint8_t* const scales = kAxisOut ? nullptr : a.scales + block * groups * group_scales;
      const bool ready = tiles > 1;
      if (ready) gemm_order_block<kKind, kAxisOut>(a, codes, scales, space);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = first_of(tile), tokens = tokens_of(tile), tile_pairs = first_of(tile + 1) - first;
        for (int64_t strip = 0; strip < 4; ++strip) {
          const int64_t output = block * 16 + strip * 4;
          if (output >= a.outputs) break;
          StripTask s;
          s.codes = ready ? space.codes + strip * space.chunks * 64 : codes_of<kKind>(codes, strip);
          s.quad = quad_of<kKind>(strip);
          s.scales = kAxisOut ? nullptr
                     : ready  ? reinterpret_cast<const uint8_t*>(space.scales + strip * groups * 8)
                              : scales + strip * (a.f32_scales ? 16 : 8);
          s.q = space.q + first * space.chunks * 32;
          s.begin = space.begin + first * parts * 4;
          s.part_scale = space.scale + first * parts * 4;
          s.row_scale = a.rows.scale + row + 2 * first;
          s.y = a.y + (row + 2 * first) * a.y_stride + output;
          s.bias = a.bias ? a.bias + output : nullptr;
          s.tokens = int(tokens);
          s.outputs = a.outputs - output < 4 ? int(a.outputs - output) : 4;
          ready ? gemm_strip_of<kKind, kAxisOut, kByBlock, true>(tile_pairs, a, s)
                : gemm_strip_of<kKind, kAxisOut, kByBlock, false>(tile_pairs, a, s);
        }
      }
    }
  }
}

}  // namespace
}  // namespace moec

#endif  // MOEC_GEMM_I8MM_H_
