// Checks that weights whose codes are positions in a table give the bits of INT8 codes of the same values: linears, gated linears
// and rows of a table, in every format and on every instruction set, over numbers of tokens that take every kernel.
//
// usage: levels_check [CASES [SEED]]
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "checking.h"
#include "core/levels.h"

namespace {

using namespace checking;

std::vector<uint8_t> packed(int64_t n, int64_t k, int32_t format, const std::vector<uint8_t>& codes, moec_in scales) {
  uint64_t bytes = 0;
  expect(moec_packed_bytes(n, k, format, &bytes) == MOEC_OK, "packed_bytes");
  std::vector<uint8_t> to(static_cast<size_t>(bytes));
  expect(moec_pack(1, n, k, format, in(codes), scales, out(to)) == MOEC_OK, "pack");
  return to;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.empty() || memcmp(a.data(), b.data(), a.size() * 4) == 0;
}

// The same weights in two kinds, multiplied with t rows.
void compare(const std::string& what, int64_t t, int64_t n, int64_t k, const int32_t (&formats)[2],
             const std::vector<uint8_t> (&w)[2]) {
  const std::vector<float> x = normal(t * k), bias = normal(n);
  std::vector<int64_t> ids(static_cast<size_t>(t));
  for (int64_t& id : ids) id = uniform(0, n - 1);
  const int64_t group = formats[0] >> MOEC_GROUP_SHIFT, together = formats[0] & MOEC_AXIS_OUT ? group : 16;
  for (const std::string& isa : isas()) {
    expect(moec_set_isa(isa.c_str()) == MOEC_OK, "set_isa");
    std::vector<float> y[2], row[2], gated[2];
    for (int i = 0; i < 2; ++i) {
      y[i].assign(static_cast<size_t>(t * n), 7.0f);
      row[i].assign(static_cast<size_t>(t * k), 7.0f);
      const moec_in added = t % 2 ? in(bias) : moec_in{nullptr, 0};
      expect(moec_linear(t, n, k, formats[i], in(x), in(w[i]), added, out(y[i])) == MOEC_OK, "linear");
      expect(moec_embedding(t, n, k, formats[i], in(ids), in(w[i]), out(row[i])) == MOEC_OK, "embedding");
      if (n % (2 * together)) continue;
      gated[i].assign(static_cast<size_t>(t * n / 2), 7.0f);
      expect(moec_gated_linear(t, n / 2, k, formats[i], 0, in(x), in(w[i]), out(gated[i])) == MOEC_OK, "gated linear");
    }
    expect(same(y[0], y[1]), "linear, " + what + " on " + isa);
    expect(same(row[0], row[1]), "embedding, " + what + " on " + isa);
    expect(same(gated[0], gated[1]), "gated linear, " + what + " on " + isa);
  }
}

void check(int32_t kind, int32_t flags, int64_t group) {
  const bool axis_out = flags & MOEC_AXIS_OUT;
  const int64_t along = group * uniform(1, group > 128 ? 1 : 5), other = uniform(1, 70);
  const int64_t n = axis_out ? along : other, k = axis_out ? other : along;
  const int64_t rows = axis_out ? k : n, scale_count = rows * (along / group);
  std::vector<uint8_t> codes(static_cast<size_t>(rows * along / 2)), wide(static_cast<size_t>(rows * along));
  for (size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<uint8_t>(uniform(0, 255));
    wide[2 * i] = static_cast<uint8_t>(moec::level_of(kind, codes[i] & 15));
    wide[2 * i + 1] = static_cast<uint8_t>(moec::level_of(kind, codes[i] >> 4));
  }
  std::vector<float> single = normal(scale_count, 0.01f);
  std::vector<uint16_t> half(single.size());
  for (uint16_t& s : half) s = static_cast<uint16_t>(uniform(0x1000, 0x2800));  // between 5e-4 and 0.03
  const moec_in scales = flags & MOEC_F32_SCALES ? in(single) : in(half);
  const int32_t rest = flags | static_cast<int32_t>(group) << MOEC_GROUP_SHIFT;
  const int32_t formats[2] = {kind | rest, MOEC_INT8 | rest};
  const std::vector<uint8_t> w[2] = {packed(n, k, formats[0], codes, scales), packed(n, k, formats[1], wide, scales)};
  char what[80];
  for (const int64_t t : {1, 2, 3, 4, 6, 9, 12, 13, 50}) {
    snprintf(what, sizeof what, "format %#x, %d x %d, %d tokens", unsigned(formats[0]), int(n), int(k), int(t));
    compare(what, t, n, k, formats, w);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? atoi(argv[1]) : 10;
  generator.seed(argc > 2 ? static_cast<uint32_t>(atoi(argv[2])) : 1);
  const int32_t activations[] = {0, MOEC_INT8_ACTIVATIONS, MOEC_INT8_ACTIVATIONS | MOEC_BLOCK_ACTIVATIONS};
  for (int i = 0; i < cases; ++i) {
    for (const int32_t kind : {MOEC_IQ4_NL, MOEC_FP4, MOEC_NL3}) {
      for (const int32_t axis : {0, int(MOEC_AXIS_OUT)}) {
        for (const int32_t activation : activations) {
          for (const int32_t scale : {0, int(MOEC_F32_SCALES)}) {
            // the last is a sum that float32 does not hold exactly
            check(kind, axis | activation | scale, i % 3 == 2 ? 4096 : 32 * (1 + i % 3));
          }
        }
      }
    }
  }
  printf("levels: %s: %d cases, %d failures\n", moec_available_isas(), cases, failures);
  return failures != 0;
}
