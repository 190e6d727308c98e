// One call of a kernel library, for callgrind: kernel_calls LIBRARY FILE. The file holds what kernel_revisions.py wrote, for
// each array its bytes as an int64 and then the array:
//   MoE      tokens, config int64, params double, router weight, w13, w2, shared w13, shared w2, x
//   linear   {T, N, K, format} int64, x, w
#include <dlfcn.h>

#include <cstdio>
#include <vector>

#include "moec_kernel.h"

namespace {

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

template <typename F>
F* function(void* library, const char* name) {
  return reinterpret_cast<F*>(dlsym(library, name));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 2;
  const auto parts = read(argv[2]);
  if (parts.size() != 9 && parts.size() != 3) return std::fprintf(stderr, "%s is no call\n", argv[2]), 2;
  const auto in = [&](size_t i) { return moec_in{parts[i].data(), parts[i].size()}; };
  const auto* const sizes = reinterpret_cast<const int64_t*>(parts[0].data());
  function<decltype(moec_set_parallel)>(library, "moec_set_parallel")(nullptr, nullptr, nullptr);
  function<decltype(moec_set_threads)>(library, "moec_set_threads")(1);
  int32_t status = 0;
  if (parts.size() == 9) {
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
    status = function<decltype(moec_moe)>(library, "moec_moe")(&args);
  } else {
    std::vector<float> y(sizes[0] * sizes[1]);
    status = function<decltype(moec_linear)>(library, "moec_linear")(sizes[0], sizes[1], sizes[2],
                                                                    static_cast<int32_t>(sizes[3]), in(1), in(2),
                                                                    moec_in{nullptr, 0}, moec_out{y.data(), y.size() * 4});
  }
  if (status) std::fprintf(stderr, "%s\n", function<decltype(moec_last_error)>(library, "moec_last_error")());
  return status;
}
