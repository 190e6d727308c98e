// The handler of SIGBUS looks the address up in a table of our mappings; a page of ours that the file no longer has is
// replaced by one of zeros, and the access goes on. Any other fault goes to whoever handled SIGBUS before. Reading the file
// into memory instead would cost what mapping saves: the experts that nobody selects.
#include "mapped_file.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <mutex>

namespace {

struct Guarded {
  std::atomic<uintptr_t> begin{0}, end{0};
  std::atomic<bool> used{false}, writable{false}, lost{false};
};
constexpr int kMost = 256;
Guarded guarded[kMost];
struct sigaction previous = {};
uintptr_t page_bytes = 4096;

// mmap is a plain system call on all systems that this is built for, so a signal handler may call it.
void on_bus_error(int signal, siginfo_t* info, void* context) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
  for (Guarded& file : guarded) {
    if (!file.used.load(std::memory_order_acquire) || address < file.begin.load() || address >= file.end.load()) continue;
    const int error = errno;
    void* page = reinterpret_cast<void*>(address / page_bytes * page_bytes);
    const int access = file.writable.load() ? PROT_READ | PROT_WRITE : PROT_READ;
    const bool replaced = mmap(page, page_bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
    file.lost.store(true, std::memory_order_release);
    errno = error;
    if (replaced) return;
  }
  if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(signal, info, context);
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) return previous.sa_handler(signal);
  sigaction(signal, &previous, nullptr);  // the access is made again, and ends the process
}

void install() {
  static std::once_flag once;
  std::call_once(once, [] {
    page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    struct sigaction action = {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &previous);
  });
}

int guard(const void* data, uint64_t size, bool writable) {
  install();
  for (int i = 0; i < kMost; ++i) {
    bool free = false;
    if (!guarded[i].used.compare_exchange_strong(free, true)) continue;
    guarded[i].lost.store(false);
    guarded[i].writable.store(writable);
    guarded[i].begin.store(reinterpret_cast<uintptr_t>(data));
    guarded[i].end.store(reinterpret_cast<uintptr_t>(data) + size);
    return i;
  }
  return -1;
}

}  // namespace

GuardedMemory::GuardedMemory(const void* data, uint64_t size, bool writable) : slot_(guard(data, size, writable)) {}

GuardedMemory::~GuardedMemory() {
  if (slot_ < 0) return;
  guarded[slot_].begin.store(0);
  guarded[slot_].end.store(0);
  guarded[slot_].used.store(false, std::memory_order_release);
}

bool GuardedMemory::lost() const { return slot_ >= 0 && guarded[slot_].lost.load(std::memory_order_acquire); }

std::unique_ptr<MappedFile> MappedFile::open(const std::string& path, std::string* fault) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not keep us waiting
  if (descriptor < 0) {
    *fault = std::strerror(errno);
    return nullptr;
  }
  struct stat status = {};
  const bool known = fstat(descriptor, &status) == 0;
  if (!known || !S_ISREG(status.st_mode) || status.st_size < 1) {
    *fault = !known ? std::strerror(errno) : S_ISREG(status.st_mode) ? "not an ExecuTorch program" : "not a file";
    close(descriptor);
    return nullptr;
  }
  const size_t size = static_cast<size_t>(status.st_size);
  void* data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
  if (data == MAP_FAILED) {
    *fault = std::string("cannot be mapped: ") + std::strerror(errno);
    close(descriptor);
    return nullptr;
  }
  std::unique_ptr<MappedFile> file(new MappedFile(descriptor, static_cast<const uint8_t*>(data), size));
  if (file->guard_->held()) return file;
  *fault = "too many models are open in this process";
  return nullptr;
}

MappedFile::~MappedFile() {
  guard_.reset();
  munmap(const_cast<uint8_t*>(data_), size_);
  close(descriptor_);
}

void MappedFile::forbid_huge_pages(uint64_t begin, uint64_t end) const {
#ifdef MADV_NOHUGEPAGE
  const uintptr_t from = (reinterpret_cast<uintptr_t>(data_) + begin) / page_bytes * page_bytes;
  madvise(reinterpret_cast<void*>(from), reinterpret_cast<uintptr_t>(data_) + end - from, MADV_NOHUGEPAGE);
#else
  (void)begin, (void)end;
#endif
}

bool MappedFile::read(uint64_t offset, uint64_t size, void* out) const {
  uint8_t* to = static_cast<uint8_t*>(out);
  while (size > 0) {
    const ssize_t got = pread(descriptor_, to, size, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    to += got;
    offset += static_cast<uint64_t>(got);
    size -= static_cast<uint64_t>(got);
  }
  return true;
}

bool MappedFile::truncated() const {
  struct stat status = {};
  return guard_->lost() || fstat(descriptor_, &status) != 0 ||
         static_cast<uint64_t>(status.st_size) < size_;
}
