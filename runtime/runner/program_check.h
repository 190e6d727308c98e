// Checks the structure of a .pte that ExecuTorch takes on trust. Everything about a program that this runtime believes is
// checked here, once, when the file is opened; the bytes that were checked are those that are run (program_file.h).
#ifndef MOEC_PROGRAM_CHECK_H_
#define MOEC_PROGRAM_CHECK_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

// Gives `length` bytes of the file at `offset`, which stay valid and the same while the model is open; nullptr: not there.
using ReadSegment = std::function<const uint8_t*(uint64_t offset, uint64_t length)>;

// The constants of a call of moec::fused_moe_packed: its config list, and where w13 and w2 of all experts lie in the file.
struct MoeCall {
  std::vector<int64_t> config;
  uint64_t offset[2], bytes[2];
};

// What the check of a program finds besides faults.
struct ProgramFacts {
  std::vector<MoeCall> moe_calls;  // of the method forward, in order
  uint64_t constant_bytes = 0;
};

struct ProgramView {
  const uint8_t* program;  // the flatbuffer with its extended header
  size_t program_bytes;
  uint64_t file_bytes;
  ReadSegment segment;
  // The payload of delegates of this backend is not looked into; empty: XNNPACK's, and no other is allowed.
  std::string trusted_backend;
};

// "" if this runtime survives the program, whatever numbers it computes; else what is wrong, in one line.
std::string program_fault(const ProgramView& view, ProgramFacts* facts = nullptr);

// The length of the flatbuffer as the file's first 64 bytes say it, 0 if they are no ExecuTorch program.
uint64_t program_length(const uint8_t* head, size_t bytes, uint64_t file_bytes);

#endif  // MOEC_PROGRAM_CHECK_H_
