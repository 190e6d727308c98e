#include "isa/cpu.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <set>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

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

std::set<std::string> detect() {
  const Leaf l1 = cpuid(1, 0), l7 = cpuid(7, 0), l71 = l7.a >= 1 ? cpuid(7, 1) : Leaf{};
  uint32_t saved = 0, unused = 0;  // the register state that the system saves
  if (has(l1.c, 27)) asm volatile("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));
  const bool avx = (saved & 0x6) == 0x6, avx512_saved = (saved & 0xE6) == 0xE6;
  std::set<std::string> found;
  if (avx && has(l7.b, 5) && has(l1.c, 12) && has(l1.c, 29)) found.insert("avx2");  // with FMA and F16C
  if (avx && has(l71.a, 4)) found.insert("avxvnni");
  if (avx512_saved && has(l7.b, 16) && has(l7.b, 30) && has(l7.b, 17) && has(l7.b, 31)) {
    found.insert("avx512");  // F, BW, DQ, VL
    if (has(l7.c, 11)) found.insert("avx512vnni");
  }
  return found;
}

#elif defined(__aarch64__)

std::set<std::string> detect() {
  std::set<std::string> found;
#if defined(__linux__)
  if (getauxval(AT_HWCAP) >> 20 & 1) found.insert("dotprod");
  if (getauxval(AT_HWCAP2) >> 13 & 1) found.insert("i8mm");
#elif defined(__APPLE__)
  const auto feature = [](const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
  };
  if (feature("hw.optional.arm.FEAT_DotProd")) found.insert("dotprod");
  if (feature("hw.optional.arm.FEAT_I8MM")) found.insert("i8mm");
#endif
  return found;
}

#else

std::set<std::string> detect() { return {}; }

#endif

}  // namespace

bool cpu_has(const char* features) {
  static const std::set<std::string> here = detect();
  while (*features) {
    const size_t length = std::strcspn(features, " ");
    if (!here.count(std::string(features, length))) return false;
    features += length;
    features += *features == ' ';
  }
  return true;
}

}  // namespace moec
