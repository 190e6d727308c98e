// How many threads a processor is worth: its fast cores. A phone's little cores have a quarter of a big one's speed, and an
// operator ends with its slowest worker.
#ifndef MOEC_CORES_H_
#define MOEC_CORES_H_

#include <cstdint>
#include <string>
#include <vector>

namespace moec {

// Cores with at least half of the largest capacity; 0 stands for one of unknown capacity, which counts.
inline int32_t count_fast(const std::vector<int64_t>& capacities) {
  int64_t most = 0;
  for (const int64_t c : capacities) most = c > most ? c : most;
  int32_t fast = 0;
  for (const int64_t c : capacities) fast += c == 0 || 2 * c >= most;
  return fast;
}

// What the system says of each of `cpus` below `root` (/sys/devices/system/cpu): cpu_capacity, or for all of them the highest
// frequency where one has no capacity. 0 where it says nothing.
std::vector<int64_t> read_capacities(const std::string& root, const std::vector<int>& cpus);

}  // namespace moec

#endif  // MOEC_CORES_H_
