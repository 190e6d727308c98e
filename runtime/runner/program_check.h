// `program_fault`, the whole check of a .pte's program, run once when the file is opened: header, segments, constants, named
// data and methods here; values by program_values.h, calls by program_calls.h, delegates by xnnpack_check.h. It covers what
// ExecuTorch takes on trust, so that a damaged file cannot crash the process. It reads no weights and no digests, and knows
// nothing of what a method means: moec_runtime.cpp checks signatures. The bytes that were checked are those that run
// (program_file.h).
#ifndef MOEC_PROGRAM_CHECK_H_
#define MOEC_PROGRAM_CHECK_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

// Gives `length` bytes of the file at `offset`, which stay valid and the same while the model is open; nullptr: not there.
using ReadSegment = std::function<const uint8_t*(uint64_t offset, uint64_t length)>;

// The constants of a call of moec::fused_moe_packed: its config list, and where w13 and w2 of all experts lie in the file,
// and the router's weight, bias and selection bias (no bytes: absent, or not a constant).
struct MoeCall {
  enum { kWeight, kBias, kSelectionBias, kRouterParts };
  std::vector<int64_t> config;
  uint64_t offset[2], bytes[2];
  uint64_t router_offset[kRouterParts], router_bytes[kRouterParts];
  bool router_known;  // every part that is there is a constant
};

// Facts of the program that the check collects on the way.
struct ProgramFacts {
  std::vector<MoeCall> moe_calls;  // of the methods forward and forward_all, in order
  uint64_t constant_bytes = 0;
  bool exact_calls = true;  // nothing sums in an order that depends on how many tokens a call has, as libraries' products may
};

struct ProgramView {
  const uint8_t* program;  // the flatbuffer with its extended header
  size_t program_bytes;
  uint64_t file_bytes;
  ReadSegment segment;
  // The payload of delegates of this backend is not looked into; empty: XNNPACK's, and no other is allowed.
  std::string trusted_backend;
};

// "" if running the program cannot crash this runtime, whatever numbers it computes; else the fault, in one line.
std::string program_fault(const ProgramView& view, ProgramFacts* facts = nullptr);

// The length of the flatbuffer as the file's first 64 bytes say it, 0 if they are no ExecuTorch program.
uint64_t program_length(const uint8_t* head, size_t bytes, uint64_t file_bytes);

#endif  // MOEC_PROGRAM_CHECK_H_
