// The structure checks of a .pte (program_check.h) on any bytes: no read outside them, no undefined arithmetic.
// An input is the program of a file, a piece of the file in which payloads of delegates lie, and four bytes that say where
// in the file the piece begins. The rest of the file, weights that the check does not read, reads as zeros.
// sources: runtime/runner/program_check.cpp runtime/runner/program_values.cpp runtime/runner/program_calls.cpp runtime/runner/xnnpack_check.cpp runtime/runner/operator_table.cpp
// seeds: pte
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "program_check.h"

namespace {

constexpr uint64_t kFile = 1 << 19;  // bytes of the file that an input stands for

// A copy in an allocation of exactly that length: AddressSanitizer finds reads past its end.
std::unique_ptr<uint8_t[]> copy(const uint8_t* data, uint64_t length) {
  std::unique_ptr<uint8_t[]> made(new uint8_t[length]);
  if (length > 0) std::memcpy(made.get(), data, length);
  return made;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const uint64_t length = program_length(data, size, size);
  if (length < 40 || size - length < 4) return 0;
  const uint64_t file = std::max<uint64_t>(size, kFile);
  const uint8_t* piece = data + length;
  const uint64_t piece_bytes = size - length - 4;
  uint32_t begin;
  std::memcpy(&begin, piece + piece_bytes, 4);
  const auto program = copy(data, length);
  std::vector<std::unique_ptr<uint8_t[]>> segments;  // they stay valid while the check runs
  ProgramView view = {program.get(), static_cast<size_t>(length), file, {}, {}};
  view.segment = [&](uint64_t offset, uint64_t bytes) -> const uint8_t* {
    if (offset > file || bytes > file - offset) return nullptr;
    segments.push_back(std::unique_ptr<uint8_t[]>(new uint8_t[bytes]()));
    uint8_t* found = segments.back().get();
    for (uint64_t i = 0; i < bytes; ++i) {
      const uint64_t at = offset + i - begin;  // before the piece it wraps around to a large number
      if (at < piece_bytes) found[i] = piece[at];
    }
    return found;
  };
  (void)program_fault(view);
  return 0;
}
