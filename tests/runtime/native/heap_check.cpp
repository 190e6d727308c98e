// Checks that operators take nothing from the heap once they have been called, and that attention over a long cache needs no
// room for tokens x positions scores. Where the C library's allocator cannot be counted (other than glibc, or under a
// sanitizer) it says so and checks nothing.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <atomic>
#include <string>
#include <vector>

#include "attention.h"
#include "checking.h"
#include "moe_config.h"
#include "moec_kernel.h"

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

namespace {
std::atomic<int64_t> allocations{0}, allocated{0};

void* counted(void* memory, size_t bytes) {
  allocations.fetch_add(1);
  allocated.fetch_add(static_cast<int64_t>(bytes));
  return memory;
}
}  // namespace

// The program's own definitions serve its libraries, too.
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void* malloc(size_t n) { return counted(__libc_malloc(n), n); }
void* calloc(size_t n, size_t size) { return counted(__libc_calloc(n, size), n * size); }
void* realloc(void* old, size_t n) { return counted(__libc_realloc(old, n), n); }
void* aligned_alloc(size_t alignment, size_t n) { return counted(__libc_memalign(alignment, n), n); }
int posix_memalign(void** out, size_t alignment, size_t n) {
  *out = counted(__libc_memalign(alignment, n), n);
  return *out ? 0 : 12;
}
}

namespace {

using namespace checking;

constexpr int32_t kInt4 = MOEC_INT4 | MOEC_INT8_ACTIVATIONS | 32 << MOEC_GROUP_SHIFT;
constexpr int32_t kInt4Out = kInt4 | MOEC_AXIS_OUT;

// Bytes of `count` packed matrices: codes and scales of zero are as good as any here.
std::vector<uint8_t> packed(int64_t count, int64_t n, int64_t k, int32_t format) {
  uint64_t one = 0;
  expect(moec_packed_bytes(n, k, format, &one) == MOEC_OK, "packed_bytes");
  return std::vector<uint8_t>(one * static_cast<uint64_t>(count));
}

constexpr int kCalls = 3;

// Nothing may be allocated from the third call on.
template <typename Call>
void steady(const std::string& what, Call call) {
  for (int i = 0; i < 2; ++i) expect(call() == MOEC_OK, what);
  const int64_t before = allocations;
  bool fine = true;
  for (int i = 0; i < kCalls; ++i) fine &= call() == MOEC_OK;
  const int64_t taken = allocations - before;
  expect(fine, what);
  expect(taken == 0, what + ": " + std::to_string(taken) + " allocations in " + std::to_string(kCalls) + " calls");
}

void dense(int64_t t, int32_t format, const std::string& where) {
  const int64_t n = 96, k = 64;
  const std::vector<uint8_t> w = packed(1, n, k, format);
  const std::vector<float> x(static_cast<size_t>(t * k), 0.5f), bias(static_cast<size_t>(n));
  const std::vector<int64_t> ids(static_cast<size_t>(t), 7);
  std::vector<float> y(static_cast<size_t>(t * n)), half(static_cast<size_t>(t * 32)), rows(x.size());
  const std::vector<uint8_t> gated = packed(1, 64, k, format);
  steady("linear" + where, [&] { return moec_linear(t, n, k, format, in(x), in(w), in(bias), out(y)); });
  steady("gated linear" + where, [&] { return moec_gated_linear(t, 32, k, format, 0, in(x), in(gated), out(half)); });
  steady("embedding" + where, [&] { return moec_embedding(t, n, k, format, in(ids), in(w), out(rows)); });
  steady("rms_norm" + where, [&] { return moec_rms_norm(t, k, 1e-5f, in(x), {nullptr, 0}, out(rows)); });
  const std::vector<float> angles(static_cast<size_t>(t * k / 2), 0.5f);
  steady("rope" + where, [&] { return moec_rope(t, 1, k, 0, in(x), in(angles), in(angles), out(rows)); });
}

void block(int64_t t, int32_t format, const std::string& where) {
  const int64_t e = 6, d = 64, f = 32, s = 64;
  std::vector<int64_t> c(MOEC_MOE_CONFIG_LENGTH, 0);
  c[MOEC_CONFIG_VERSION] = MOEC_MOE_VERSION_NUMBER;
  c[MOEC_CONFIG_EXPERTS] = e;
  c[MOEC_CONFIG_D_MODEL] = d;
  c[MOEC_CONFIG_EXPERT_WIDTH] = f;
  c[MOEC_CONFIG_TOP_K] = 2;
  c[MOEC_CONFIG_SHARED_WIDTH] = s;
  c[MOEC_CONFIG_W13_FORMAT] = c[MOEC_CONFIG_W2_FORMAT] = format;
  c[MOEC_CONFIG_SHARED_W13_FORMAT] = c[MOEC_CONFIG_SHARED_W2_FORMAT] = kInt4;
  c[MOEC_CONFIG_GATED] = 1;
  const std::vector<double> params = {0, 0, 1, 1, -INFINITY, INFINITY, -INFINITY, INFINITY, 0};
  const std::vector<uint8_t> w13 = packed(e, 2 * f, d, format), w2 = packed(e, d, f, format);
  const std::vector<uint8_t> shared_w13 = packed(1, 2 * s, d, kInt4), shared_w2 = packed(1, d, s, kInt4);
  std::vector<float> router(static_cast<size_t>(e * d)), x(static_cast<size_t>(t * d)), y(x.size());
  for (size_t i = 0; i < router.size(); ++i) router[i] = static_cast<float>(i * 37 % 19) - 9.0f;
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 31 % 23) - 11.0f;
  moec_moe_args a = {};
  a.tokens = t;
  a.config = c.data();
  a.config_length = c.size();
  a.params = params.data();
  a.params_length = params.size();
  a.x = a.router_input = in(x);
  a.router_weight = in(router);
  a.w13 = in(w13);
  a.w2 = in(w2);
  a.shared_w13 = in(shared_w13);
  a.shared_w2 = in(shared_w2);
  a.y = out(y);
  steady("moe" + where, [&] { return moec_moe(&a); });
}

// `once`: a long call is made once and not again to be steady, which shorter ones show and an emulator takes long for.
void attention(int64_t t, int64_t capacity, const std::string& where, bool once = false) {
  const int64_t h = 8, kv = 2, d = 64;
  std::vector<float> q(static_cast<size_t>(t * h * d), 0.1f), k(static_cast<size_t>(t * kv * d), 0.1f), y(q.size());
  std::vector<int8_t> k_cache(static_cast<size_t>(capacity * kv * d)), v_cache(k_cache.size());
  std::vector<float> k_scale(static_cast<size_t>(capacity * kv), 0.01f), v_scale(k_scale);
  moec_attention_args a = {};
  a.tokens = t;
  a.heads = h;
  a.kv_heads = kv;
  a.head_dim = a.value_dim = d;
  a.capacity = capacity;
  a.start_pos = capacity - t;
  a.scale = 0.125f;
  a.q = in(q);
  a.k = a.v = in(k);
  a.k_cache = out(k_cache);
  a.v_cache = out(v_cache);
  a.k_scale = out(k_scale);
  a.v_scale = out(v_scale);
  a.out = out(y);
  moec_release_scratch();
  const int64_t before = allocated;
  expect(moec_cached_attention(&a) == MOEC_OK, "attention" + where);
  expect(allocated > before, "allocations are counted");
  // a tile of queries, a block of keys and values, the accumulators: some 100 kB a thread, whatever t and capacity are
  expect(allocated - before < (int64_t{1} << 20), "attention" + where + ": " + std::to_string(allocated - before) + " bytes");
  if (!once) steady("attention" + where, [&] { return moec_cached_attention(&a); });
}

}  // namespace

int main() {
  const std::string isas = moec_available_isas();
  for (size_t at = 0; at < isas.size();) {
    const size_t comma = isas.find(',', at);
    const std::string isa = isas.substr(at, comma - at);
    at = comma == std::string::npos ? isas.size() : comma + 1;
    expect(moec_set_isa(isa.c_str()) == MOEC_OK, isa);
    for (const int threads : {1, 3}) {
      expect(moec_set_threads(threads) == MOEC_OK, "set_threads");
      for (const int64_t tokens : {1, 5, 60}) {
        const std::string where = ", " + isa + ", " + std::to_string(threads) + " threads, " + std::to_string(tokens) + " tokens";
        for (const int32_t format : {kInt4, kInt4Out}) {
          dense(tokens, format, where);
          block(tokens, format, where);
        }
        attention(tokens, 100, where);
      }
    }
    moec_set_threads(2);
    attention(1, 8192, ", 1 token over 8192 positions, " + isa);
    // one head's scores would be half a megabyte for each of two threads
    if (isa != "scalar") attention(32, 4096, ", 32 tokens over 4096 positions, " + isa, true);
  }
  moec_set_threads(1);
  printf("heap: %s: %d failures\n", isas.c_str(), failures);
  return failures == 0 ? 0 : 1;
}

#else

int main() {
  puts("heap: allocations cannot be counted here");
  return 0;
}

#endif
