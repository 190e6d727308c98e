// What this machine's processor offers, by the names that instruction_sets.cmake uses after NEEDS.
#ifndef MOEC_CPU_H_
#define MOEC_CPU_H_

namespace moec {

// Whether the processor has all of `features` (names with single spaces between them) and the system saves their registers.
// True for no feature, false for an unknown one.
bool cpu_has(const char* features);

}  // namespace moec

#endif  // MOEC_CPU_H_
