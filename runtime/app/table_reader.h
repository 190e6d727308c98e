// Reads numbers and texts from a part of a file; after a read beyond its end all others fail, too.
#ifndef MOEC_TABLE_READER_H_
#define MOEC_TABLE_READER_H_

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

class TableReader {
 public:
  TableReader(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  bool ok() const { return ok_; }
  bool at_end() const { return left_ == 0; }

  template <typename T>
  T number() {
    static_assert(std::is_trivially_copyable_v<T>);
    T value{};
    if (take(sizeof(T))) std::memcpy(&value, data_ - sizeof(T), sizeof(T));
    return value;
  }

  template <typename T>
  std::vector<T> numbers(size_t count) {
    std::vector<T> found;
    if (count > left_ / sizeof(T)) return fail(), found;
    found.resize(count);
    if (take(count * sizeof(T)) && count > 0) std::memcpy(found.data(), data_ - count * sizeof(T), count * sizeof(T));
    return found;
  }

  template <typename T>
  std::vector<T> rest() {
    if (left_ % sizeof(T) != 0) fail();
    return ok_ ? numbers<T>(left_ / sizeof(T)) : std::vector<T>();
  }

  // u32 length, the bytes, zeros up to a multiple of 4.
  std::string string() {
    const size_t size = number<uint32_t>(), padded = (size + 3) / 4 * 4;
    if (!take(padded)) return {};
    return std::string(reinterpret_cast<const char*>(data_ - padded), size);
  }

 private:
  void fail() {
    ok_ = false;
    left_ = 0;
  }
  bool take(size_t size) {
    if (!ok_ || size > left_) return fail(), false;
    data_ += size;
    left_ -= size;
    return true;
  }

  const uint8_t* data_;
  size_t left_;
  bool ok_ = true;
};

#endif  // MOEC_TABLE_READER_H_
