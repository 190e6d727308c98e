// What this machine's processor offers, by the names that instruction_sets.cmake uses after NEEDS.
#ifndef MOEC_CPU_H_
#define MOEC_CPU_H_

namespace moec {

// Whether the processor, and the system that saves its registers, has all of `features`: names between single spaces; none
// is always there, an unknown one never.
bool cpu_has(const char* features);

}  // namespace moec

#endif  // MOEC_CPU_H_
