// Checks linear, embedding and the MoE block: every instruction set and number of threads against the scalar reference on one
// thread, bit for bit, over random shapes and attributes; and an error (never a crash) for arguments that make no sense.
//
// usage: moe_check [CASES [SEED]]
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "checking.h"
#include "moe_config.h"
#include "moec_kernel.h"

namespace {

using namespace checking;

std::vector<uint8_t> bytes(uint64_t n) {
  std::vector<uint8_t> v(static_cast<size_t>(n));
  for (uint8_t& x : v) x = static_cast<uint8_t>(uniform(0, 255));
  return v;
}

// NaNs count as equal: their payload may differ.
bool same(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i] && !(a[i] != a[i] && b[i] != b[i])) return false;
  }
  return a.size() == b.size();
}

int32_t random_format(bool axis_out) {
  const int32_t groups[] = {32, 64, 96, 128};
  const int32_t activations[] = {0, MOEC_INT8_ACTIVATIONS, MOEC_INT8_ACTIVATIONS | MOEC_BLOCK_ACTIVATIONS};
  return int32_t(uniform(MOEC_INT4, MOEC_NL3)) | (axis_out ? MOEC_AXIS_OUT : 0) | activations[uniform(0, 2)] |
         (uniform(0, 3) ? 0 : MOEC_F32_SCALES) | groups[uniform(0, 3)] << MOEC_GROUP_SHIFT;
}

int64_t group_of(int32_t format) { return format >> MOEC_GROUP_SHIFT; }

// A stack of packed matrices of random codes; its memory is as long as the library says and not a byte longer, and starts at
// an odd address for quantized formats.
class Packed {
 public:
  Packed(int64_t count, int64_t n, int64_t k, int32_t format) {
    uint64_t one = 0;
    expect(moec_packed_bytes(n, k, format, &one) == MOEC_OK, "packed_bytes");
    size_ = one * static_cast<uint64_t>(count);
    const int32_t kind = format & 15;
    shift_ = kind == MOEC_F32 ? 0 : 1;
    data_.reset(static_cast<uint8_t*>(malloc(size_ + shift_)));
    if (kind == MOEC_F32) {
      const std::vector<float> w = normal(count * n * k, 0.1f);
      expect(moec_pack(count, n, k, format, in(w), {nullptr, 0}, {data_.get(), size_}) == MOEC_OK, "pack f32");
      return;
    }
    const int64_t rows = format & MOEC_AXIS_OUT ? k : n, columns = format & MOEC_AXIS_OUT ? n : k;
    std::vector<uint8_t> codes = bytes(static_cast<uint64_t>(count * rows * columns / (kind == MOEC_INT8 ? 1 : 2)));
    if (kind == MOEC_NL3) {
      for (uint8_t& both : codes) both &= 0x77;  // of a nibble three bits are packed
    }
    const int64_t scale_count = count * rows * (columns / group_of(format));
    const moec_out packed{data_.get() + shift_, size_};
    std::vector<float> wide(static_cast<size_t>(scale_count), 0.01f);
    std::vector<uint16_t> narrow(static_cast<size_t>(scale_count));
    for (size_t i = 0; i < narrow.size(); ++i) {
      narrow[i] = static_cast<uint16_t>(uniform(0x1000, 0x2800));  // halves between 5e-4 and 0.03
      wide[i] = static_cast<float>(uniform(1, 1000)) * 1e-4f;
    }
    const moec_in scales = format & MOEC_F32_SCALES ? in(wide) : in(narrow);
    expect(moec_pack(count, n, k, format, in(codes), scales, packed) == MOEC_OK, "pack");
    std::vector<uint8_t> back(codes.size()), back_scales(scales.bytes);
    expect(moec_unpack(count, n, k, format, buffer(), out(back), out(back_scales)) == MOEC_OK, "unpack");
    expect(back == codes && memcmp(back_scales.data(), scales.data, scales.bytes) == 0, "unpack gives what was packed");
  }

  moec_in buffer() const { return {data_.get() + shift_, size_}; }

 private:
  struct Free {
    void operator()(uint8_t* p) const { free(p); }
  };
  std::unique_ptr<uint8_t, Free> data_;
  uint64_t size_ = 0, shift_ = 0;
};

// result = compute() on scalar and one thread, then everywhere else, compared bit for bit.
template <typename Compute>
void compare(const std::string& what, Compute compute) {
  moec_set_isa("scalar");
  moec_set_threads(1);
  const std::vector<float> reference = compute();
  for (const std::string& isa : isas()) {
    for (const int threads : {1, 3}) {
      expect(moec_set_isa(isa.c_str()) == MOEC_OK, "set_isa");
      expect(moec_set_threads(threads) == MOEC_OK, "set_threads");
      expect(same(compute(), reference), what + " on " + isa + ", threads " + std::to_string(threads));
    }
  }
}

void spoil(std::vector<float>& x) {
  const float values[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-44f, 3e38f};
  for (int i = uniform(0, 3) ? 0 : 3; i > 0 && !x.empty(); --i) {
    x[static_cast<size_t>(uniform(0, static_cast<int64_t>(x.size()) - 1))] = values[uniform(0, 6)];
  }
}

void linear_case() {
  const bool axis_out = uniform(0, 1);
  const int32_t format = uniform(0, 7) ? random_format(axis_out) : MOEC_F32;
  const int64_t group = format ? group_of(format) : 1;
  int64_t n = uniform(1, 100), k = uniform(1, 200);
  if (uniform(0, 1)) n = 32 * uniform(1, 20);  // gate and up of whole blocks
  if (format) (axis_out ? n : k) = group * uniform(1, 4);
  const int64_t t = uniform(0, 3) ? uniform(0, 20) : uniform(40, 110);
  const Packed w(1, n, k, format);
  std::vector<float> x = normal(t * k);
  spoil(x);
  const std::vector<float> bias = normal(n);
  const bool with_bias = uniform(0, 1);
  compare("linear", [&] {
    std::vector<float> y(static_cast<size_t>(t * n), 7.0f);
    expect(moec_linear(t, n, k, format, in(x), w.buffer(), with_bias ? in(bias) : moec_in{nullptr, 0}, out(y)) == MOEC_OK, "linear");
    return y;
  });
  if (n % 2 == 0 && n / 2 % (axis_out && format ? (group > 16 ? group : 16) : 16) == 0) {
    const int32_t activation = static_cast<int32_t>(uniform(0, 4));
    compare("gated linear", [&] {
      std::vector<float> y(static_cast<size_t>(t * (n / 2)), 7.0f);
      expect(moec_gated_linear(t, n / 2, k, format, activation, in(x), w.buffer(), out(y)) == MOEC_OK, "gated linear");
      return y;
    });
  }
  std::vector<int64_t> ids(static_cast<size_t>(t));
  for (int64_t& id : ids) id = uniform(0, n - 1);
  compare("embedding", [&] {
    std::vector<float> y(static_cast<size_t>(t * k), 7.0f);
    expect(moec_embedding(t, n, k, format, in(ids), w.buffer(), out(y)) == MOEC_OK, "embedding");
    return y;
  });
}

struct Block {
  std::vector<int64_t> config = std::vector<int64_t>(MOEC_MOE_CONFIG_LENGTH, 0);
  std::vector<double> params = {0, 0, 1.5, 1, -INFINITY, INFINITY, -INFINITY, INFINITY, 0};
  int64_t tokens = 0;
  std::vector<float> x, router_input, router_weight, router_bias, selection_bias, b13, b2, shared_gate;
  std::unique_ptr<Packed> w13, w2, shared_w13, shared_w2;

  moec_moe_args args(std::vector<float>& y, std::vector<int32_t>& indices, std::vector<float>& weights) const {
    const auto packed = [](const std::unique_ptr<Packed>& p) { return p ? p->buffer() : moec_in{nullptr, 0}; };
    moec_moe_args a{};
    a.tokens = tokens;
    a.config = config.data();
    a.config_length = config.size();
    a.params = params.data();
    a.params_length = params.size();
    a.x = in(x);
    a.router_input = in(router_input);
    a.router_weight = in(router_weight);
    a.router_bias = in(router_bias);
    a.selection_bias = in(selection_bias);
    a.w13 = packed(w13);
    a.b13 = in(b13);
    a.w2 = packed(w2);
    a.b2 = in(b2);
    a.shared_w13 = packed(shared_w13);
    a.shared_w2 = packed(shared_w2);
    a.shared_gate = in(shared_gate);
    a.y = out(y);
    a.indices = out(indices);
    a.weights = out(weights);
    return a;
  }
};

Block random_block() {
  Block b;
  auto& c = b.config;
  int32_t formats[4];
  int64_t lcm = 1;
  for (int32_t& f : formats) {
    f = uniform(0, 7) ? random_format(uniform(0, 1)) : MOEC_F32;
    const int64_t g = f ? group_of(f) : 1;
    int64_t together = lcm;
    while (together % g) together += lcm;
    if (together > 400) {  // 128 and 96 meet at 384: large enough
      f = MOEC_INT4 | MOEC_INT8_ACTIVATIONS | 32 << MOEC_GROUP_SHIFT;
    } else {
      lcm = together;
    }
  }
  if (lcm > 1 && lcm % 32) lcm *= 32;
  bool all_float = true;
  for (const int32_t f : formats) all_float &= f == MOEC_F32;
  const int64_t d = all_float ? uniform(1, 90) : lcm * uniform(1, lcm > 100 ? 1 : 3);
  const int64_t width = all_float ? uniform(1, 60) : lcm * uniform(1, lcm > 100 ? 1 : 3);
  const int64_t shared = uniform(0, 1) ? 0 : all_float ? uniform(1, 40) : lcm;
  const int64_t groups = uniform(0, 2) ? 0 : uniform(1, 4);
  const int64_t experts = groups ? groups * uniform(2, 6) : uniform(1, 24);
  const int64_t keep = groups ? uniform(1, groups) : 0;
  const int64_t most = groups ? experts / groups * keep : experts;
  const bool gated = uniform(0, 4);
  const int64_t per = gated ? 2 : 1;
  c[MOEC_CONFIG_VERSION] = MOEC_MOE_VERSION_NUMBER;
  c[MOEC_CONFIG_EXPERTS] = experts;
  c[MOEC_CONFIG_D_MODEL] = d;
  c[MOEC_CONFIG_EXPERT_WIDTH] = width;
  c[MOEC_CONFIG_TOP_K] = uniform(0, 5) ? uniform(1, most < 4 ? most : 4) : most;
  c[MOEC_CONFIG_SHARED_WIDTH] = shared;
  c[MOEC_CONFIG_W13_FORMAT] = formats[0];
  c[MOEC_CONFIG_W2_FORMAT] = formats[1];
  c[MOEC_CONFIG_SHARED_W13_FORMAT] = formats[2];
  c[MOEC_CONFIG_SHARED_W2_FORMAT] = formats[3];
  c[MOEC_CONFIG_SCORE] = uniform(0, 2);
  c[MOEC_CONFIG_AFTER_TOPK] = uniform(0, 1);
  c[MOEC_CONFIG_BIAS_ON] = uniform(0, 1);
  c[MOEC_CONFIG_GROUPS] = groups;
  c[MOEC_CONFIG_KEEP] = keep;
  c[MOEC_CONFIG_GROUP_SCORE] = uniform(0, 1);
  c[MOEC_CONFIG_FILL] = uniform(0, 1);
  c[MOEC_CONFIG_NORMALIZE] = uniform(0, 1);
  c[MOEC_CONFIG_APPLY] = uniform(0, 1);
  c[MOEC_CONFIG_ACTIVATION] = uniform(0, 4);
  c[MOEC_CONFIG_GATED] = gated;
  c[MOEC_CONFIG_INTERLEAVED] = gated && uniform(0, 1);
  if (uniform(0, 1)) b.params[MOEC_PARAMS_GATE_MAX] = 1.0;
  if (uniform(0, 1)) b.params[MOEC_PARAMS_CLAMP_MIN] = 0.5;
  b.tokens = uniform(0, 2) ? uniform(0, 12) : uniform(50, 120);
  b.x = normal(b.tokens * d);
  spoil(b.x);
  b.router_input = uniform(0, 1) ? b.x : normal(b.tokens * d);
  b.router_weight = normal(experts * d, 0.2f);
  if (uniform(0, 1)) b.router_bias = normal(experts);
  if (uniform(0, 1)) b.selection_bias = normal(experts, uniform(0, 3) ? 0.3f : 100.0f);  // 100: all tokens to the same experts
  b.w13 = std::make_unique<Packed>(experts, per * width, d, formats[0]);
  b.w2 = std::make_unique<Packed>(experts, d, width, formats[1]);
  if (uniform(0, 1)) b.b13 = normal(experts * per * width);
  if (uniform(0, 1)) b.b2 = normal(experts * d);
  if (shared) {
    b.shared_w13 = std::make_unique<Packed>(1, per * shared, d, formats[2]);
    b.shared_w2 = std::make_unique<Packed>(1, d, shared, formats[3]);
    if (uniform(0, 1)) b.shared_gate = normal(d, 0.1f);
  }
  return b;
}

void moe_case() {
  const Block b = random_block();
  const int64_t k = b.config[MOEC_CONFIG_TOP_K], experts = b.config[MOEC_CONFIG_EXPERTS];
  compare("moe", [&] {
    std::vector<float> y(b.x.size(), 7.0f), weights(static_cast<size_t>(b.tokens * k));
    std::vector<int32_t> indices(weights.size(), -1);
    const moec_moe_args a = b.args(y, indices, weights);
    expect(moec_moe(&a) == MOEC_OK, "moe");
    for (size_t i = 0; i < indices.size(); ++i) {
      bool fine = indices[i] >= 0 && indices[i] < experts;
      for (size_t j = i / size_t(k) * size_t(k); j < i; ++j) fine &= indices[j] != indices[i];
      expect(fine, "moe: indices are valid and distinct");
    }
    y.insert(y.end(), weights.begin(), weights.end());
    y.insert(y.end(), indices.begin(), indices.end());
    return y;
  });
}

// One field or one length is changed at random: the call either works or says why not, and touches nothing outside.
void hostile_case() {
  Block b = random_block();
  const int64_t odd[] = {-1, 0, 1, 2, 3, 31, 33, 255, 1 << 20, int64_t{1} << 40, INT64_MIN, INT64_MAX, 0x2021, 0x2011, 0x20A1};
  for (int round = 0; round < 6; ++round) {
    Block changed;
    std::swap(changed, b);
    const std::vector<int64_t> kept = changed.config;
    const size_t field = static_cast<size_t>(uniform(0, MOEC_MOE_CONFIG_LENGTH - 1));
    if (uniform(0, 1)) changed.config[field] = odd[uniform(0, 14)];
    std::vector<float> y(changed.x.size()), weights(static_cast<size_t>(changed.tokens * kept[MOEC_CONFIG_TOP_K]));
    std::vector<int32_t> indices(weights.size());
    moec_moe_args a = changed.args(y, indices, weights);
    moec_in* const inputs[] = {&a.x,  &a.router_input, &a.router_weight, &a.router_bias, &a.selection_bias, &a.w13, &a.b13,
                               &a.w2, &a.b2,           &a.shared_w13,    &a.shared_w2,   &a.shared_gate};
    moec_in& victim = *inputs[uniform(0, 11)];
    switch (uniform(0, 5)) {
      case 0: victim.bytes = victim.bytes ? victim.bytes - 1 : 4; break;
      case 1: victim.data = nullptr; break;
      case 2: a.tokens = odd[uniform(0, 14)]; break;
      case 3: a.y.bytes /= 2; break;
      case 4: a.config_length = static_cast<uint64_t>(uniform(0, 40)) % MOEC_MOE_CONFIG_LENGTH; break;
      default: break;
    }
    const int32_t code = moec_moe(&a);
    if (code != MOEC_OK) expect(moec_last_error()[0] != '\0', "an error has a message");
    changed.config = kept;
    std::swap(changed, b);
  }
}

void refusals() {
  uint64_t size = 0;
  for (const int32_t format : {-1, 6, 15, 0x2006, 0x200F, 0x80, 0x10, 0x01, 0x2101, 0x1001, 0x20, 0x7FFFFFFF}) {
    expect(moec_packed_bytes(64, 64, format, &size) != MOEC_OK, "accepted: a format that is none");
  }
  const int32_t format = MOEC_INT4 | 32 << MOEC_GROUP_SHIFT;
  expect(moec_packed_bytes(64, 33, format, &size) != MOEC_OK, "accepted: 33 inputs in groups of 32");
  expect(moec_packed_bytes(0, 32, format, &size) != MOEC_OK, "accepted: no outputs");
  expect(moec_packed_bytes(-5, 32, format, &size) != MOEC_OK, "accepted: negative outputs");
  expect(moec_packed_bytes(INT64_MAX, 32, format, &size) != MOEC_OK, "accepted: too many outputs");
  expect(moec_packed_bytes(1 << 30, 1 << 30, MOEC_F32, &size) == MOEC_OK, "refused: 2^62 bytes");
  expect(moec_packed_bytes(64, 64, format, nullptr) != MOEC_OK, "accepted: nowhere to write");
  expect(moec_moe(nullptr) != MOEC_OK, "accepted: no arguments");
  expect(moec_set_threads(0) != MOEC_OK && moec_set_threads(1 << 20) != MOEC_OK, "accepted: no threads, too many threads");
  expect(moec_set_isa("abacus") == MOEC_UNSUPPORTED, "accepted: an unknown instruction set");
  const std::vector<uint8_t> codes(64 * 32), scales(64 * 2 * 2);
  std::vector<uint8_t> packed(64 * 32 + 64 * 2 * 2);
  expect(moec_pack(1, 64, 64, format, in(codes), in(scales), out(packed)) == MOEC_OK, "pack");
  expect(moec_pack(2, 64, 64, format, in(codes), in(scales), out(packed)) != MOEC_OK, "accepted: two for the space of one");
  expect(moec_pack(INT64_MAX, 64, 64, format, in(codes), in(scales), out(packed)) != MOEC_OK, "accepted: too many");
  expect(moec_pack(1, 64, 64, format, {nullptr, codes.size()}, in(scales), out(packed)) != MOEC_OK, "accepted: null codes");
}

// Several callers share the pool, and the pool changes its size in between: nobody waits for ever, everybody is right.
void scheduler() {
  moec_set_isa(isas().front().c_str());
  moec_set_threads(1);
  const Block b = random_block();
  const auto compute = [&] {
    std::vector<float> y(b.x.size()), weights(static_cast<size_t>(b.tokens * b.config[MOEC_CONFIG_TOP_K]));
    std::vector<int32_t> indices(weights.size());
    const moec_moe_args a = b.args(y, indices, weights);
    return moec_moe(&a) == MOEC_OK ? y : std::vector<float>();
  };
  const std::vector<float> reference = compute();
  for (const int threads : {2, 3, 8, 1, 4}) {
    expect(moec_set_threads(threads) == MOEC_OK && moec_get_threads() == threads, "set_threads");
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i) {
      callers.emplace_back([&] {
        for (int round = 0; round < 8; ++round) wrong += !same(compute(), reference);
        moec_release_scratch();
      });
    }
    for (std::thread& caller : callers) caller.join();
    expect(wrong == 0, "concurrent callers, threads " + std::to_string(threads));
  }
  // a pool that runs tasks one after the other, last first
  moec_set_parallel(
      [](void*, int32_t n, moec_task_fn task, void* context) {
        for (int32_t i = n; i-- > 0;) task(context, i);
      },
      [](void*) -> int32_t { return 7; }, nullptr);
  expect(moec_get_threads() == 7, "the installed pool is asked for its threads");
  expect(same(compute(), reference), "an installed pool");
  moec_set_parallel(nullptr, nullptr, nullptr);
  int traced = 0;
  moec_set_trace([](void* user, int64_t, int64_t, int64_t, const float*, const int32_t*, const float*, const float*) {
    ++*static_cast<int*>(user);
  }, &traced);
  compute();
  moec_set_trace(nullptr, nullptr);
  compute();
  expect(traced == 1, "one trace for one block");
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? atoi(argv[1]) : 60;
  generator.seed(argc > 2 ? static_cast<unsigned>(atoi(argv[2])) : 1u);
  refusals();
  for (int i = 0; i < cases; ++i) {
    linear_case();
    moe_case();
    hostile_case();
    if (i == 0 || i % 50 == 49) scheduler();
  }
  moec_set_threads(1);
  moec_release_scratch();
  printf("%s: %d cases, %d failures\n", moec_available_isas(), cases, failures);
  return failures == 0 ? 0 : 1;
}
