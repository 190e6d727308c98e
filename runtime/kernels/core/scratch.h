// Scratch memory of an operator call: one block per calling thread that grows to the largest need and is then reused, so
// that a steady state allocates nothing.
#ifndef MOEC_SCRATCH_H_
#define MOEC_SCRATCH_H_

#include <cstddef>
#include <cstdint>

namespace moec {

// Adds up what a call needs; every part starts at a multiple of 64 bytes.
class ScratchPlan {
 public:
  template <typename T>
  size_t add(int64_t count) {
    const size_t offset = total_;
    total_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return offset;
  }
  size_t total() const { return total_; }

 private:
  size_t total_ = 0;
};

// Frees the memory that moe.cpp keeps for the calling thread beside the scratch.
void release_selection();

// At least `bytes` bytes, 64-byte aligned, valid until the next call on this thread; NULL when memory is short.
uint8_t* scratch(size_t bytes);

}  // namespace moec

#endif  // MOEC_SCRATCH_H_
