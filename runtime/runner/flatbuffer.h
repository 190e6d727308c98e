// A flatbuffer reader that trusts nothing: every read is checked against the end of the buffer. Field numbers count the
// fields of a table in the order of its schema; a union takes two, its kind and its table.
#ifndef MOEC_FLATBUFFER_H_
#define MOEC_FLATBUFFER_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace moec_flatbuffer {

struct Damaged : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Buffer {
 public:
  Buffer(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  size_t size() const { return size_; }

  template <typename T>
  T at(size_t offset) const {
    if (offset > size_ || size_ - offset < sizeof(T)) throw Damaged("an offset outside the program");
    T value;
    std::memcpy(&value, data_ + offset, sizeof value);  // little endian, as all machines this runs on
    return value;
  }
  size_t follow(size_t offset) const { return offset + at<uint32_t>(offset); }
  const uint8_t* bytes(size_t offset, size_t length) const {
    if (offset > size_ || size_ - offset < length) throw Damaged("an offset outside the program");
    return data_ + offset;
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

// Elements of one width, all inside the buffer.
struct Vector {
  const Buffer* buffer = nullptr;
  size_t first = 0;
  uint32_t size = 0;

  template <typename T>
  T get(uint32_t i) const {
    return buffer->at<T>(first + sizeof(T) * size_t{i});
  }
};

class Table {
 public:
  Table(const Buffer& buffer, size_t offset) : buffer_(&buffer), offset_(offset) {
    const int64_t vtable = static_cast<int64_t>(offset) - buffer.at<int32_t>(offset);
    if (vtable < 0) throw Damaged("an offset outside the program");
    vtable_ = static_cast<size_t>(vtable);
    slots_ = buffer.at<uint16_t>(vtable_);
  }
  bool has(int field) const { return place(field) != 0; }
  // The number of a field; `absent` where it is not stored, as the schema has it.
  template <typename T>
  T number(int field, T absent = T{0}) const {
    const size_t at = place(field);
    return at ? buffer_->at<T>(at) : absent;
  }
  Table table(int field, const char* what) const {
    const size_t at = place(field);
    if (!at) throw Damaged(std::string(what) + " is missing");
    return Table(*buffer_, buffer_->follow(at));
  }
  // An absent vector is an empty one. `width`: bytes of an element.
  Vector vector(int field, size_t width) const {
    const size_t at = place(field);
    if (!at) return {buffer_, 0, 0};
    const size_t start = buffer_->follow(at);
    const uint32_t size = buffer_->at<uint32_t>(start);
    buffer_->bytes(start + 4, size_t{size} * width);
    return {buffer_, start + 4, size};
  }
  Vector required(int field, size_t width, const char* what) const {
    if (!has(field)) throw Damaged(std::string(what) + " is missing");
    return vector(field, width);
  }
  Table element(const Vector& v, uint32_t i) const { return Table(*buffer_, buffer_->follow(v.first + size_t{4} * i)); }
  // A required string without zero bytes, so that C functions read all of it.
  std::string text(int field, const char* what) const {
    const Vector chars = required(field, 1, what);
    std::string value(reinterpret_cast<const char*>(buffer_->bytes(chars.first, chars.size)), chars.size);
    if (value.find('\0') != std::string::npos) throw Damaged(std::string(what) + " has a zero inside");
    return value;
  }

 private:
  size_t place(int field) const {
    const size_t slot = 4 + 2 * static_cast<size_t>(field);
    if (slot + 2 > slots_) return 0;
    const uint16_t offset = buffer_->at<uint16_t>(vtable_ + slot);
    return offset ? offset_ + offset : 0;
  }

  const Buffer* buffer_;
  size_t offset_, vtable_ = 0, slots_ = 0;
};

}  // namespace moec_flatbuffer

#endif  // MOEC_FLATBUFFER_H_
