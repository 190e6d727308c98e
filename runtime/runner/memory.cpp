#include "memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__APPLE__)
#include <mach/mach.h>
#endif

#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

namespace {

struct CloseFile {
  void operator()(FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<FILE, CloseFile>;

class Descriptor {
 public:
  explicit Descriptor(const std::string& path) : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

// The kilobytes of a line "Name:   123 kB", -1 if it is another line.
long long field(const char* line, const char* name) {
  const size_t length = std::strlen(name);
  long long kilobytes = -1;
  if (std::strncmp(line, name, length) != 0 || line[length] != ':') return -1;
  return std::sscanf(line + length + 1, "%lld", &kilobytes) == 1 ? kilobytes : -1;
}

}  // namespace

bool read_process_memory(const std::string& file, ProcessMemory* memory, const void* mapping, uint64_t size) {
  const File maps(std::fopen("/proc/self/smaps", "r"));
  if (!maps) return false;
  struct stat status = {};
  const bool known = !file.empty() && stat(file.c_str(), &status) == 0;
  const auto begin = reinterpret_cast<uintptr_t>(mapping);
  bool within = false;
  enum { kNone, kModel, kOther } kind = kNone;
  long long rss = 0;
  char line[4608];
  while (std::fgets(line, sizeof line, maps.get())) {
    unsigned long long first = 0, last = 0, offset = 0, inode = 0;
    char permissions[8] = "", device[16] = "";
    if (std::sscanf(line, "%llx-%llx %7s %llx %15s %llu", &first, &last, permissions, &offset, device, &inode) == 6) {
      // a file system may report another device in stat than here: the inode decides
      within = first >= begin && first - begin < size;
      kind = inode == 0 ? kNone : known && inode == static_cast<unsigned long long>(status.st_ino) ? kModel : kOther;
      continue;
    }
    if (const long long kb = field(line, "Rss"); kb >= 0) {
      rss = kb * 1024;
      memory->resident += rss;
    }
    if (const long long kb = field(line, "Anonymous"); kb >= 0) {  // comes after Rss; private copies of file pages too
      const long long anonymous = kb * 1024;
      memory->anonymous += anonymous;
      if (kind == kModel) memory->file_mapped += rss - anonymous;
      if (within) memory->of_mapping += rss - anonymous;
      if (kind == kOther) memory->other_files += rss - anonymous;
      // pages of no file that are not anonymous: shared memory and the kernel's own, counted with the libraries
      if (kind == kNone) memory->other_files += rss - anonymous;
    }
  }
  return true;
}

int64_t resident_besides(const std::string& file, const void* mapping, uint64_t size) {
#if defined(__APPLE__)
  // what the system limits an app by; clean pages of files are no part of it
  task_vm_info_data_t info = {};
  mach_msg_type_number_t count = TASK_VM_INFO_COUNT;
  if (task_info(mach_task_self(), TASK_VM_INFO, reinterpret_cast<task_info_t>(&info), &count) != KERN_SUCCESS) return -1;
  return static_cast<int64_t>(info.phys_footprint);
#else
  ProcessMemory process;
  return read_process_memory(file, &process, mapping, size) ? process.resident - process.of_mapping : -1;
#endif
}

int64_t resident_bytes(const void* data, size_t length) {
#if defined(__linux__)
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const size_t pages = (reinterpret_cast<uintptr_t>(data) + length - begin + page - 1) / page;
  std::vector<unsigned char> flags(pages);
  if (pages > 0 && mincore(reinterpret_cast<void*>(begin), pages * page, flags.data()) != 0) return -1;
  int64_t count = 0;
  for (const unsigned char flag : flags) count += flag & 1;
  return count * static_cast<int64_t>(page);
#else
  (void)data;
  (void)length;
  return -1;
#endif
}

int64_t cached_bytes(const std::string& file) {
  const Descriptor descriptor(file);
  struct stat status = {};
  if (descriptor.get() < 0 || fstat(descriptor.get(), &status) != 0) return -1;
  if (status.st_size <= 0) return 0;
  const auto length = static_cast<size_t>(status.st_size);
  void* const data = mmap(nullptr, length, PROT_READ, MAP_SHARED, descriptor.get(), 0);
  if (data == MAP_FAILED) return -1;
  const int64_t bytes = resident_bytes(data, length);
  munmap(data, length);
  return bytes;
}

bool forget_cached(const std::string& file) {
#if defined(__linux__)
  const Descriptor descriptor(file);
  if (descriptor.get() < 0) return false;
  fdatasync(descriptor.get());  // the system keeps pages that are not written yet
  return posix_fadvise(descriptor.get(), 0, 0, POSIX_FADV_DONTNEED) == 0;
#else
  (void)file;
  return false;
#endif
}

int64_t peak_resident() {
#if defined(__linux__)
  // not getrusage: its maximum begins with what the parent had when it started this process
  if (const File status{std::fopen("/proc/self/status", "r")}) {
    char line[256];
    while (std::fgets(line, sizeof line, status.get()))
      if (const long long kb = field(line, "VmHWM"); kb >= 0) return kb * 1024;
  }
#endif
  struct rusage usage = {};
  if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
#if defined(__APPLE__)
  return usage.ru_maxrss;
#else
  return static_cast<int64_t>(usage.ru_maxrss) * 1024;
#endif
}
