// Files that may be truncated while they are mapped: missing pages then read as zeros, and the owner learns of it, instead of a
// SIGBUS that ends the process.
#ifndef MOEC_MAPPED_FILE_H_
#define MOEC_MAPPED_FILE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

// Memory in which pages of files may be missing, while this exists.
class GuardedMemory {
 public:
  GuardedMemory(const void* data, uint64_t size, bool writable);
  ~GuardedMemory();
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  bool held() const { return slot_ >= 0; }  // false where too many are guarded: a missing page ends the process
  bool lost() const;                        // whether a page was missing

 private:
  int slot_;
};

// A file mapped for reading.
class MappedFile {
 public:
  static std::unique_ptr<MappedFile> open(const std::string& path, std::string* fault);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }
  int descriptor() const { return descriptor_; }
  // Keeps the system from mapping a page of [begin, end) along with a neighbour, as a part of one huge page.
  void forbid_huge_pages(uint64_t begin, uint64_t end) const;
  // Copies a part of the file with the system's read; false where it is not all there.
  bool read(uint64_t offset, uint64_t size, void* out) const;
  // Whether pages were missing, or the file is shorter now than it was.
  bool truncated() const;

 private:
  MappedFile(int descriptor, const uint8_t* data, uint64_t size)
      : descriptor_(descriptor), data_(data), size_(size), guard_(std::in_place, data, size, false) {}

  int descriptor_;
  const uint8_t* data_;
  uint64_t size_;
  std::optional<GuardedMemory> guard_;  // ends before the mapping does
};

#endif  // MOEC_MAPPED_FILE_H_
