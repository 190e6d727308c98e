// A file of bounded length, read whole.
#ifndef MOEC_FILE_BYTES_H_
#define MOEC_FILE_BYTES_H_

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

// False and the reason, without the path. Only regular files are read: a pipe could block.
inline bool read_file(const std::string& path, uint64_t most, std::vector<uint8_t>* bytes, std::string* fault) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  struct stat status = {};
  const bool known = descriptor >= 0 && ::fstat(descriptor, &status) == 0;
  if (!known) *fault = std::strerror(errno);
  if (known && !S_ISREG(status.st_mode)) *fault = "not a file";
  if (known && static_cast<uint64_t>(status.st_size) > most) *fault = "too large";
  if (fault->empty()) bytes->resize(static_cast<size_t>(status.st_size));
  for (size_t at = 0; fault->empty() && at < bytes->size();) {
    const ssize_t got = ::read(descriptor, bytes->data() + at, bytes->size() - at);
    if (got == 0) *fault = "truncated while it is read";
    if (got < 0 && errno != EINTR) *fault = std::strerror(errno);
    at += got > 0 ? static_cast<size_t>(got) : 0;
  }
  if (descriptor >= 0) ::close(descriptor);
  return fault->empty();
}

#endif  // MOEC_FILE_BYTES_H_
