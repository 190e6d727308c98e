// The states (KV caches and others) of many sequences over one program. A program's tensors have fixed addresses: the
// states of the running sequence are there (its seat), those of all others are kept elsewhere (parked).
#ifndef MOEC_CACHES_H_
#define MOEC_CACHES_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "mapped_file.h"
#include "shared_pages.h"

// Anonymous pages that cost nothing until they are touched: an unused part of a context, or the logits of forward_all in a
// session that never asks for them, takes no memory.
class Arena {
 public:
  explicit Arena(size_t size);
  Arena(Arena&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  Arena& operator=(Arena&&) = delete;
  ~Arena();
  uint8_t* data() const { return data_; }  // nullptr: no address space
  size_t size() const { return size_; }
  void forget();  // gives the pages back; what is read next is zero

 private:
  uint8_t* data_;
  size_t size_;
};

// A state in the arenas. `row` > 0: bytes of a position, of which the first `position` count; 0: all of its bytes do.
struct StatePart {
  size_t arena, offset, bytes, row;
  size_t bytes_at(int64_t position) const { return row ? row * static_cast<size_t>(position) : bytes; }
};

// Pages of an arena, among those of a part of the states, that are mapped from `Caches::base`.
struct SharedRange {
  size_t part, arena, begin, end;
};

// The caches of one sequence. Empty where they have never been parked.
struct Caches {
  std::vector<Arena> parked;
  int64_t reached = 0;  // positions that hold something: as far as a switch must carry them
  // what the sequence begins with where others have it, too
  std::shared_ptr<SharedPages> base;
  std::vector<SharedRange> shared;  // in the order of their addresses
  int64_t intact = 0;               // positions at the beginning that are those of `base`
  bool damaged = false;             // pages of a file were missing

  void swap(Caches& other);
};

class Seats {
 public:
  // `arenas` outlive this. The parts lie inside them.
  void set(std::vector<Arena>* arenas, size_t first, std::vector<StatePart> parts);
  void begin(Caches* caches) { seated_ = caches; }  // the first sequence, whose caches are there already
  const std::vector<StatePart>& parts() const { return parts_; }
  size_t bytes_at(int64_t position) const;

  // Address space for a sequence of its own; false where there is none.
  bool reserve(Caches* caches) const;
  // Brings the caches of a sequence to where the program reads them; false: no address space, and nothing has changed.
  bool seat(Caches* caches);
  // Forgets a sequence that is closed.
  void leave(Caches* caches);
  // Where a part is now; the caches must be reserved or seated.
  uint8_t* at(const Caches& caches, const StatePart& part) const;
  // The memory of the states that is in use at `position`.
  std::vector<SessionBytes> bytes_of(const Caches& caches, int64_t position) const;
  // Maps what can be mapped of the first `position` positions, which are those of `pages`, into a sequence that shares no more than
  // these with others; for each part the range of its bytes that is there then. The others are the caller's business.
  using Mapped = std::vector<std::pair<size_t, size_t>>;
  Mapped map(Caches* caches, std::shared_ptr<SharedPages> pages, int64_t position) const;
  // The first `position` positions of one sequence into another that has none: shared where that saves something and `share` allows it,
  // else copied.
  void fork(Caches* from, Caches* to, int64_t position, bool share) const;
  // The sequence is about to be written from `position` on: pages there become its own.
  void write(Caches* caches, int64_t position) const;
  // Gives back all pages of a sequence, shared or not; what is read next is zero.
  void clear(Caches* caches) const;


 private:
  friend class SharedUse;
  Arena& arena_of(Caches& caches, size_t arena) const;
  void own(Caches* caches, int64_t position, int64_t kept) const;
  void move(Caches& caches, Arena& from, Arena& to, size_t arena) const;
  void move_range(Caches& caches, Arena& from, Arena& to, size_t arena, size_t begin, size_t end, bool shared) const;

  std::vector<Arena>* arenas_ = nullptr;
  size_t first_ = 0;  // arenas before it hold activations
  std::vector<StatePart> parts_;
  Caches* seated_ = nullptr;
};

// While it exists a missing page of the file that a sequence shares is no signal; lost() then says so.
class SharedUse {
 public:
  SharedUse(const Seats& seats, Caches& caches);
  bool held() const;  // false where too many are in use at once
  bool lost() const;

 private:
  std::deque<GuardedMemory> guards_;
};

#endif  // MOEC_CACHES_H_
