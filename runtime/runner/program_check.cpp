// The program part of a .pte is a flatbuffer (ExecuTorch's schema/program.fbs; the field numbers below count the fields of
// its tables in order, a union takes two). ExecuTorch's verifier makes sure that offsets stay inside the buffer, but not
// that an instruction's operator is one of the list, and follows the index all the same.
#include "program_check.h"

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

namespace {

// A program of a hundred layers takes a few megabytes.
constexpr size_t kLargestProgram = size_t{1} << 28;

struct Damaged : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A flatbuffer of which nothing is believed: every read is checked against its end.
class Buffer {
 public:
  explicit Buffer(std::vector<uint8_t> bytes) : bytes_(std::move(bytes)) {}

  template <typename T>
  T at(size_t offset) const {
    if (offset > bytes_.size() || bytes_.size() - offset < sizeof(T)) throw Damaged("an offset outside the program");
    T value;
    std::memcpy(&value, bytes_.data() + offset, sizeof value);  // little endian, as all machines this runs on
    return value;
  }
  size_t follow(size_t offset) const { return offset + at<uint32_t>(offset); }

 private:
  std::vector<uint8_t> bytes_;
};

struct Vector {
  const Buffer* buffer;
  size_t first;
  uint32_t size;

  int32_t number(uint32_t i) const { return buffer->at<int32_t>(first + size_t{4} * i); }
};

class Table {
 public:
  Table(const Buffer& buffer, size_t offset) : buffer_(&buffer), offset_(offset) {
    const int64_t vtable = static_cast<int64_t>(offset) - buffer.at<int32_t>(offset);
    if (vtable < 0) throw Damaged("an offset outside the program");
    vtable_ = static_cast<size_t>(vtable);
  }
  bool has(int field) const { return place(field) != 0; }
  // The number of a field; 0 where it is absent, as the schema has it.
  template <typename T>
  T number(int field) const {
    const size_t at = place(field);
    return at ? buffer_->at<T>(at) : T{0};
  }
  Table table(int field) const {
    const size_t at = place(field);
    if (!at) throw Damaged("a part is missing");
    return Table(*buffer_, buffer_->follow(at));
  }
  // An absent vector is an empty one.
  Vector vector(int field) const {
    const size_t at = place(field);
    if (!at) return {buffer_, 0, 0};
    const size_t start = buffer_->follow(at);
    return {buffer_, start + 4, buffer_->at<uint32_t>(start)};
  }
  Table element(const Vector& v, uint32_t i) const { return Table(*buffer_, buffer_->follow(v.first + size_t{4} * i)); }

 private:
  size_t place(int field) const {
    const size_t slot = 4 + 2 * static_cast<size_t>(field);
    if (slot + 2 > buffer_->at<uint16_t>(vtable_)) return 0;
    const uint16_t offset = buffer_->at<uint16_t>(vtable_ + slot);
    return offset ? offset_ + offset : 0;
  }

  const Buffer* buffer_;
  size_t offset_, vtable_;
};

void check_index(int64_t index, uint32_t count, const char* what) {
  if (index < 0 || index >= count)
    throw Damaged("an instruction names " + std::string(what) + " " + std::to_string(index) + " of " + std::to_string(count));
}

struct Counts {
  uint32_t values, operators, delegates, instructions;
};

void check_arguments(const Table& call, const Counts& counts) {
  const Vector arguments = call.vector(1);
  for (uint32_t i = 0; i < arguments.size; ++i) check_index(arguments.number(i), counts.values, "value");
}

void check_instruction(const Table& instruction, const Counts& counts) {
  enum Kind : uint8_t { kKernel = 1, kDelegate, kMove, kJumpFalse, kFree };
  const uint8_t kind = instruction.number<uint8_t>(0);
  if (kind < kKernel || kind > kFree) throw Damaged("an instruction of no known kind");
  const Table call = instruction.table(1);
  const int64_t first = call.number<int32_t>(0), second = kind == kMove || kind == kJumpFalse ? call.number<int32_t>(1) : 0;
  switch (kind) {
    case kKernel:
      check_index(first, counts.operators, "operator");
      return check_arguments(call, counts);
    case kDelegate:
      check_index(first, counts.delegates, "delegate");
      return check_arguments(call, counts);
    case kMove:
      check_index(first, counts.values, "value");
      return check_index(second, counts.values, "value");
    case kJumpFalse:
      check_index(first, counts.values, "value");
      return check_index(second, counts.instructions + 1, "instruction");  // one past the last ends the method
    default:
      return check_index(first, counts.values, "value");
  }
}

void check_plan(const Table& plan) {
  enum Field { kValues = 2, kChains = 5, kOperators = 6, kDelegates = 7 };
  Counts counts = {plan.vector(kValues).size, plan.vector(kOperators).size, plan.vector(kDelegates).size, 0};
  const Vector operators = plan.vector(kOperators);
  for (uint32_t i = 0; i < operators.size; ++i)
    if (!plan.element(operators, i).has(0)) throw Damaged("an operator without a name");
  const Vector chains = plan.vector(kChains);
  for (uint32_t c = 0; c < chains.size; ++c) {
    const Table chain = plan.element(chains, c);
    const Vector instructions = chain.vector(2);
    counts.instructions = instructions.size;
    for (uint32_t i = 0; i < instructions.size; ++i) check_instruction(chain.element(instructions, i), counts);
  }
}

// The flatbuffer: as long as the extended header says, or the whole file of a program without one.
std::vector<uint8_t> read_program(FILE* file) {
  uint8_t head[24] = {};
  if (std::fread(head, 1, sizeof head, file) != sizeof head) throw Damaged("it is too short");
  uint64_t length = 0;
  if (std::memcmp(head + 8, "eh00", 4) == 0) std::memcpy(&length, head + 16, sizeof length);
  if (!length) length = std::fseek(file, 0, SEEK_END) == 0 ? static_cast<uint64_t>(std::ftell(file)) : 0;
  std::vector<uint8_t> bytes(static_cast<size_t>(length < kLargestProgram ? length : kLargestProgram));
  std::rewind(file);
  bytes.resize(std::fread(bytes.data(), 1, bytes.size(), file));
  return bytes;
}

}  // namespace

std::string program_fault(const std::string& path) {
  std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) return "it cannot be read";
  try {
    const Buffer buffer(read_program(file.get()));
    const Table program(buffer, buffer.follow(0));
    const Vector plans = program.vector(1);
    for (uint32_t i = 0; i < plans.size; ++i) check_plan(program.element(plans, i));
  } catch (const Damaged& damage) {
    return damage.what();
  }
  return "";
}
