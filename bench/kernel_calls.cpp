// One call of a kernel library, for callgrind: kernel_calls LIBRARY FILE. Built with MOEC_LINKED into one program with the
// kernels it is kernel_calls FILE: a first call, then one between measured_begin and measured_end, whose entries are marks
// for those who count; kernel_calls FILE ROUNDS times calls instead, and prints the median in cycles of the processor.
// The file holds what kernel_revisions.py wrote, for each array its bytes as an int64 and then the array:
//   MoE      tokens, config int64, params double, router weight, w13, w2, shared w13, shared w2, x
//   linear   {T, N, K, format} int64, x, w
//   attention over INT8 caches   {T, H, KV, d, positions} int64, q, k, v, codes and scales of keys, codes and scales of values
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "attention.h"
#include "moec_kernel.h"

namespace {

constexpr size_t kMoe = 9, kLinear = 3, kAttention = 8;  // arrays of a file

std::vector<std::vector<char>> read(const char* path) {
  std::vector<std::vector<char>> parts;
  FILE* file = std::fopen(path, "rb");
  int64_t bytes = 0;
  while (file && std::fread(&bytes, sizeof bytes, 1, file) == 1) {
    parts.emplace_back(bytes);
    if (std::fread(parts.back().data(), 1, bytes, file) != static_cast<size_t>(bytes)) parts.clear();
  }
  if (file) std::fclose(file);
  return parts;
}

#ifdef MOEC_LINKED
#define FUNCTION(name) (&name)
#else
template <typename F>
F* function(void* library, const char* name) {
  return reinterpret_cast<F*>(dlsym(library, name));
}
#define FUNCTION(name) function<decltype(name)>(library, #name)
#endif

int call(const std::vector<std::vector<char>>& parts, [[maybe_unused]] void* library) {
  const auto in = [&](size_t i) { return moec_in{parts[i].data(), parts[i].size()}; };
  const auto* const sizes = reinterpret_cast<const int64_t*>(parts[0].data());
  int32_t status = 0;
  if (parts.size() == kMoe) {
    std::vector<char> y(parts[8].size());
    moec_moe_args args = {};
    args.tokens = sizes[0];
    args.config = reinterpret_cast<const int64_t*>(parts[1].data());
    args.config_length = parts[1].size() / sizeof(int64_t);
    args.params = reinterpret_cast<const double*>(parts[2].data());
    args.params_length = parts[2].size() / sizeof(double);
    args.x = args.router_input = in(8);
    args.router_weight = in(3);
    args.w13 = in(4);
    args.w2 = in(5);
    args.shared_w13 = in(6);
    args.shared_w2 = in(7);
    args.y = {y.data(), y.size()};
    status = FUNCTION(moec_moe)(&args);
  } else if (parts.size() == kAttention) {
    const int64_t tokens = sizes[0], heads = sizes[1], kv = sizes[2], width = sizes[3], positions = sizes[4];
    std::vector<std::vector<char>> caches(parts.begin() + 4, parts.end());  // the new rows are written into them
    const auto out = [&](std::vector<char>& of) { return moec_out{of.data(), of.size()}; };
    std::vector<char> y(parts[1].size());
    moec_attention_args args = {};
    args.tokens = tokens;
    args.heads = heads;
    args.kv_heads = kv;
    args.head_dim = args.value_dim = width;
    args.capacity = positions;
    args.start_pos = positions - tokens;
    args.scale = 0.125f;
    args.q = in(1);
    args.k = in(2);
    args.v = in(3);
    args.k_cache = out(caches[0]);
    args.k_scale = out(caches[1]);
    args.v_cache = out(caches[2]);
    args.v_scale = out(caches[3]);
    args.out = out(y);
    status = FUNCTION(moec_cached_attention)(&args);
  } else {
    std::vector<float> y(sizes[0] * sizes[1]);
    status = FUNCTION(moec_linear)(sizes[0], sizes[1], sizes[2], static_cast<int32_t>(sizes[3]), in(1), in(2),
                                   moec_in{nullptr, 0}, moec_out{y.data(), y.size() * 4});
  }
  if (status) std::fprintf(stderr, "%s\n", FUNCTION(moec_last_error)());
  return status;
}

#ifdef MOEC_LINKED
double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// A cycle: a third of a multiplication in a chain of them. Additions of constants take none on processors of today.
double cycle_seconds() {
  constexpr int kMultiplications = 5000;
  long x = 3;
  const double begin = seconds();
  for (int i = 0; i < kMultiplications / 5; ++i) {
#if defined(__x86_64__)
    asm volatile("imul %0,%0\nimul %0,%0\nimul %0,%0\nimul %0,%0\nimul %0,%0" : "+r"(x));
#else
    asm volatile("mul %0,%0,%0\nmul %0,%0,%0\nmul %0,%0,%0\nmul %0,%0,%0\nmul %0,%0,%0" : "+r"(x));
#endif
  }
  return (seconds() - begin) / kMultiplications / 3;
}

// The clock is taken before and after each call; another process that takes the core in between spoils that round alone.
int time_calls(const std::vector<std::vector<char>>& parts, int rounds) {
  std::vector<double> cycles;
  for (int i = 0; i < rounds; ++i) {
    const double before = cycle_seconds(), begin = seconds();
    if (const int status = call(parts, nullptr)) return status;
    const double took = seconds() - begin;
    cycles.push_back(took / std::min(before, cycle_seconds()));
  }
  std::sort(cycles.begin(), cycles.end());
  std::printf("%.0f %.0f\n", cycles[cycles.size() / 2], cycles[cycles.size() / 10]);
  return 0;
}
#endif

}  // namespace

#ifdef MOEC_LINKED
extern "C" __attribute__((noinline)) void measured_begin() {
#if defined(__x86_64__)
  if (std::getenv("MOEC_STEPPED")) asm volatile("int3");
#endif
  asm volatile("");
}
extern "C" __attribute__((noinline)) void measured_end() { asm volatile(""); }

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  const auto parts = read(argv[1]);
  if (parts.size() != kMoe && parts.size() != kLinear && parts.size() != kAttention) return std::fprintf(stderr, "%s is no call\n", argv[1]), 2;
  moec_set_parallel(nullptr, nullptr, nullptr);
  moec_set_threads(1);
  if (const int status = call(parts, nullptr)) return status;
  if (argc > 2) return time_calls(parts, std::atoi(argv[2]));
  measured_begin();
  const int status = call(parts, nullptr);
  measured_end();
  return status;
}
#else
int main(int argc, char** argv) {
  if (argc != 3) return 2;
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 2;
  const auto parts = read(argv[2]);
  if (parts.size() != kMoe && parts.size() != kLinear && parts.size() != kAttention) return std::fprintf(stderr, "%s is no call\n", argv[2]), 2;
  FUNCTION(moec_set_parallel)(nullptr, nullptr, nullptr);
  FUNCTION(moec_set_threads)(1);
  return call(parts, library);
}
#endif
