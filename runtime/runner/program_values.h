// Reads and checks the values of a method: numbers, lists, and tensors whose memory must lie inside its arena or the
// file. Which operator uses a value, and how, is checked by program_calls.h.
#ifndef MOEC_PROGRAM_VALUES_H_
#define MOEC_PROGRAM_VALUES_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "flatbuffer.h"

namespace moec_program {

using moec_flatbuffer::Buffer;
using moec_flatbuffer::Damaged;
using moec_flatbuffer::Table;
using moec_flatbuffer::Vector;

// The parts of a file that its program may use: segments as offset and length in the file, and lengths of constants.
struct Layout {
  struct Part {
    uint64_t offset, bytes;
  };
  std::vector<Part> segments;
  std::vector<uint64_t> constants;          // bytes from the constant's start to the end of its segment; [0] is none
  Part constant_segment = {0, 0};           // in the file
  std::vector<Part> inline_payloads;        // of delegates, as offsets in the program itself
  std::map<std::string, Part> named;        // named data, offset and length in the file
  uint64_t list_items = 0;                  // of all lists so far: they share bytes, but not the memory they take
};

enum class Kind : uint8_t { kNone, kNull, kInt, kBool, kDouble, kTensor, kString, kInts, kDoubles, kBools, kTensors, kOptionals };

// Bytes that a tensor uses: of an arena, or of the file if it is a constant. kFresh: memory that the caller or a view gives.
struct Region {
  enum Where : uint8_t { kFresh, kInput, kPlanned, kConstant } where = kFresh;
  uint32_t arena = 0;
  uint64_t begin = 0, end = 0;

  bool overlaps(const Region& other) const {
    return where == other.where && where == kPlanned && arena == other.arena && begin < other.end && other.begin < end;
  }
};

struct Value {
  Kind kind = Kind::kNull;
  int64_t number = 0;              // of kInt
  bool set = false;                // a number that an instruction writes (check_calls)
  std::vector<int32_t> items;      // values that a list of ints or tensors names; -1: none
  int8_t type = 0;                 // of a tensor, as torch numbers its types
  std::vector<int32_t> sizes;
  uint64_t bytes = 0;
  bool dynamic = false;
  Region memory;
};

// Throws Damaged at the first value that could crash ExecuTorch. `plan`: a table ExecutionPlan.
std::vector<Value> read_values(const Table& plan, Layout& layout);

}  // namespace moec_program

#endif  // MOEC_PROGRAM_VALUES_H_
