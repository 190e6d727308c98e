// Checks the payload of an XNNPACK delegate where its compiler in ExecuTorch takes it on trust.
#ifndef MOEC_XNNPACK_CHECK_H_
#define MOEC_XNNPACK_CHECK_H_

#include <vector>

#include "program_calls.h"

namespace moec_program {

// What a call of the delegate must look like: the tensor that argument `i` stands for.
struct DelegatePort {
  bool output = false, used = false;
  std::vector<uint32_t> sizes;  // upper bounds
};

// Throws Damaged. `payload` is an XNNHeader with its flatbuffer (backends/xnnpack/serialization/schema.fbs).
std::vector<DelegatePort> check_xnnpack(const uint8_t* payload, size_t bytes, const Layout& layout);

// The arguments of a call against the ports; which of them are written.
std::vector<bool> check_ports(const std::vector<DelegatePort>& ports, const Arguments& arguments);

}  // namespace moec_program

#endif  // MOEC_XNNPACK_CHECK_H_
