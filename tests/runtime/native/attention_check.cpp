// Checks attention, norm and RoPE: every instruction set of this machine against the scalar reference over random shapes, the
// same bits for every number of threads and however the tokens are cut into calls, and an error (never a crash) for sizes and positions that make no sense.
//
// usage: attention_check [CASES [SEED]]
#include "attention.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "checking.h"

namespace {

// Scores are sums of up to 160 fp32 products in another order (relative error < 160 * 2^-24 ~ 1e-5 of their absolute sum,
// which is below 8 here), and the softmax weighs values by e^score: 5e-5 of the largest value covers both with room for the
// vector exponential (2e-7).
constexpr float kTolerance = 5e-5f;

using namespace checking;

struct Case {
  int64_t tokens, heads, kv, d, e, capacity, start, window;
  bool quantized;
  bool sinks = false;
  float softcap = 0.0f;

  std::string text() const {
    char line[200];
    snprintf(line, sizeof line, "T=%lld H=%lld KV=%lld d=%lld e=%lld S=%lld start=%lld window=%lld q8=%d sinks=%d cap=%g",
             static_cast<long long>(tokens), static_cast<long long>(heads), static_cast<long long>(kv),
             static_cast<long long>(d), static_cast<long long>(e), static_cast<long long>(capacity),
             static_cast<long long>(start), static_cast<long long>(window), quantized, sinks, static_cast<double>(softcap));
    return line;
  }
};

// Inputs and caches of one case; `run` works on copies of the caches.
struct Data {
  std::vector<float> q, k, v, k_cache, v_cache, k_scale, v_scale, sinks;
  std::vector<int8_t> k_codes, v_codes;

  explicit Data(const Case& c)
      : q(normal(c.tokens * c.heads * c.d)), k(normal(c.tokens * c.kv * c.d)), v(normal(c.tokens * c.kv * c.e)) {
    if (c.sinks) sinks = normal(c.heads);
    const int64_t rows = c.capacity * c.kv;
    if (!c.quantized) {
      k_cache = normal(rows * c.d);
      v_cache = normal(rows * c.e);
    } else {
      for (int64_t i = 0; i < rows * c.d; ++i) k_codes.push_back(static_cast<int8_t>(uniform(-127, 127)));
      for (int64_t i = 0; i < rows * c.e; ++i) v_codes.push_back(static_cast<int8_t>(uniform(-127, 127)));
      for (int64_t i = 0; i < rows; ++i) k_scale.push_back(static_cast<float>(uniform(1, 100)) / 5000.0f);
      for (int64_t i = 0; i < rows; ++i) v_scale.push_back(static_cast<float>(uniform(1, 100)) / 5000.0f);
    }
    // beyond the last position nothing may be read: whatever is there would spoil the result
    for (int64_t row = (c.start + c.tokens) * c.kv; row < rows; ++row)
      if (c.quantized)
        k_scale[static_cast<size_t>(row)] = v_scale[static_cast<size_t>(row)] = NAN;
      else
        for (int64_t i = 0; i < c.d; ++i) k_cache[static_cast<size_t>(row * c.d + i)] = NAN;
  }
};

struct Result {
  int32_t status;
  std::vector<float> y;
  Data after;
};

moec_attention_args arguments(const Case& c, Data& data, std::vector<float>& y) {
  moec_attention_args a = {};
  a.tokens = c.tokens;
  a.heads = c.heads;
  a.kv_heads = c.kv;
  a.head_dim = c.d;
  a.value_dim = c.e;
  a.capacity = c.capacity;
  a.start_pos = c.start;
  a.window = c.window;
  a.scale = 1.0f / sqrtf(static_cast<float>(c.d));
  a.softcap = c.softcap;
  a.q = in(data.q);
  a.k = in(data.k);
  a.v = in(data.v);
  a.k_cache = c.quantized ? out(data.k_codes) : out(data.k_cache);
  a.v_cache = c.quantized ? out(data.v_codes) : out(data.v_cache);
  if (c.quantized) {
    a.k_scale = out(data.k_scale);
    a.v_scale = out(data.v_scale);
  }
  a.out = out(y);
  if (c.sinks) a.sinks = in(data.sinks);
  return a;
}

Result run(const Case& c, const Data& data, const std::string& isa, int32_t threads) {
  expect(moec_set_isa(isa.c_str()) == MOEC_OK, "set_isa " + isa);
  expect(moec_set_threads(threads) == MOEC_OK, "set_threads");
  Result r = {0, std::vector<float>(static_cast<size_t>(c.tokens * c.heads * c.e), NAN), data};
  moec_attention_args a = arguments(c, r.after, r.y);
  r.status = moec_cached_attention(&a);
  return r;
}

// The same tokens in several calls, of `most` tokens at most.
Result run_cut(const Case& c, const Data& data, int64_t most) {
  Result r = {MOEC_OK, {}, data};
  for (int64_t at = 0; at < c.tokens && r.status == MOEC_OK;) {
    Case part = c;
    part.tokens = std::min(uniform(1, most), c.tokens - at);
    part.start = c.start + at;
    const auto rows = [&](const std::vector<float>& all, int64_t width) {
      return std::vector<float>(all.begin() + at * width, all.begin() + (at + part.tokens) * width);
    };
    r.after.q = rows(data.q, c.heads * c.d);
    r.after.k = rows(data.k, c.kv * c.d);
    r.after.v = rows(data.v, c.kv * c.e);
    std::vector<float> y(static_cast<size_t>(part.tokens * c.heads * c.e), NAN);
    moec_attention_args a = arguments(part, r.after, y);
    r.status = moec_cached_attention(&a);
    r.y.insert(r.y.end(), y.begin(), y.end());
    at += part.tokens;
  }
  return r;
}

float difference(const std::vector<float>& a, const std::vector<float>& b) {
  float worst = 0.0f;
  for (size_t i = 0; i < a.size(); ++i) {
    const float gap = fabsf(a[i] - b[i]);
    if (!(gap <= worst)) worst = gap;  // keeps NaN
  }
  return worst;
}

float largest(const std::vector<float>& a) {
  float top = 0.0f;
  for (const float x : a) top = fmaxf(top, fabsf(x));
  return top;
}

Case random_case() {
  Case c = {};
  c.kv = uniform(1, 4);
  c.heads = c.kv * uniform(1, 7);
  const int64_t dims[] = {1, 2, 8, 16, 20, 31, 32, 64, 80, 96, 128, 160};
  c.d = dims[uniform(0, 11)];
  c.e = uniform(0, 3) ? c.d : dims[uniform(0, 11)];
  c.tokens = uniform(0, 2) ? uniform(1, 40) : 1;
  if (uniform(0, 9) == 0) c.tokens = uniform(100, 200);
  c.start = uniform(0, 3) ? uniform(0, 300) : 0;
  if (uniform(0, 9) == 0) c.start = uniform(1000, 3000);
  c.capacity = c.start + c.tokens + uniform(0, 50);
  c.window = uniform(0, 1) ? uniform(1, 200) : 0;
  c.quantized = uniform(0, 1);
  c.sinks = uniform(0, 1);
  if (uniform(0, 2) == 0) c.softcap = uniform(0, 1) ? 50.0f : 0.5f;
  return c;
}

void compare(const Case& c) {
  const Data data(c);
  const Result reference = run(c, data, "scalar", 1);
  expect(reference.status == MOEC_OK, c.text() + ": " + moec_last_error());
  for (const std::string& isa : isas()) {
    const Result one = run(c, data, isa, 1);
    const std::string what = isa + " " + c.text();
    expect(one.status == MOEC_OK, what);
    const float bound = kTolerance * fmaxf(largest(data.v), 3.0f);
    const float gap = difference(one.y, reference.y);
    expect(gap <= bound, what + ": differs from scalar by " + std::to_string(gap));
    expect(one.after.k_codes == reference.after.k_codes && one.after.v_codes == reference.after.v_codes,
           what + ": other codes in the cache");
    const size_t scales = reference.after.k_scale.size() * sizeof(float);
    expect(scales == 0 || (memcmp(one.after.k_scale.data(), reference.after.k_scale.data(), scales) == 0 &&
                           memcmp(one.after.v_scale.data(), reference.after.v_scale.data(), scales) == 0),
           what + ": other scales in the cache");
    for (const int32_t threads : {2, 5}) {
      const Result many = run(c, data, isa, threads);
      expect(many.status == MOEC_OK && memcmp(many.y.data(), one.y.data(), one.y.size() * sizeof(float)) == 0,
             what + ": other bits with " + std::to_string(threads) + " threads");
    }
    for (const int64_t most : {int64_t{1}, int64_t{3}, int64_t{60}}) {
      const Result cut = run_cut(c, data, most);
      expect(cut.status == MOEC_OK && memcmp(cut.y.data(), one.y.data(), one.y.size() * sizeof(float)) == 0,
             what + ": other bits in calls of at most " + std::to_string(most) + " tokens");
    }
  }
}

// Not-a-number in one key must reach the rows that see it and no other.
void propagate() {
  for (const std::string& isa : isas())
    for (const bool quantized : {false, true})
      for (const int64_t tokens : {int64_t{1}, int64_t{9}}) {
        Case c = {tokens, 6, 2, 32, 32, 64, 20, 0, quantized};
        Data data(c);
        data.k[5] = NAN;  // token 0, KV head 0
        const Result r = run(c, data, isa, 2);
        expect(r.status == MOEC_OK, "NaN: " + isa);
        for (int64_t t = 0; t < tokens; ++t) {
          expect(isnan(r.y[static_cast<size_t>(t * 6 * 32)]), isa + ": NaN was lost, " + c.text());
          expect(isfinite(r.y[static_cast<size_t>((t * 6 + 3) * 32)]), isa + ": NaN spread to another head, " + c.text());
        }
        data = Data(c);
        data.v[0] = INFINITY;
        const Result s = run(c, data, isa, 2);
        expect(s.status == MOEC_OK && !isfinite(s.y[0]), isa + ": infinity was lost, " + c.text());
      }
}

void refuse() {
  const Case good = {3, 4, 2, 16, 16, 10, 2, 0, false};
  Data data(good);
  std::vector<float> y(3 * 4 * 16);
  const auto refused = [&](const char* what, auto change) {
    moec_attention_args a = arguments(good, data, y);
    change(a);
    expect(moec_cached_attention(&a) != MOEC_OK && moec_last_error()[0] != '\0', std::string("accepted: ") + what);
  };
  constexpr int64_t huge = INT64_MAX;
  refused("negative start", [](auto& a) { a.start_pos = -1; });
  refused("start at the end", [](auto& a) { a.start_pos = 8; });
  refused("huge start", [](auto& a) { a.start_pos = huge; });
  refused("negative tokens", [](auto& a) { a.tokens = -1; });
  refused("more tokens", [](auto& a) { a.tokens = 4; });
  refused("huge tokens", [](auto& a) { a.tokens = huge; });
  refused("no heads", [](auto& a) { a.heads = 0; });
  refused("no KV heads", [](auto& a) { a.kv_heads = 0; });
  refused("uneven heads", [](auto& a) { a.kv_heads = 3; });
  refused("huge heads", [](auto& a) { a.heads = huge; });
  refused("no head size", [](auto& a) { a.head_dim = 0; });
  refused("other head size", [](auto& a) { a.head_dim = 17; });
  refused("huge head size", [](auto& a) { a.head_dim = huge; });
  refused("other value size", [](auto& a) { a.value_dim = 8; });
  refused("larger cache", [](auto& a) { a.capacity = 11; });
  refused("huge cache", [](auto& a) { a.capacity = huge; });
  refused("negative cache", [](auto& a) { a.capacity = -1; });
  refused("negative cap", [](auto& a) { a.softcap = -1.0f; });
  refused("infinite cap", [](auto& a) { a.softcap = INFINITY; });
  refused("cap that is no number", [](auto& a) { a.softcap = NAN; });
  refused("negative window", [](auto& a) { a.window = -1; });
  refused("short q", [](auto& a) { a.q.bytes -= 4; });
  refused("no q", [](auto& a) { a.q.data = nullptr; });
  refused("short cache", [](auto& a) { a.k_cache.bytes -= 4; });
  refused("short output", [](auto& a) { a.out.bytes -= 4; });
  refused("one scale only", [&](auto& a) { a.k_scale = out(y); });
  refused("sinks of fewer heads", [&](auto& a) { a.sinks = {y.data(), 12}; });
  refused("sinks without data", [&](auto& a) { a.sinks = {nullptr, 16}; });
  expect(moec_cached_attention(nullptr) != MOEC_OK, "accepted: no arguments");
  moec_attention_args none = arguments(good, data, y);
  none.tokens = 0;
  none.q = none.k = none.v = {nullptr, 0};
  none.out = {nullptr, 0};
  expect(moec_cached_attention(&none) == MOEC_OK, "refused: no tokens");
  std::vector<float> x(12), w(4);
  expect(moec_rms_norm(3, 4, 1e-5f, in(x), in(w), out(x)) == MOEC_OK, "rms_norm");
  expect(moec_rms_norm(3, 5, 1e-5f, in(x), in(w), out(x)) != MOEC_OK, "accepted: rms_norm of other rows");
  expect(moec_rms_norm(-3, -4, 1e-5f, in(x), in(w), out(x)) != MOEC_OK, "accepted: rms_norm of negative sizes");
  expect(moec_rms_norm(3, 4, 1e-5f, in(x), {w.data(), 12}, out(x)) != MOEC_OK, "accepted: short weight");
  std::vector<float> cos(6);
  expect(moec_rope(3, 1, 4, 1, in(x), in(cos), in(cos), out(x)) == MOEC_OK, "rope");
  expect(moec_rope(4, 1, 3, 1, in(x), in(cos), in(cos), out(x)) != MOEC_OK, "accepted: rope of an odd head size");
  expect(moec_rope(3, 1, 4, 1, in(x), {cos.data(), 20}, in(cos), out(x)) != MOEC_OK, "accepted: short cosines");
  expect(moec_rope(INT64_MAX, 2, 4, 1, in(x), in(cos), in(cos), out(x)) != MOEC_OK, "accepted: rope of huge sizes");
}

void norms_and_rope() {
  for (int i = 0; i < 40; ++i) {
    const int64_t rows = uniform(0, 70), n = uniform(1, 900), heads = uniform(1, 5), d = 2 * uniform(1, 70);
    const std::vector<float> x = normal(rows * n), w = normal(n), h = normal(rows * heads * d);
    const std::vector<float> cos = normal(rows * d / 2), sin = normal(rows * d / 2);
    const bool weighted = uniform(0, 1), interleaved = uniform(0, 1);
    std::vector<float> norm[2] = {std::vector<float>(x.size()), std::vector<float>(x.size())};
    std::vector<float> turned[2] = {std::vector<float>(h.size()), std::vector<float>(h.size())};
    for (const std::string& isa : isas()) {
      for (const bool reference : {true, false}) {
        moec_set_isa(reference ? "scalar" : isa.c_str());
        moec_set_threads(reference ? 1 : 3);
        expect(moec_rms_norm(rows, n, 1e-5f, in(x), weighted ? in(w) : moec_in{nullptr, 0}, out(norm[reference])) == MOEC_OK,
               "rms_norm");
        expect(moec_rope(rows, heads, d, interleaved, in(h), in(cos), in(sin), out(turned[reference])) == MOEC_OK, "rope");
      }
      // 900 squares in another order, one square root and division: 1e-5 relative to values below 20
      expect(difference(norm[0], norm[1]) <= 2e-4f, isa + ": rms_norm differs");
      expect(difference(turned[0], turned[1]) <= 1e-5f, isa + ": rope differs");  // two products, one fused
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? atoi(argv[1]) : 60;
  generator.seed(argc > 2 ? static_cast<unsigned>(atoi(argv[2])) : 1u);
  refuse();
  propagate();
  norms_and_rope();
  for (int i = 0; i < cases; ++i) compare(random_case());
  compare({3, 6, 2, 64, 64, 5000, 4900, 0, true});  // few tokens, long context: split keys
  compare({20, 4, 1, 32, 32, 4500, 4450, 0, true});    // one group of heads: 18 chunks in parallel, in two waves or more
  compare({300, 16, 8, 16, 16, 700, 250, 70, true});   // enough groups: chunks one after another, across their borders
  if (cases > 1) {  // long: half a minute where an emulator computes them
    compare({1, 12, 4, 64, 64, 8192, 8191, 0, true});
    compare({1, 5, 1, 64, 64, 8192, 8191, 512, false});
  }
  printf("%s: %d cases, %d failures\n", moec_available_isas(), cases, failures);
  return failures == 0 ? 0 : 1;
}
