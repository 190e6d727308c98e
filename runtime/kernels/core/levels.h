// What the codes of each kind of weight take and stand for.
#ifndef MOEC_LEVELS_H_
#define MOEC_LEVELS_H_

#include <cstdint>

#include "moec_kernel.h"

namespace moec {

// Kinds whose codes are positions in a table of integers.
constexpr bool has_levels(int32_t kind) { return kind == MOEC_IQ4_NL || kind == MOEC_FP4 || kind == MOEC_NL3; }

// Codes that the caller gives two in a byte. All but nl3 are packed so, too.
constexpr bool is_nibble(int32_t kind) { return kind == MOEC_INT4 || has_levels(kind); }

// Bytes of 16 rows x 8 inputs.
constexpr int64_t unit_bytes_of(int32_t kind) { return kind == MOEC_NL3 ? 48 : is_nibble(kind) ? 64 : 128; }

// The largest magnitude of what a code stands for.
constexpr int32_t largest_of(int32_t kind) {
  return kind == MOEC_INT4 ? 8 : kind == MOEC_FP4 ? 12 : kind == MOEC_NL3 ? 16 : kind == MOEC_IQ4_NL ? 127 : 128;
}

// The code of a row and an input (0..7) in a unit, as its bits: of int8 two's complement, of int4 the number and 8.
static inline __attribute__((always_inline)) int32_t code_in_unit(int32_t kind, const uint8_t* unit, int64_t row,
                                                                  int64_t input) {
  const int64_t b = 4 * row + input % 4, half = input / 4;
  if (kind == MOEC_INT8) return unit[64 * half + b];
  if (kind != MOEC_NL3) return half ? unit[b] >> 4 : unit[b] & 15;
  return (unit[b % 32] >> (4 * half + 2 * (b / 32)) & 3) | (unit[32 + b % 16] >> (4 * half + b / 16) & 1) << 2;
}

// Integers, so that sums of products stay exact: the grid of GGUF's IQ4_NL, and twice the values of FP4 E2M1 in the order of
// their bits (OCP Microscaling Formats). NL3 is the set of eight whose range is 32 at most, for 16-bit sums, with the least
// squared error on the weights of a language model, each group of 32 with its best scale (docs/quality.md).
inline constexpr int8_t kIq4NlLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
inline constexpr int8_t kFp4Levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
inline constexpr int8_t kNl3Levels[8] = {-16, -10, -6, -2, 1, 4, 8, 13};

// The level of a code of a kind that has them.
constexpr int32_t level_of(int32_t kind, int32_t code) {
  return kind == MOEC_NL3 ? kNl3Levels[code & 7] : (kind == MOEC_IQ4_NL ? kIq4NlLevels : kFp4Levels)[code & 15];
}

// A kind's levels with an offset, as the bytes that instructions look up.
struct alignas(16) LevelTable {
  uint8_t bytes[16];
};
constexpr LevelTable level_table(int32_t kind, int32_t offset) {
  LevelTable t{};
  for (int32_t i = 0; i < 16; ++i) t.bytes[i] = uint8_t(level_of(kind, i) + offset);
  return t;
}
// Constants, so that no instruction set's code holds a function that another's would call.
template <int32_t kKind, int32_t kOffset = 0>
inline constexpr LevelTable kLevelTable = level_table(kKind, kOffset);

}  // namespace moec

#endif  // MOEC_LEVELS_H_
