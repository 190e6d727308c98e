// The inner loops that exist once per instruction set, as a table of function pointers. Every entry computes the same
// floats, bit for bit, on every instruction set: integer sums are exact, float sums have one fixed order, and fused
// multiply-adds stand where they are written.
#ifndef MOEC_ISA_H_
#define MOEC_ISA_H_

#include <cstdint>

namespace moec {

// Rows of int8 activations as the integer kernels read them.
struct QuantizedRows {
  int8_t* q = nullptr;            // [rows, stride], zero from k up to the padded k
  int64_t stride = 0;             // bytes
  float* scale = nullptr;         // [rows], or by block [parts, part_stride]: that of part p of row t at p * part_stride + t
  int32_t* correction = nullptr;  // [parts, part_stride]: -offset * (sum of q over the part's inputs)
  int64_t part_stride = 0;        // >= rows; a part is 32 inputs by block, else a group of the weights along the input, or
                                  // the whole row with groups along the output

  QuantizedRows from(int64_t row) const {
    return {q + row * stride, stride, scale + row, correction + row, part_stride};
  }
};

// Rounds `rows` rows of x to INT8 (compiler/quant.py: quantize_rows), after multiplying element k by factor[k] if there is
// one. A row (by block: a block of it) with a NaN or an infinity gets q = 0 and scale NaN, so that every output of it is NaN.
struct QuantizeTask {
  const float* x;       // [rows, x_stride]
  int64_t x_stride;     // elements
  int64_t rows;
  int64_t k;
  int64_t group;        // inputs a correction is summed over; 32 by block, whatever it says
  bool by_block;        // a scale for each 32 inputs
  int32_t offset;       // what the kernel adds to what codes stand for
  const float* factor;  // [k] or NULL
  float* temporary;     // [4, k padded to 64] when there is a factor
  QuantizedRows out;
};

// y [m, y_stride] = m rows of activations times `blocks` row blocks of a packed matrix (16 outputs each).
struct GemmTask {
  const uint8_t* codes;   // of the first block
  int64_t block_bytes;
  const uint8_t* scales;  // groups along in: of the first block, [groups, 16] f16 or f32
  bool f32_scales;
  int64_t blocks;
  int64_t outputs;        // <= 16 * blocks: outputs that exist
  int64_t padded_k;       // a multiple of 8
  int64_t group;          // inputs of a group; padded_k with groups along out
  int64_t m;
  QuantizedRows rows;     // integer kernels
  uint8_t* space;         // Kernels::gemm_space(padded_k) bytes, aligned to 64, where that is not NULL
  const float* x;         // float kernels: [m, x_stride], readable up to padded_k
  int64_t x_stride;
  const float* bias;      // [outputs] or NULL
  float* y;
  int64_t y_stride;
};

// y [m, y_stride] = x [m, x_stride] @ w[n, k]^T + bias, w row-major f32.
struct FloatGemmTask {
  const float* w;
  const float* x;
  int64_t x_stride;
  int64_t m, n, k;
  const float* bias;
  float* y;
  int64_t y_stride;
};

enum class Activation { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kRelu2 = 4 };

// hidden [rows, hidden_stride] from gate and up: element i of a row is gate[i * step] and up[i * step]; up NULL: no gate.
struct ActivateTask {
  const float* gate;
  const float* up;
  int64_t step;  // 1, or 2 when gate and up alternate
  int64_t stride;
  int64_t rows, width;
  Activation activation;
  float alpha, gate_min, gate_max, up_min, up_max, up_offset;
  float* hidden;
  int64_t hidden_stride;
};

struct ConvTask;  // isa/recurrent_tasks.h
struct DeltaTask;
struct ScanTask;

struct Kernels {
  // [kind - 1]: what the integer kernels add to what a code stands for. int4: 8 everywhere; FP4 and NL3: 16 at most, or
  // the corrections of their longest sums would leave 32 bits
  int32_t code_offset[5];

  void (*quantize)(const QuantizeTask&);
  // bytes that gemm_int8 needs beside its operands, for any number of rows; NULL: none
  int64_t (*gemm_space)(int64_t padded_k);
  // [kind - 1][axis_out][by_block]: by block each 32 inputs add fma(float(sum) * activation scale, weight scale, total), or
  // with groups along the output fma(float(sum), activation scale, total)
  void (*gemm_int8[5][2][2])(const GemmTask&);
  // [kind - 1][axis_out]
  void (*gemm_float[5][2])(const GemmTask&);
  void (*gemm_f32)(const FloatGemmTask&);
  void (*activate)(const ActivateTask&);
  void (*sigmoid)(const float* x, int64_t n, float* y);
  void (*exponential)(const float* x, int64_t n, float* y);
  void (*f16_to_f32)(const uint8_t* x, int64_t n, float* y);  // x of any alignment
  // y[i] = (accumulate ? y[i] : 0) + weight * x[i]   (one rounding for the product, one for the sum)
  void (*add_scaled)(const float* x, float weight, int64_t n, bool accumulate, float* y);
  void (*add)(const float* x, int64_t n, float* y);  // y[i] += x[i]
  void (*short_conv)(const ConvTask&);
  void (*gated_delta)(const DeltaTask&);
  void (*selective_scan)(const ScanTask&);
};

struct AttentionKernels;  // attention/attention_kernels.h

// One instruction set. instruction_sets.cmake lists them, isa.cpp holds the table.
struct Isa {
  const char* name;
  const Kernels& kernels;
  const AttentionKernels& attention;
};

// Every function of the C API that computes calls this first: it settles which instruction set serves, and fails with
// MOEC_UNSUPPORTED when MOEC_ISA names one that this machine does not have.
int32_t select_isa();

// The one that serves.
const Isa& isa();
inline const Kernels& kernels() { return isa().kernels; }

}  // namespace moec

#endif  // MOEC_ISA_H_
