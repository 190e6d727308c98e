// Checks how many cores count as fast, on made-up descriptions of processors.
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <string>
#include <vector>

#include "checking.h"
#include "core/cores.cpp"  // what is checked is not exported

namespace {

using namespace checking;

class Root {
 public:
  Root() {
    const char* const base = getenv("TMPDIR");
    std::string path = std::string(base ? base : P_tmpdir) + "/moec_cores_XXXXXX";
    if (mkdtemp(&path[0])) path_ = path;
    expect(!path_.empty(), "a folder for made-up processors");
  }
  ~Root() {
    for (auto made = made_.rbegin(); made != made_.rend(); ++made) remove(made->c_str());
    remove(path_.c_str());
  }
  void write(int cpu, const std::string& folder, const std::string& name, const std::string& text) {
    std::string at = path_ + "/cpu" + std::to_string(cpu);
    for (const std::string& part : {std::string(), folder}) {
      if (!part.empty()) at += "/" + part;
      if (mkdir(at.c_str(), 0700) == 0) made_.push_back(at);
    }
    at += "/" + name;
    if (FILE* const file = fopen(at.c_str(), "w")) {
      made_.push_back(at);
      fputs(text.c_str(), file);
      fclose(file);
    }
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  std::vector<std::string> made_;
};

}  // namespace

int main() {
  using moec::count_fast;
  expect(count_fast({1024, 1024, 1024, 1024}) == 4, "equal cores");
  expect(count_fast({250, 250, 250, 250, 670, 670, 1024, 1024}) == 4, "four little, two middle, two big");
  expect(count_fast({512, 1024}) == 2 && count_fast({511, 1024}) == 1, "the border is half");
  expect(count_fast({0, 0}) == 2, "nothing is known");
  expect(count_fast({300}) == 1, "only a little core may be used");
  {
    Root phone;
    for (int cpu = 0; cpu < 4; ++cpu) phone.write(cpu, "", "cpu_capacity", cpu < 2 ? "246\n" : "1024\n");
    expect(moec::read_capacities(phone.path(), {0, 1, 2, 3}) == std::vector<int64_t>({246, 246, 1024, 1024}), "capacities");
    expect(moec::read_capacities(phone.path(), {0, 3}) == std::vector<int64_t>({246, 1024}), "capacities of usable cores");
  }
  {
    Root frequencies;
    for (int cpu = 0; cpu < 2; ++cpu) frequencies.write(cpu, "cpufreq", "cpuinfo_max_freq", cpu ? "2800000\n" : "1000000\n");
    frequencies.write(0, "", "cpu_capacity", "300\n");  // of one only: not comparable
    expect(moec::read_capacities(frequencies.path(), {0, 1}) == std::vector<int64_t>({1000000, 2800000}), "frequencies instead");
  }
  {
    Root odd;
    odd.write(0, "", "cpu_capacity", "fast\n");
    odd.write(1, "", "cpu_capacity", "-5\n");
    expect(moec::read_capacities(odd.path(), {0, 1, 2}) == std::vector<int64_t>({0, 0, 0}), "nonsense is nothing");
  }
  expect(moec_fast_cores() >= 1 && moec_fast_cores() <= 256, "this machine");
  printf("cores: %d fast here, %d failures\n", moec_fast_cores(), failures);
  return failures == 0 ? 0 : 1;
}
