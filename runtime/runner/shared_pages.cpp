#include "shared_pages.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__ANDROID__)
#include <android/api-level.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "core/parallel.h"
#include "file_io.h"
namespace {

constexpr uint64_t kPage = uint64_t{16} << 10;
constexpr size_t kPiece = size_t{1} << 20;  // that one worker writes at once

#if defined(__linux__)
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

int anonymous_file() {
#if defined(__ANDROID__)
  if (android_get_device_api_level() < 30) return -1;  // an app that makes the call is ended
#endif
  return static_cast<int>(syscall(SYS_memfd_create, "moec-session", 1u /* MFD_CLOEXEC */));
}
#endif

// Whether pages of files can be moved and made present: Linux since 5.13 and 5.14.
bool maps_files() {
#if defined(__linux__)
  static const bool able = [] {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* const data = mmap(nullptr, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return false;
    const bool found = madvise(data, page, MADV_POPULATE_READ) == 0;
    munmap(data, page);
    return found;
  }();
  return able;
#else
  return false;
#endif
}

}  // namespace

std::vector<uint64_t> places_of(const std::vector<SessionBytes>& parts, uint64_t at) {
  std::vector<uint64_t> places;
  for (const SessionBytes& part : parts) {
    if (part.size >= kLeastMapped) at += (part.offset % kPage + kPage - at % kPage) % kPage;
    places.push_back(at);
    at += part.size;
  }
  places.push_back(at);
  return places;
}

SharedPages::SharedPages(int descriptor, std::vector<uint64_t> places, std::function<bool(int)> matches)
    : descriptor_(descriptor), places_(std::move(places)), matches_(std::move(matches)) {
  stamp();
}

timespec SharedPages::written(const struct stat& status) {
#if defined(__APPLE__)
  return status.st_mtimespec;
#else
  return status.st_mtim;
#endif
}

void SharedPages::stamp() {
  fstat(descriptor_, &status_);
  // systems count this time in steps, some of two seconds: what is written soon after may get the same
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto then = std::chrono::seconds(written(status_).tv_sec) + std::chrono::nanoseconds(written(status_).tv_nsec);
  const auto step = std::chrono::milliseconds(2100);
  certain_ = now - then > step || then - now > step;
}

SharedPages::~SharedPages() { close(descriptor_); }

std::shared_ptr<SharedPages> SharedPages::of(const std::vector<SessionBytes>& parts) {
#if defined(__linux__)
  const bool able = maps_files() && static_cast<uint64_t>(sysconf(_SC_PAGESIZE)) <= kPage;
  const int descriptor = able ? anonymous_file() : -1;
  if (descriptor < 0) return nullptr;
  auto pages = std::make_shared<SharedPages>(descriptor, places_of(parts, 0), nullptr);
  if (ftruncate(descriptor, static_cast<off_t>(pages->places_.back())) != 0) return nullptr;
  struct Piece {
    const uint8_t* data;
    size_t size;
    uint64_t place;
  };
  std::vector<Piece> pieces;
  for (size_t i = 0; i < parts.size(); ++i)
    for (size_t at = 0; at < parts[i].size; at += kPiece)
      pieces.push_back({parts[i].data + at, std::min(kPiece, parts[i].size - at), pages->places_[i] + at});
  std::atomic<bool> written{true};
  moec::for_each_unit(moec::workers(), static_cast<int64_t>(pieces.size()), [&](int32_t, int64_t i) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    if (!write_all(descriptor, piece.data, piece.size, piece.place)) written = false;
  });
  return written ? pages : nullptr;
#else
  (void)parts;
  return nullptr;
#endif
}

std::pair<size_t, size_t> SharedPages::map(size_t part, uint8_t* data, size_t size) const {
#if defined(__linux__)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + size) / page * page;
  const uint64_t place = places_[part] + (first - begin);
  if (size < kLeastMapped || first >= last || place % page != 0 || !maps_files()) return {0, 0};
  const size_t length = last - first;
  // elsewhere first: where it fails, some systems leave a hole in place of what was there
  void* const fresh = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, descriptor_, static_cast<off_t>(place));
  if (fresh == MAP_FAILED) return {0, 0};
  void* const at = reinterpret_cast<void*>(first);
  // all pages at once; of a file that cannot be read it gives an error instead of a signal
  if (madvise(fresh, length, MADV_POPULATE_READ) == 0 && mremap(fresh, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, at) == at)
    return {first - begin, last - begin};
  munmap(fresh, length);
  forget_pages(data + (first - begin), length);
#else
  (void)part, (void)data, (void)size;
#endif
  return {0, 0};
}

bool SharedPages::read(size_t part, uint8_t* data, size_t size) const { return read_all(descriptor_, data, size, places_[part]); }

void forget_pages(uint8_t* data, size_t size) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (mmap(data, size, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) std::memset(data, 0, size);
}

bool SharedPages::changed() {
  struct stat now = {};
  if (!matches_ || changed_) return changed_;
  changed_ = fstat(descriptor_, &now) != 0 || now.st_size != status_.st_size;
  const timespec then = written(status_), since = written(now);
  if (changed_ || (certain_ && then.tv_sec == since.tv_sec && then.tv_nsec == since.tv_nsec)) return changed_;
  stamp();  // before the contents are read
  return changed_ = !matches_(descriptor_);
}
