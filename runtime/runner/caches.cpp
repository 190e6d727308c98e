#include "caches.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

Arena::Arena(size_t size) : size_(size) {
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  data_ = data == MAP_FAILED ? nullptr : static_cast<uint8_t*>(data);
}

Arena::~Arena() {
  if (data_) munmap(data_, size_);
}

void Arena::forget() {
#ifdef __linux__
  madvise(data_, size_, MADV_DONTNEED);
#else
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (mmap(data_, size_, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) std::memset(data_, 0, size_);
#endif
}

namespace {

// Moves pages and copies none; what is left behind reads as zero and stays reserved, so that no other thread's mapping can
// come between. False, and nothing moved, on systems that cannot (Linux before 5.7, macOS).
bool move_pages(void* from, void* to, size_t size) {
#ifdef MREMAP_DONTUNMAP
  return mremap(from, size, size, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to) == to;
#else
  (void)from, (void)to, (void)size;
  return false;
#endif
}

}  // namespace

void Seats::set(std::vector<Arena>* arenas, size_t first, std::vector<StatePart> parts) {
  arenas_ = arenas;
  first_ = first;
  parts_ = std::move(parts);
}

size_t Seats::bytes_at(int64_t position) const {
  size_t bytes = 0;
  for (const StatePart& part : parts_) bytes += part.bytes_at(position);
  return bytes;
}

bool Seats::reserve(Caches* caches) const {
  if (caches->parked.size() == arenas_->size() - first_) return true;
  std::vector<Arena> parked;
  for (size_t i = first_; i < arenas_->size(); ++i) {
    parked.emplace_back((*arenas_)[i].size());
    if (!parked.back().data()) return false;
  }
  caches->parked.swap(parked);
  return true;
}

void Seats::move(Arena& from, Arena& to, size_t arena, int64_t position) const {
  if (move_pages(from.data(), to.data(), from.size())) return;
  for (const StatePart& part : parts_)
    if (part.arena == arena) std::memcpy(to.data() + part.offset, from.data() + part.offset, part.bytes_at(position));
  from.forget();
}

bool Seats::seat(Caches* caches) {
  if (seated_ == caches) return true;
  if ((seated_ && !reserve(seated_)) || !reserve(caches)) return false;
  for (size_t i = first_; i < arenas_->size(); ++i) {
    if (seated_) move((*arenas_)[i], seated_->parked[i - first_], i, seated_->reached);
    move(caches->parked[i - first_], (*arenas_)[i], i, caches->reached);
  }
  seated_ = caches;
  return true;
}

void Seats::leave(Caches* caches) {
  if (seated_ != caches) return;
  seated_ = nullptr;
  for (size_t i = first_; i < arenas_->size(); ++i) (*arenas_)[i].forget();
}

uint8_t* Seats::at(const Caches& caches, const StatePart& part) const {
  const Arena& arena = seated_ == &caches ? (*arenas_)[part.arena] : caches.parked[part.arena - first_];
  return arena.data() + part.offset;
}

void Seats::copy(const Caches& from, Caches* to, int64_t position) const {
  for (const StatePart& part : parts_) std::memcpy(at(*to, part), at(from, part), part.bytes_at(position));
  to->reached = std::max(to->reached, position);
}
