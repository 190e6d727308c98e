#include "caches.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <optional>

Arena::Arena(size_t size) : size_(size) {
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  data_ = data == MAP_FAILED ? nullptr : static_cast<uint8_t*>(data);
}

Arena::~Arena() {
  if (data_) munmap(data_, size_);
}

void Arena::forget() { forget_pages(data_, size_); }

#if defined(__linux__) && !defined(MREMAP_DONTUNMAP)
#define MREMAP_DONTUNMAP 4
#endif

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

void Caches::swap(Caches& other) {
  parked.swap(other.parked);
  std::swap(reached, other.reached);
  base.swap(other.base);
  shared.swap(other.shared);
  std::swap(intact, other.intact);
  std::swap(damaged, other.damaged);
}

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

void Seats::move_range(Caches& caches, Arena& from, Arena& to, size_t arena, size_t begin, size_t end,
                       bool shared) const {
  if (begin >= end) return;
  const bool moved = move_pages(from.data() + begin, to.data() + begin, end - begin);
  for (const StatePart& part : parts_) {
    const size_t first = std::max(part.offset, begin), last = std::min(part.offset + part.bytes_at(caches.reached), end);
    if (!moved && part.arena == arena && first < last) std::memcpy(to.data() + first, from.data() + first, last - first);
  }
  if (!moved || shared) forget_pages(from.data() + begin, end - begin);  // what stays behind of a file is mapped again else
}

void Seats::move(Caches& caches, Arena& from, Arena& to, size_t arena) const {
  size_t at = 0;
  for (const SharedRange& range : caches.shared) {
    if (range.arena != arena) continue;
    move_range(caches, from, to, arena, at, range.begin, false);
    move_range(caches, from, to, arena, range.begin, range.end, true);
    at = range.end;
  }
  move_range(caches, from, to, arena, at, from.size(), false);
}

bool Seats::seat(Caches* caches) {
  if (seated_ == caches) return true;
  if ((seated_ && !reserve(seated_)) || !reserve(caches)) return false;
  const SharedUse coming(*this, *caches);  // where pages cannot be moved they are read
  std::optional<SharedUse> leaving;
  if (seated_) leaving.emplace(*this, *seated_);
  for (size_t i = first_; i < arenas_->size(); ++i) {
    if (seated_) move(*seated_, (*arenas_)[i], seated_->parked[i - first_], i);
    move(*caches, caches->parked[i - first_], (*arenas_)[i], i);
  }
  if (leaving) seated_->damaged |= leaving->lost();
  caches->damaged |= coming.lost();
  seated_ = caches;
  return true;
}

void Seats::leave(Caches* caches) {
  if (seated_ != caches) return;
  clear(caches);
  seated_ = nullptr;
}

Arena& Seats::arena_of(Caches& caches, size_t arena) const {
  return seated_ == &caches ? (*arenas_)[arena] : caches.parked[arena - first_];
}

uint8_t* Seats::at(const Caches& caches, const StatePart& part) const {
  const Arena& arena = seated_ == &caches ? (*arenas_)[part.arena] : caches.parked[part.arena - first_];
  return arena.data() + part.offset;
}

std::vector<SessionBytes> Seats::bytes_of(const Caches& caches, int64_t position) const {
  std::vector<SessionBytes> found;
  for (const StatePart& part : parts_) found.push_back({at(caches, part), part.bytes_at(position), part.offset});
  return found;
}

Seats::Mapped Seats::map(Caches* caches, std::shared_ptr<SharedPages> pages, int64_t position) const {
  Mapped mapped;
  std::vector<SharedRange> shared;
  for (size_t i = 0; i < parts_.size(); ++i) {
    const StatePart& part = parts_[i];
    const bool rows = part.row > 0;  // a state that every token replaces is nobody else's
    mapped.push_back(rows ? pages->map(i, at(*caches, part), part.bytes_at(position)) : std::make_pair(size_t{0}, size_t{0}));
    const auto [first, last] = mapped.back();
    if (first < last) shared.push_back({i, part.arena, part.offset + first, part.offset + last});
  }
  std::sort(shared.begin(), shared.end(), [](const SharedRange& a, const SharedRange& b) { return a.begin < b.begin; });
  caches->base = shared.empty() ? nullptr : std::move(pages);
  caches->intact = shared.empty() ? 0 : position;
  caches->shared.swap(shared);
  return mapped;
}

// Makes pages a sequence's own that are mapped behind its first `kept` positions; it keeps the contents of the first `position`.
void Seats::own(Caches* caches, int64_t position, int64_t kept) const {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::vector<SharedRange> shared;
  std::vector<uint8_t> contents;
  for (SharedRange range : caches->shared) {
    const StatePart& part = parts_[range.part];
    size_t end = std::min((part.offset + part.bytes_at(kept)) / page * page, range.end);
    if (end < range.begin + kLeastMapped) end = range.begin;
    if (end < range.end) {
      uint8_t* const data = arena_of(*caches, range.arena).data();
      const size_t used = std::min(part.offset + part.bytes_at(position), range.end);
      contents.assign(data + end, data + std::max(used, end));
      forget_pages(data + end, range.end - end);
      std::memcpy(data + end, contents.data(), contents.size());
    }
    range.end = end;
    if (range.begin < range.end) shared.push_back(range);
  }
  caches->shared.swap(shared);
  caches->intact = std::min(caches->intact, kept);
  if (caches->shared.empty()) caches->base.reset();
}

void Seats::fork(Caches* from, Caches* to, int64_t position, bool share) const {
  const std::vector<SessionBytes> parts = bytes_of(*from, position), copies = bytes_of(*to, position);
  Mapped mapped(parts.size());
  const bool large = std::any_of(parts_.begin(), parts_.end(), [&](const StatePart& part) { return part.row > 0 && part.bytes_at(position) >= kLeastMapped; });
  // what has come since `from` got its shared pages is copied while it is little
  const int64_t common = from->base ? std::min(from->intact, position) : 0;
  if (share && large && (position - common) * 4 <= position) {
    mapped = map(to, from->base, common);
  } else if (std::shared_ptr<SharedPages> pages = share && large ? SharedPages::of(parts) : nullptr) {
    const std::vector<SharedRange> before = from->shared;
    const Mapped mine = map(from, pages, position);
    for (size_t i = 0; i < parts.size(); ++i) {
      if (mine[i].first < mine[i].second) continue;
      for (const SharedRange& range : before)
        if (range.part == i) forget_pages(arena_of(*from, range.arena).data() + range.begin, range.end - range.begin);
      if (!pages->read(i, parts[i].data, parts[i].size)) from->damaged = true;
    }
    mapped = map(to, std::move(pages), position);
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    const auto [first, last] = mapped[i];
    std::memcpy(copies[i].data, parts[i].data, first);
    std::memcpy(copies[i].data + last, parts[i].data + last, parts[i].size - last);
  }
  to->reached = std::max(to->reached, position);
}

void Seats::write(Caches* caches, int64_t position) const {
  if (!caches->base || position >= caches->intact) return;
  if (position == 0) return clear(caches);
  // memory that nobody else may have takes more than it saves where most of it is not used any more
  const bool little = !caches->base->of_file() && position * 2 < caches->intact;
  own(caches, position, little ? 0 : position);
}

void Seats::clear(Caches* caches) const {
  for (size_t i = first_; i < arenas_->size(); ++i)
    if (seated_ == caches || !caches->parked.empty()) arena_of(*caches, i).forget();
  caches->base.reset();
  caches->shared.clear();
  caches->reached = caches->intact = 0;
  caches->damaged = false;
}

SharedUse::SharedUse(const Seats& seats, Caches& caches) {
  if (!caches.base || !caches.base->of_file()) return;
  for (size_t i = seats.first_; i < seats.arenas_->size(); ++i) {
    const Arena& arena = seats.arena_of(caches, i);
    guards_.emplace_back(arena.data(), arena.size(), true);
  }
}

bool SharedUse::held() const {
  return std::all_of(guards_.begin(), guards_.end(), [](const GuardedMemory& guard) { return guard.held(); });
}

bool SharedUse::lost() const {
  return std::any_of(guards_.begin(), guards_.end(), [](const GuardedMemory& guard) { return guard.lost(); });
}
