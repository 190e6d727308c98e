// The structure checks of a .pte (program_check.h) on any bytes: no read outside them, no undefined arithmetic.
// sources: runtime/runner/program_check.cpp runtime/runner/program_values.cpp runtime/runner/program_calls.cpp runtime/runner/xnnpack_check.cpp runtime/runner/operator_table.cpp
#include <cstdint>
#include <memory>

#include "program_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const uint64_t length = program_length(data, size, size);
  if (length < 40) return 0;
  // a block of exactly that length: what is read behind it is found
  const std::unique_ptr<uint8_t[]> program(new uint8_t[length]);
  for (uint64_t i = 0; i < length; ++i) program[i] = data[i];
  ProgramView view = {program.get(), static_cast<size_t>(length), size, {}, {}};
  view.segment = [&](uint64_t offset, uint64_t bytes) { return offset <= size && bytes <= size - offset ? data + offset : nullptr; };
  (void)program_fault(view);
  return 0;
}
