// Checks the instructions of a method: each call names a known operator, with as many arguments of the kinds that its
// schema says, and writes only planned memory that no other argument uses. Shapes are left to the kernels, which
// check them at every call.
#ifndef MOEC_PROGRAM_CALLS_H_
#define MOEC_PROGRAM_CALLS_H_

#include <functional>
#include <string>
#include <vector>

#include "program_values.h"

namespace moec_program {

using Arguments = std::vector<const Value*>;

// Checks the arguments of a call of delegate `index`, and says which of them it writes; throws Damaged.
using DelegateCheck = std::function<std::vector<bool>(uint32_t index, const Arguments& arguments)>;

// Sees each call of an operator whose arguments are of the right kinds.
using CallSeen = std::function<void(const std::string& name, const Arguments& arguments)>;

// Throws Damaged at the first instruction that could crash this runtime. `values` are those of `plan`; the memory of
// views is filled in.
void check_calls(const Table& plan, std::vector<Value>& values, const DelegateCheck& delegate, const CallSeen& seen = {});

}  // namespace moec_program

#endif  // MOEC_PROGRAM_CALLS_H_
