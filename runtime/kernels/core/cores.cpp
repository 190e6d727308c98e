#include "core/cores.h"

#include <cstdio>
#include <new>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "moec_kernel.h"

namespace moec {
namespace {

constexpr int32_t kMost = 256;

int64_t read_number(const std::string& file) {
  FILE* const stream = std::fopen(file.c_str(), "r");
  if (!stream) return 0;
  long long value = 0;
  const bool found = std::fscanf(stream, "%lld", &value) == 1;
  std::fclose(stream);
  return found && value > 0 && value < int64_t{1} << 40 ? value : 0;
}

std::vector<int64_t> read_all(const std::string& root, const std::vector<int>& cpus, const char* file) {
  std::vector<int64_t> values;
  for (const int cpu : cpus) values.push_back(read_number(root + "/cpu" + std::to_string(cpu) + file));
  return values;
}

int32_t fast_cores() {
#if defined(__linux__)
  cpu_set_t usable;
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof usable, &usable) == 0) {
    for (int i = 0; i < CPU_SETSIZE; ++i) {
      if (CPU_ISSET(i, &usable)) cpus.push_back(i);
    }
  }
  if (!cpus.empty()) return count_fast(read_capacities("/sys/devices/system/cpu", cpus));
#elif defined(__APPLE__)
  int32_t count = 0;  // level 0: the performance cores
  size_t size = sizeof count;
  if (sysctlbyname("hw.perflevel0.logicalcpu", &count, &size, nullptr, 0) == 0 && count > 0) return count;
#endif
  return int32_t(std::thread::hardware_concurrency());
}

}  // namespace

std::vector<int64_t> read_capacities(const std::string& root, const std::vector<int>& cpus) {
  std::vector<int64_t> capacities = read_all(root, cpus, "/cpu_capacity");
  for (const int64_t c : capacities) {
    if (c == 0) return read_all(root, cpus, "/cpufreq/cpuinfo_max_freq");
  }
  return capacities;
}

}  // namespace moec

int32_t moec_fast_cores(void) {
  try {
    const int32_t n = moec::fast_cores();
    return n < 1 ? 1 : n > moec::kMost ? moec::kMost : n;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
