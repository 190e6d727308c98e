// Reading and writing a range of a file whole, whatever the system does at once and whichever signals come.
#ifndef MOEC_FILE_IO_H_
#define MOEC_FILE_IO_H_

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>

constexpr size_t kMostAtOnce = size_t{1} << 30;

// False where the file ends before, or cannot be read.
inline bool read_all(int descriptor, void* data, size_t size, uint64_t offset) {
  auto* at = static_cast<uint8_t*>(data);
  while (size > 0) {
    const ssize_t done = pread(descriptor, at, std::min(size, kMostAtOnce), static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return false;
    at += done;
    offset += static_cast<uint64_t>(done);
    size -= static_cast<size_t>(done);
  }
  return true;
}

inline bool write_all(int descriptor, const void* data, size_t size, uint64_t offset) {
  const auto* at = static_cast<const uint8_t*>(data);
  while (size > 0) {
    const ssize_t done = pwrite(descriptor, at, std::min(size, kMostAtOnce), static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return false;
    at += done;
    offset += static_cast<uint64_t>(done);
    size -= static_cast<size_t>(done);
  }
  return true;
}

#endif  // MOEC_FILE_IO_H_
