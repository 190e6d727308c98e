// Checks the border of the C API with arguments drawn at random, sensible and not: a call works or fails with a message, and
// touches nothing outside its buffers, which are as long as they claim to be. Means most under a sanitizer.
//
// usage: border_check [CASES [SEED]], ten draws of every function each
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <deque>
#include <random>
#include <string>
#include <vector>

#include "attention.h"
#include "checking.h"
#include "moec_kernel.h"

namespace {

using namespace checking;

int64_t worked = 0, refused = 0;

template <typename T, size_t N>
T one_of(const T (&values)[N]) {
  return values[uniform(0, static_cast<int64_t>(N) - 1)];
}

// A size: mostly small, sometimes one that overflows a product or makes no sense.
int64_t size() {
  static const int64_t odd[] = {0, -1, 33, int64_t{1} << 20, int64_t{1} << 31, int64_t{1} << 40, int64_t{1} << 61,
                                int64_t{1} << 62, INT64_MAX, INT64_MIN, INT32_MAX, int64_t{1} << 33};
  static const int64_t usual[] = {1, 2, 3, 8, 16, 31, 32, 64, 96, 128};
  return uniform(0, 9) ? one_of(usual) : one_of(odd);
}

int32_t format() {
  static const int32_t odd[] = {-1, 3, 0x2006, 0x80, 0x10, 0x7fffffff, 0x1001, INT32_MIN, 0x2041};
  if (uniform(0, 9) == 0) return one_of(odd);
  if (uniform(0, 4) == 0) return MOEC_F32;
  static const int32_t groups[] = {32, 32, 64, 128};
  return int32_t(uniform(MOEC_INT4, MOEC_NL3)) | int32_t(uniform(0, 15)) << 4 | one_of(groups) << MOEC_GROUP_SHIFT;
}

// Buffers of one call. Each is a block of the heap of exactly its length, so that a sanitizer sees a step beyond it.
class Buffers {
 public:
  // a * b * c * size bytes if that is a sensible length, or another length; sometimes misaligned, sometimes no pointer
  moec_out make(int64_t a, int64_t b, int64_t c, int64_t element) {
    const double product = static_cast<double>(a) * static_cast<double>(b) * static_cast<double>(c);
    const bool sensible = a >= 0 && b >= 0 && c >= 0 && product < (1 << 20);
    const uint64_t count = static_cast<uint64_t>(a) * static_cast<uint64_t>(b) * static_cast<uint64_t>(c);
    uint64_t bytes = sensible ? count * static_cast<uint64_t>(element) : 64;
    if (uniform(0, 19) == 0) bytes = static_cast<uint64_t>(uniform(0, 300));
    if (uniform(0, 39) == 0) return {nullptr, bytes};
    const size_t shift = uniform(0, 39) ? 0 : 1;
    held_.emplace_back(static_cast<size_t>(bytes) + shift);
    std::vector<uint8_t>& data = held_.back();
    for (uint8_t& x : data) x = static_cast<uint8_t>(generator());
    return {data.data() + shift, bytes};
  }
  moec_in in(int64_t a, int64_t b, int64_t c, int64_t element) {
    const moec_out made = make(a, b, c, element);
    return {made.data, made.bytes};
  }
  moec_in matrix(int64_t n, int64_t k, int32_t f) {
    uint64_t bytes = 0;
    if (moec_packed_bytes(n, k, f, &bytes) != MOEC_OK || bytes > (1 << 24)) bytes = 128;
    return in(static_cast<int64_t>(bytes), 1, 1, 1);
  }

 private:
  std::deque<std::vector<uint8_t>> held_;
};

void expect_said(const char* what, int32_t status) {
  (status == MOEC_OK ? worked : refused) += 1;
  if (status < MOEC_OK || status > MOEC_UNSUPPORTED || (status != MOEC_OK && !moec_last_error()[0])) {
    fprintf(stderr, "FAILED: %s gave %d: %s\n", what, status, moec_last_error());
    ++failures;
  }
}

void pack() {
  Buffers b;
  const int32_t f = format();
  const int64_t count = size(), n = size(), k = size(), group = f >> MOEC_GROUP_SHIFT;
  uint64_t one = 0;
  moec_packed_bytes(n, k, f, &one);
  const bool axis_out = f & MOEC_AXIS_OUT;
  const int64_t rows = axis_out ? k : n, columns = axis_out ? n : k;
  const int64_t bits = (f & 15) == MOEC_F32 ? 32 : (f & 15) == MOEC_INT8 ? 8 : 4;
  const moec_out codes = b.make(count, rows, columns < INT32_MAX && columns > 0 ? columns * bits / 8 : columns, 1);
  const moec_out scales = group > 0 ? b.make(count, rows, columns / group, f & MOEC_F32_SCALES ? 4 : 2) : moec_out{nullptr, 0};
  const moec_out packed = b.make(count, one < INT32_MAX ? static_cast<int64_t>(one) : 0, 1, 1);
  expect_said("pack", moec_pack(count, n, k, f, {codes.data, codes.bytes}, {scales.data, scales.bytes}, packed));
  expect_said("unpack", moec_unpack(count, n, k, f, {packed.data, packed.bytes}, codes, scales));
}

void dense() {
  Buffers b;
  const int32_t f = format();
  const int64_t t = size(), n = size(), k = size();
  const moec_in x = b.in(t, k, 1, 4), w = b.matrix(n, k, f);
  expect_said("linear", moec_linear(t, n, k, f, x, w, uniform(0, 1) ? b.in(n, 1, 1, 4) : moec_in{nullptr, 0}, b.make(t, n, 1, 4)));
  const moec_in both = b.matrix(n > 0 && n < INT32_MAX ? 2 * n : n, k, f);
  expect_said("gated linear", moec_gated_linear(t, n, k, f, int32_t(uniform(-1, 5)), x, both, b.make(t, n, 1, 4)));
  const moec_out ids = b.make(t, 1, 1, 8);
  for (uint64_t i = 0; ids.data && i + 8 <= ids.bytes; i += 8) {
    const int64_t id = uniform(0, 99) ? uniform(0, n > 0 ? n - 1 : 0) : size();
    memcpy(static_cast<uint8_t*>(ids.data) + i, &id, 8);
  }
  expect_said("embedding", moec_embedding(t, n, k, f, {ids.data, ids.bytes}, w, b.make(t, k, 1, 4)));
}

void attention() {
  Buffers b;
  moec_attention_args a = {};
  a.tokens = size();
  a.kv_heads = size();
  a.heads = uniform(0, 9) && a.kv_heads > 0 && a.kv_heads < 200 ? a.kv_heads * uniform(1, 4) : size();
  a.head_dim = size();
  a.value_dim = uniform(0, 2) ? a.head_dim : size();
  a.start_pos = uniform(0, 9) ? uniform(0, 40) : size();
  a.capacity = uniform(0, 9) && a.tokens < INT32_MAX && a.start_pos < INT32_MAX ? a.start_pos + a.tokens + uniform(0, 9) : size();
  a.window = uniform(0, 2) ? 0 : size();
  a.scale = 0.1f;
  const bool quantized = uniform(0, 1);
  const int64_t element = quantized ? 1 : 4;
  a.q = b.in(a.tokens, a.heads, a.head_dim, 4);
  a.k = b.in(a.tokens, a.kv_heads, a.head_dim, 4);
  a.v = b.in(a.tokens, a.kv_heads, a.value_dim, 4);
  a.k_cache = b.make(a.capacity, a.kv_heads, a.head_dim, element);
  a.v_cache = b.make(a.capacity, a.kv_heads, a.value_dim, element);
  if (quantized || uniform(0, 19) == 0) {
    a.k_scale = b.make(a.capacity, a.kv_heads, 1, 4);
    a.v_scale = b.make(a.capacity, a.kv_heads, 1, 4);
  }
  if (uniform(0, 1)) a.sinks = b.in(a.heads, 1, 1, 4);
  a.out = b.make(a.tokens, a.heads, a.value_dim, 4);
  expect_said("cached_attention", moec_cached_attention(&a));
}

void norm_and_rope() {
  Buffers b;
  const int64_t rows = size(), n = size(), d = uniform(0, 3) ? 2 * uniform(1, 40) : size();
  expect_said("rms_norm", moec_rms_norm(rows, n, 1e-5f, b.in(rows, n, 1, 4), uniform(0, 1) ? b.in(n, 1, 1, 4) : moec_in{nullptr, 0},
                                        b.make(rows, n, 1, 4)));
  expect_said("rope", moec_rope(rows, n, d, int32_t(uniform(0, 1)), b.in(rows, n, d, 4), b.in(rows, d / 2, 1, 4), b.in(rows, d / 2, 1, 4),
                                b.make(rows, n, d, 4)));
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = 10 * (argc > 1 ? atoi(argv[1]) : 100);
  generator.seed(argc > 2 ? static_cast<unsigned>(atoi(argv[2])) : 1u);
  std::vector<std::string> isas(1);
  for (const char* p = moec_available_isas(); *p; ++p) {
    if (*p == ',') {
      isas.emplace_back();
    } else {
      isas.back() += *p;
    }
  }
  for (int i = 0; i < calls; ++i) {
    if (i % 50 == 0) {
      moec_set_isa(isas[static_cast<size_t>(uniform(0, static_cast<int64_t>(isas.size()) - 1))].c_str());
      moec_set_threads(static_cast<int32_t>(uniform(1, 3)));
    }
    pack();
    dense();
    attention();
    norm_and_rope();
  }
  moec_set_threads(1);
  moec_release_scratch();
  printf("border: %lld calls worked, %lld were refused, %d failures\n", static_cast<long long>(worked),
         static_cast<long long>(refused), failures);
  return failures == 0 && worked > calls / 4 ? 0 : 1;
}
