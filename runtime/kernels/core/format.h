// The packed layout of one weight matrix, as arithmetic. moec_kernel.h describes it in words.
#ifndef MOEC_FORMAT_H_
#define MOEC_FORMAT_H_

#include <cstdint>

#include "core/levels.h"
#include "moec_kernel.h"

namespace moec {

constexpr int64_t kBlockRows = 16;  // rows that are interleaved: one 512-bit register of int32 lanes
constexpr int64_t kUnit = 8;        // inputs that are interleaved: 64 bytes of 4-bit codes for 16 rows
constexpr int64_t kActivationBlock = 32;  // inputs of a token that share a scale with block_activations

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

struct Format {
  int32_t kind = MOEC_F32;
  bool axis_out = false;
  bool int8_activations = false;
  bool f32_scales = false;
  bool block_activations = false;  // only with int8_activations
  int64_t group = 0;

  int64_t scale_bytes() const { return f32_scales ? 4 : 2; }
  int64_t unit_bytes() const { return unit_bytes_of(kind); }  // 16 rows x 8 inputs
};

// A matrix inside a caller's buffer. All sizes have been checked against the buffer.
struct Matrix {
  Format format;
  int64_t n = 0;
  int64_t k = 0;
  const uint8_t* data = nullptr;

  int64_t padded_k() const { return round_up(k, kUnit); }
  int64_t blocks() const { return divide_up(n, kBlockRows); }
  int64_t block_bytes() const { return padded_k() / kUnit * format.unit_bytes(); }
  int64_t groups() const { return format.axis_out ? n / format.group : k / format.group; }
  // Parts of a row of rounded activations: each has a correction, and with block_activations a scale.
  int64_t parts() const {
    if (format.block_activations) return divide_up(k, kActivationBlock);
    return format.kind == MOEC_F32 || format.axis_out ? 1 : groups();
  }
  int64_t scales_of_row() const { return format.block_activations ? parts() : 1; }
  const uint8_t* codes(int64_t block) const { return data + block * block_bytes(); }
  const uint8_t* all_scales() const { return data + blocks() * block_bytes(); }
  // axis in: the [groups, 16] scales of a row block
  const uint8_t* block_scales(int64_t block) const {
    return all_scales() + block * groups() * kBlockRows * format.scale_bytes();
  }
  // axis out: the [padded_k] scales of an output group
  const uint8_t* group_scales(int64_t group) const { return all_scales() + group * padded_k() * format.scale_bytes(); }
  // Row blocks that a call should not split: with groups along the output they share rounded activations.
  int64_t blocks_together() const { return format.axis_out ? format.group / kBlockRows : 1; }
};

// The fields of `format`, checked for an n x k matrix of codes or floats; a failure's message begins with `name`.
int32_t decode_format(const char* name, int32_t format, int64_t n, int64_t k, Format* out);

// Length of one packed matrix.
int32_t packed_bytes(const char* name, int64_t n, int64_t k, const Format& format, uint64_t* bytes);

// `count` packed matrices fill the buffer exactly; *first is set to the first, *stride to the distance of the next.
int32_t open_matrices(const char* name, int64_t count, int64_t n, int64_t k, int32_t format, moec_in buffer, Matrix* first,
                      uint64_t* stride);

}  // namespace moec

#endif  // MOEC_FORMAT_H_
