// Checks latent attention and the products of its heads: every instruction set of this machine against the scalar reference
// over random shapes, the same bits for every number of threads and however the tokens are cut into calls, and an error (never
// a crash) for sizes and positions that make no sense.
//
// usage: latent_check [CASES [SEED]]
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <vector>

#include "attention.h"
#include "checking.h"

namespace {

// As in attention_check.cpp: sums in another order, and a code of a query or a weight that lies near a half.
constexpr float kTolerance = 5e-5f;

using namespace checking;

struct Case {
  int64_t tokens, heads, rank, rope, capacity, start, window;
  bool quantized;

  std::string text() const {
    std::string line;
    for (const int64_t n : {tokens, heads, rank, rope, capacity, start, window}) line += std::to_string(n) + " ";
    return "T H R P S start window q8: " + line + (quantized ? "1" : "0");
  }
};

// Inputs and caches; beyond the last position nothing may be read: what is there would spoil the result.
struct Data {
  std::vector<float> q, q_rope, latents, rope, latent_cache, rope_cache, latent_scale, rope_scale;
  std::vector<int8_t> latent_codes, rope_codes;

  explicit Data(const Case& c)
      : q(normal(c.tokens * c.heads * c.rank)),
        q_rope(normal(c.tokens * c.heads * c.rope)),
        latents(normal(c.tokens * c.rank)),
        rope(normal(c.tokens * c.rope, 8.0f)) {
    const int64_t written = c.start + c.tokens;
    if (!c.quantized) {
      latent_cache = normal(c.capacity * c.rank);
      rope_cache = normal(c.capacity * c.rope, 8.0f);
      std::fill(latent_cache.begin() + written * c.rank, latent_cache.end(), NAN);
      std::fill(rope_cache.begin() + written * c.rope, rope_cache.end(), NAN);
      return;
    }
    for (int64_t i = 0; i < c.capacity * c.rank; ++i) latent_codes.push_back(static_cast<int8_t>(uniform(-127, 127)));
    for (int64_t i = 0; i < c.capacity * c.rope; ++i) rope_codes.push_back(static_cast<int8_t>(uniform(-127, 127)));
    for (int64_t i = 0; i < c.capacity; ++i) {
      latent_scale.push_back(i < written ? static_cast<float>(uniform(1, 100)) / 5000.0f : NAN);
      rope_scale.push_back(i < written ? static_cast<float>(uniform(1, 100)) / 500.0f : NAN);
    }
  }
};

moec_latent_args arguments(const Case& c, Data& data, std::vector<float>& y) {
  moec_latent_args a = {};
  a.tokens = c.tokens;
  a.heads = c.heads;
  a.rank = c.rank;
  a.rope_dim = c.rope;
  a.capacity = c.capacity;
  a.start_pos = c.start;
  a.window = c.window;
  a.scale = 0.5f / sqrtf(static_cast<float>(c.rank + 64 * c.rope));
  a.q = in(data.q);
  a.q_rope = in(data.q_rope);
  a.latents = in(data.latents);
  a.rope = in(data.rope);
  a.latent_cache = c.quantized ? out(data.latent_codes) : out(data.latent_cache);
  a.rope_cache = c.quantized ? out(data.rope_codes) : out(data.rope_cache);
  if (c.quantized) {
    a.latent_scale = out(data.latent_scale);
    a.rope_scale = out(data.rope_scale);
  }
  a.out = out(y);
  return a;
}

struct Result {
  int32_t status;
  std::vector<float> y;
  Data after;
};

// The tokens of `c` in calls of at most `most`.
Result run(const Case& c, const Data& data, const std::string& isa, int32_t threads, int64_t most) {
  expect(moec_set_isa(isa.c_str()) == MOEC_OK, "set_isa " + isa);
  expect(moec_set_threads(threads) == MOEC_OK, "set_threads");
  Result r = {MOEC_OK, {}, data};
  for (int64_t at = 0; at < c.tokens && r.status == MOEC_OK;) {
    Case part = c;
    part.tokens = most < c.tokens ? std::min(uniform(1, most), c.tokens - at) : c.tokens;
    part.start = c.start + at;
    const auto rows = [&](const std::vector<float>& all, int64_t width) {
      return std::vector<float>(all.begin() + at * width, all.begin() + (at + part.tokens) * width);
    };
    r.after.q = rows(data.q, c.heads * c.rank);
    r.after.q_rope = rows(data.q_rope, c.heads * c.rope);
    r.after.latents = rows(data.latents, c.rank);
    r.after.rope = rows(data.rope, c.rope);
    std::vector<float> y(static_cast<size_t>(part.tokens * c.heads * c.rank), NAN);
    moec_latent_args a = arguments(part, r.after, y);
    r.status = moec_latent_attention(&a);
    r.y.insert(r.y.end(), y.begin(), y.end());
    at += part.tokens;
  }
  return r;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

float difference(const std::vector<float>& a, const std::vector<float>& b) {
  float worst = 0.0f;
  for (size_t i = 0; i < a.size(); ++i) {
    const float gap = fabsf(a[i] - b[i]);
    if (!(gap <= worst)) worst = gap;  // keeps NaN
  }
  return worst;
}

void compare(const Case& c) {
  const Data data(c);
  const Result reference = run(c, data, "scalar", 1, c.tokens);
  expect(reference.status == MOEC_OK, c.text());
  for (const std::string& isa : isas()) {
    const std::string what = isa + " " + c.text();
    const Result one = run(c, data, isa, 1, c.tokens);
    expect(one.status == MOEC_OK, what);
    const float gap = difference(one.y, reference.y);
    expect(gap <= kTolerance * 4.0f, what + ": differs from scalar by " + std::to_string(gap));
    expect(one.after.latent_codes == reference.after.latent_codes && one.after.rope_codes == reference.after.rope_codes,
           what + ": other codes in the cache");
    expect(same(one.after.latent_scale, reference.after.latent_scale) && same(one.after.rope_scale, reference.after.rope_scale),
           what + ": other scales in the cache");
    for (const int32_t threads : {2, 5})
      expect(same(run(c, data, isa, threads, c.tokens).y, one.y), what + ": other bits with " + std::to_string(threads) + " threads");
    for (const int64_t most : {1, 3, 60})
      expect(same(run(c, data, isa, 1, most).y, one.y), what + ": other bits in calls of at most " + std::to_string(most));
  }
}

Case random_case() {
  Case c = {};
  c.heads = uniform(1, 20);
  const int64_t widths[] = {16, 32, 48, 64, 96, 128, 256, 512};
  c.rank = widths[uniform(0, 7)];
  c.rope = widths[uniform(0, 4)];
  c.tokens = uniform(0, 2) ? uniform(1, 40) : 1;
  c.start = uniform(0, 3) ? uniform(0, 600) : 0;
  c.capacity = c.start + c.tokens + uniform(0, 50);
  c.window = uniform(0, 2) ? 0 : uniform(1, 200);
  c.quantized = uniform(0, 2) != 0;
  return c;
}

// What is no number reaches the tokens that see it and no other.
void propagate() {
  for (const std::string& isa : isas())
    for (const bool quantized : {false, true})
      for (const bool in_rope : {false, true})
        for (const int64_t tokens : {int64_t{1}, int64_t{9}}) {
          const Case c = {tokens, 3, 64, 64, 64, 20, 0, quantized};
          Data data(c);
          (in_rope ? data.rope : data.latents)[static_cast<size_t>((tokens - 1) * 64 + 5)] = NAN;  // the last token's
          const Result r = run(c, data, isa, 2, tokens);
          expect(r.status == MOEC_OK, "NaN: " + isa);
          expect(isnan(r.y[static_cast<size_t>((tokens - 1) * 3 * 64)]), isa + ": NaN was lost, " + c.text());
          // values in float are weighed by 0 where they are not seen, which spreads what is no number within a call
          if (!quantized && !in_rope) continue;
          for (int64_t i = 0; i < (tokens - 1) * 3 * 64; ++i)
            expect(isfinite(r.y[static_cast<size_t>(i)]), isa + ": NaN spread to another token, " + c.text());
        }
}

void refuse() {
  const Case good = {3, 4, 32, 16, 10, 2, 0, true};
  Data data(good);
  std::vector<float> y(3 * 4 * 32);
  const auto refused = [&](const char* what, auto change) {
    moec_latent_args a = arguments(good, data, y);
    change(a);
    expect(moec_latent_attention(&a) != MOEC_OK && moec_last_error()[0] != '\0', std::string("accepted: ") + what);
  };
  constexpr int64_t huge = INT64_MAX;
  refused("negative start", [](auto& a) { a.start_pos = -1; });
  refused("start at the end", [](auto& a) { a.start_pos = 8; });
  refused("huge start", [](auto& a) { a.start_pos = huge; });
  refused("negative tokens", [](auto& a) { a.tokens = -1; });
  refused("huge tokens", [](auto& a) { a.tokens = huge; });
  refused("no heads", [](auto& a) { a.heads = 0; });
  refused("huge heads", [](auto& a) { a.heads = huge; });
  refused("no rank", [](auto& a) { a.rank = 0; });
  refused("a rank of 24", [](auto& a) { a.rank = 24; });
  refused("huge rank", [](auto& a) { a.rank = huge; });
  refused("no rotated part", [](auto& a) { a.rope_dim = 0; });
  refused("another rotated part", [](auto& a) { a.rope_dim = 32; });
  refused("larger cache", [](auto& a) { a.capacity = 11; });
  refused("huge cache", [](auto& a) { a.capacity = huge; });
  refused("negative window", [](auto& a) { a.window = -1; });
  refused("short q", [](auto& a) { a.q.bytes -= 4; });
  refused("no q_rope", [](auto& a) { a.q_rope.data = nullptr; });
  refused("short latents", [](auto& a) { a.latents.bytes -= 4; });
  refused("short cache", [](auto& a) { a.rope_cache.bytes -= 1; });
  refused("one scale only", [](auto& a) { a.rope_scale = {nullptr, 0}; });
  refused("short scales", [](auto& a) { a.latent_scale.bytes -= 4; });
  refused("short output", [](auto& a) { a.out.bytes -= 4; });
  expect(moec_latent_attention(nullptr) != MOEC_OK, "accepted: no arguments");
  moec_latent_args none = arguments(good, data, y);
  none.tokens = 0;
  none.q = none.q_rope = none.latents = none.rope = {nullptr, 0};
  none.out = {nullptr, 0};
  expect(moec_latent_attention(&none) == MOEC_OK, "refused: no tokens");
}

std::vector<uint8_t> packed(int64_t count, int64_t n, int64_t k, int32_t format) {
  uint64_t bytes = 0;
  expect(moec_packed_bytes(n, k, format, &bytes) == MOEC_OK, "packed_bytes");
  std::vector<uint8_t> blob(static_cast<size_t>(count) * bytes);
  const bool out_groups = format & MOEC_AXIS_OUT;
  const int64_t group = format >> MOEC_GROUP_SHIFT, rows = out_groups ? k : n, columns = out_groups ? n : k;
  if (format == MOEC_F32) {
    const std::vector<float> w = normal(count * n * k, 0.1f);
    expect(moec_pack(count, n, k, format, in(w), {nullptr, 0}, out(blob)) == MOEC_OK, "pack floats");
    return blob;
  }
  std::vector<uint8_t> codes(static_cast<size_t>(count * rows * columns / ((format & 0xF) == MOEC_INT8 ? 1 : 2)));
  for (uint8_t& c : codes) c = static_cast<uint8_t>(uniform(0, 255));
  std::vector<uint16_t> scales(static_cast<size_t>(count * rows * (columns / group)));
  for (uint16_t& s : scales) s = static_cast<uint16_t>(0x2000 + uniform(0, 0x3ff));  // float16: 0.0078 to 0.0156
  expect(moec_pack(count, n, k, format, in(codes), in(scales), out(blob)) == MOEC_OK, "pack codes");
  return blob;
}

// A head's product is moec_linear with its matrix: the same bits, on any number of threads.
void heads(int cases) {
  for (int i = 0; i < cases; ++i) {
    const bool floats = uniform(0, 4) == 0, out_groups = uniform(0, 1);
    const int64_t h = uniform(1, 6), n = 32 * uniform(1, 5), k = out_groups && !floats ? 8 * uniform(1, 20) : 32 * uniform(1, 5);
    const int32_t kinds[] = {MOEC_INT4, MOEC_INT8, MOEC_IQ4_NL};
    int32_t format = MOEC_F32;
    if (!floats) {
      format = kinds[uniform(0, 2)] | (32 << MOEC_GROUP_SHIFT) | (out_groups ? MOEC_AXIS_OUT : 0);
      if (uniform(0, 2)) format |= MOEC_INT8_ACTIVATIONS | (uniform(0, 1) ? MOEC_BLOCK_ACTIVATIONS : 0);
    }
    const int64_t t = uniform(0, 2) ? uniform(1, 130) : 1;
    const std::vector<uint8_t> w = packed(h, n, k, format);
    const std::vector<float> x = normal(t * h * k);
    for (const std::string& isa : isas()) {
      expect(moec_set_isa(isa.c_str()) == MOEC_OK, "set_isa " + isa);
      std::vector<float> y(static_cast<size_t>(t * h * n), NAN), again = y;
      moec_set_threads(1);
      expect(moec_head_linear(t, h, n, k, format, in(x), in(w), out(y)) == MOEC_OK, "head_linear");
      moec_set_threads(3);
      expect(moec_head_linear(t, h, n, k, format, in(x), in(w), out(again)) == MOEC_OK && same(y, again),
             isa + ": head_linear has other bits on three threads");
      const size_t each = w.size() / static_cast<size_t>(h);
      for (int64_t head = 0; head < h; ++head) {
        std::vector<float> own, one(static_cast<size_t>(t * n), NAN), mine;
        for (int64_t row = 0; row < t; ++row) {
          own.insert(own.end(), x.begin() + (row * h + head) * k, x.begin() + (row * h + head + 1) * k);
          mine.insert(mine.end(), y.begin() + (row * h + head) * n, y.begin() + (row * h + head + 1) * n);
        }
        const moec_in matrix = {w.data() + each * static_cast<size_t>(head), each};
        expect(moec_linear(t, n, k, format, in(own), matrix, {nullptr, 0}, out(one)) == MOEC_OK && same(one, mine),
               isa + ": head_linear is not linear, format " + std::to_string(format));
      }
    }
  }
  const std::vector<uint8_t> w = packed(2, 32, 32, MOEC_INT4 | (32 << MOEC_GROUP_SHIFT));
  const int32_t format = MOEC_INT4 | (32 << MOEC_GROUP_SHIFT);
  std::vector<float> x(3 * 2 * 32), y(3 * 2 * 32);
  const auto refused = [&](const char* what, int64_t t, int64_t h, int64_t n, int64_t k) {
    expect(moec_head_linear(t, h, n, k, format, in(x), in(w), out(y)) != MOEC_OK, std::string("accepted: ") + what);
  };
  refused("no heads", 3, 0, 32, 32);
  refused("more heads", 3, 3, 32, 32);
  refused("huge heads", 3, INT64_MAX, 32, 32);
  refused("more tokens", 4, 2, 32, 32);
  refused("negative tokens", -1, 2, 32, 32);
  refused("huge tokens", INT64_MAX, 2, 32, 32);
  refused("other outputs", 3, 2, 64, 32);
  refused("other inputs", 3, 2, 32, 64);
  expect(moec_head_linear(0, 2, 32, 32, format, {nullptr, 0}, in(w), {nullptr, 0}) == MOEC_OK, "refused: no tokens");
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? atoi(argv[1]) : 60;
  generator.seed(argc > 2 ? static_cast<unsigned>(atoi(argv[2])) : 1u);
  refuse();
  propagate();
  heads(cases > 2 ? 40 : 5);
  for (int i = 0; i < cases; ++i) compare(random_case());
  compare({3, 16, 64, 64, 600, 550, 0, true});    // few tokens, several chunks of keys: split keys
  compare({5, 100, 32, 16, 120, 90, 0, true});    // more heads than rows of a tile
  if (cases > 2) {  // long: minutes where an emulator computes them
    compare({3, 16, 512, 64, 1500, 1400, 0, true});
    compare({70, 128, 64, 16, 300, 220, 0, true});
  }
  printf("%s: %d cases, %d failures\n", moec_available_isas(), cases, failures);
  return failures == 0 ? 0 : 1;
}
