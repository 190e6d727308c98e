// Experts read from a file, past the page cache where its file system allows that: what the cache holds would otherwise be
// in memory twice, and the second copy counts against the limit that a phone sets an app.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "expert_cache.h"

namespace {

constexpr uint64_t kAlignment = 4096;  // of direct reads: no device in use asks for more

class ExpertFile final : public ExpertStorage {
 public:
  ExpertFile(int descriptor, bool direct) : descriptor_(descriptor), direct_(direct) {}
  ~ExpertFile() override { close(descriptor_); }

  uint64_t alignment() const override { return kAlignment; }

  std::string read(uint64_t offset, uint64_t size, uint64_t needed, void* out) override {
    auto* to = static_cast<uint8_t*>(out);
    for (uint64_t done = 0; done < needed;) {
      const ssize_t got = pread(descriptor_, to + done, size - done, static_cast<off_t>(offset + done));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return std::string("an expert cannot be read: ") + std::strerror(errno);
      const uint64_t reached = done + static_cast<uint64_t>(got);
      if (reached >= needed) break;
      // a direct read must begin at a multiple of the alignment, also after a read that came short
      const uint64_t next = direct_ ? reached / kAlignment * kAlignment : reached;
      if (next == done) return "truncated while it is in use";
      done = next;
    }
#ifdef POSIX_FADV_DONTNEED
    if (!direct_) posix_fadvise(descriptor_, static_cast<off_t>(offset), static_cast<off_t>(size), POSIX_FADV_DONTNEED);
#endif
    return "";
  }

 private:
  int descriptor_;
  bool direct_;
};

bool same_file(int a, int b) {
  struct stat first = {}, second = {};
  return fstat(a, &first) == 0 && fstat(b, &second) == 0 && first.st_dev == second.st_dev && first.st_ino == second.st_ino;
}

}  // namespace

std::unique_ptr<ExpertStorage> open_expert_file(const std::string& path, int descriptor, std::string* fault) {
  constexpr int kFlags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;
  bool direct = false;
  int own = -1;
#ifdef O_DIRECT
  own = ::open(path.c_str(), kFlags | O_DIRECT);
  direct = own >= 0;
#endif
  if (own < 0) own = ::open(path.c_str(), kFlags);
  if (own < 0) {
    *fault = std::strerror(errno);
    return nullptr;
  }
  if (!same_file(own, descriptor)) {
    *fault = "replaced while it was opened";
    close(own);
    return nullptr;
  }
#ifdef F_NOCACHE
  direct = fcntl(own, F_NOCACHE, 1) == 0;
#endif
  return std::make_unique<ExpertFile>(own, direct);
}
