// Which instruction set serves the operators: detection, MOEC_ISA, and the override.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "kernels.h"
#include "status.h"

namespace moec {
namespace {

#if defined(__x86_64__)

struct Leaf {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Leaf cpuid(uint32_t leaf, uint32_t subleaf) {
  Leaf l;
  __get_cpuid_count(leaf, subleaf, &l.a, &l.b, &l.c, &l.d);
  return l;
}

bool has(uint32_t word, int bit) { return word >> bit & 1; }

std::vector<const Kernels*> detect() {
  const Leaf l1 = cpuid(1, 0), l7 = cpuid(7, 0), l71 = l7.a >= 1 ? cpuid(7, 1) : Leaf{};
  uint32_t saved = 0, unused = 0;  // the register state that the system saves
  if (has(l1.c, 27)) asm volatile("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));
  const bool avx = (saved & 0x6) == 0x6, avx512_saved = (saved & 0xE6) == 0xE6;
  const bool avx2 = avx && has(l7.b, 5) && has(l1.c, 12) && has(l1.c, 29);  // + FMA, F16C
  const bool avx512 = avx512_saved && has(l7.b, 16) && has(l7.b, 30) && has(l7.b, 17) && has(l7.b, 31);  // F, BW, DQ, VL
  std::vector<const Kernels*> found;
  if (avx2 && avx512 && has(l7.c, 11)) found.push_back(&avx512vnni_kernels());
  if (avx2 && has(l71.a, 4)) found.push_back(&avxvnni_kernels());
  if (avx2) found.push_back(&avx2_kernels());
  found.push_back(&scalar_kernels());
  return found;
}

#elif defined(__aarch64__)

std::vector<const Kernels*> detect() {
  bool dotprod = false, i8mm = false;
#if defined(__linux__)
  dotprod = getauxval(AT_HWCAP) >> 20 & 1;
  i8mm = getauxval(AT_HWCAP2) >> 13 & 1;
#elif defined(__APPLE__)
  const auto feature = [](const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
  };
  dotprod = feature("hw.optional.arm.FEAT_DotProd");
  i8mm = feature("hw.optional.arm.FEAT_I8MM");
#endif
  std::vector<const Kernels*> found;
  if (dotprod && i8mm) found.push_back(&i8mm_kernels());
  if (dotprod) found.push_back(&neon_kernels());
  found.push_back(&scalar_kernels());
  return found;
}

#else

std::vector<const Kernels*> detect() { return {&scalar_kernels()}; }

#endif

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> found = detect();
  return found;
}

const Kernels* find(const char* name) {
  if (!name || !*name || std::strcmp(name, "auto") == 0) return available().front();
  for (const Kernels* k : available()) {
    if (std::strcmp(k->name, name) == 0) return k;
  }
  return nullptr;
}

const std::string& names() {
  static const std::string joined = [] {
    std::string s;
    for (const Kernels* k : available()) s += (s.empty() ? "" : ",") + std::string(k->name);
    return s;
  }();
  return joined;
}

// What MOEC_ISA asks for. A name that this machine cannot serve falls back to the best one: a library has nobody to tell.
const Kernels* initial() {
  const Kernels* const asked = find(std::getenv("MOEC_ISA"));
  return asked ? asked : available().front();
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* k = current.load(std::memory_order_acquire);
  if (k) return *k;
  k = initial();
  current.store(k, std::memory_order_release);
  return *k;
}

}  // namespace moec

int32_t moec_set_isa(const char* name) {
  using namespace moec;
  const Kernels* k = nullptr;
  if (!name || !*name || std::strcmp(name, "auto") == 0) {
    k = initial();
  } else {
    k = find(name);
  }
  if (!k) return fail(MOEC_UNSUPPORTED, "instruction set %.40s: this machine offers %s", name, names().c_str());
  current.store(k, std::memory_order_release);
  return MOEC_OK;
}

const char* moec_get_isa(void) { return moec::kernels().name; }

const char* moec_available_isas(void) { return moec::names().c_str(); }
