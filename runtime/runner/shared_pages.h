// Pages that sequences begin with, until they write there: the states of a saved session's file, or memory in which a fork leaves them
// to its origin and to itself. A sequence copies a page before it writes it (Seats::write), so that no mapped page ever differs from
// the file's: the system would drop such a page when the file is cut.
#ifndef MOEC_SHARED_PAGES_H_
#define MOEC_SHARED_PAGES_H_

#include <sys/stat.h>
#include <time.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

// The memory of a part of the states; `offset`: where it begins in its arena.
struct SessionBytes {
  uint8_t* data;
  size_t size, offset;
};

// Parts of at least this size are worth mappings of their own.
constexpr size_t kLeastMapped = size_t{32} << 10;
// Where each part begins in a file whose states begin at `at`, and behind them where the last ends. Parts that may be mapped lie as
// in their arena, modulo the largest page of phones.
std::vector<uint64_t> places_of(const std::vector<SessionBytes>& parts, uint64_t at);

// Gives pages back, whatever was mapped there; what is read next is zero.
void forget_pages(uint8_t* data, size_t size);

class SharedPages {
 public:
  // `matches`: whether the file still holds what was checked when it was opened; asked when its time of change is another.
  SharedPages(int descriptor, std::vector<uint64_t> places, std::function<bool(int descriptor)> matches);
  ~SharedPages();
  SharedPages(const SharedPages&) = delete;
  SharedPages& operator=(const SharedPages&) = delete;

  // A copy of the parts in memory of its own, by all workers; nullptr where the system has none of this kind.
  static std::shared_ptr<SharedPages> of(const std::vector<SessionBytes>& parts);

  // Maps the whole pages among the first `size` bytes of a part over those at `data`: [first, last) of the part's bytes. Nobody may
  // write there. Empty where they are too few, or the system cannot; the memory may read as zero then.
  std::pair<size_t, size_t> map(size_t part, uint8_t* data, size_t size) const;
  // The first `size` bytes of a part into memory; false where they cannot be read.
  bool read(size_t part, uint8_t* data, size_t size) const;
  // Whether somebody else can cut the file, so that reading mapped pages may fail.
  bool of_file() const { return matches_ != nullptr; }
  // Whether the file was cut, or has other contents than it had.
  bool changed();

 private:
  static timespec written(const struct stat& status);
  void stamp();

  int descriptor_;
  std::vector<uint64_t> places_;
  std::function<bool(int)> matches_;  // none: memory that nobody else can write
  struct stat status_ = {};
  bool certain_ = false;  // whether another time of change would tell that the file was written since
  bool changed_ = false;  // for all sequences that share it, whichever saw it first
};

#endif  // MOEC_SHARED_PAGES_H_
