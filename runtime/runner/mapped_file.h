// A file mapped for reading that may be truncated while it is in use: the missing pages then read as zeros and `truncated()`
// is true, instead of a SIGBUS that ends the process.
#ifndef MOEC_MAPPED_FILE_H_
#define MOEC_MAPPED_FILE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

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
  MappedFile(int descriptor, const uint8_t* data, uint64_t size) : descriptor_(descriptor), data_(data), size_(size) {}

  int descriptor_;
  const uint8_t* data_;
  uint64_t size_;
  int slot_ = -1;  // in the table of the signal handler
};

#endif  // MOEC_MAPPED_FILE_H_
