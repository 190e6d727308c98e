#include "core/scratch.h"

#include <cstdlib>

#include "moec_kernel.h"

namespace moec {
namespace {

struct Block {
  uint8_t* data = nullptr;
  size_t size = 0;
  ~Block() { release(); }
  void release() {
    std::free(data);
    data = nullptr;
    size = 0;
  }
};

thread_local Block block;

}  // namespace

uint8_t* scratch(size_t bytes) {
  if (bytes <= block.size && block.data) return block.data;
  block.release();
  const size_t wanted = (bytes + bytes / 4 + 4096) / 4096 * 4096;  // some slack, as token counts often grow slowly
  void* data = nullptr;
  if (posix_memalign(&data, 4096, wanted) != 0) return nullptr;
  block.data = static_cast<uint8_t*>(data);
  block.size = wanted;
  return block.data;
}

}  // namespace moec

void moec_release_scratch(void) {
  moec::block.release();
  moec::release_selection();
}
