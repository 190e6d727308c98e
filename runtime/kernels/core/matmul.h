// Products of a tile of activation rows with some row blocks of a packed matrix, of any format.
#ifndef MOEC_MATMUL_H_
#define MOEC_MATMUL_H_

#include <cstdint>

#include "core/format.h"
#include "isa/isa.h"
#include "core/scratch.h"

namespace moec {

// The activations of `m` rows. `q` is needed where needs_quantized(format), else `x`.
struct Rows {
  int64_t m = 0;
  const float* x = nullptr;
  int64_t x_stride = 0;
  QuantizedRows q;
};

// Integer arithmetic with groups along the input: the caller rounds the rows once, for all blocks.
inline bool needs_quantized(const Format& f) { return f.kind != MOEC_F32 && f.int8_activations && !f.axis_out; }

inline int32_t code_offset(const Kernels& isa, const Format& f) { return isa.code_offset[f.kind - 1]; }

// Distance of rounded rows: not a power of two, so that a tile's rows do not compete for the same cache lines.
inline int64_t quantized_stride(int64_t padded_k) { return round_up(padded_k, 64) + 64; }

// Places for `rows` rounded rows of k inputs, and their addresses once the block is there.
struct QuantizedPlan {
  size_t q = 0, scale = 0, correction = 0;
  int64_t stride = 0, rows = 0;

  // `scales` and `parts` of a row: Matrix::scales_of_row, Matrix::parts
  void add(ScratchPlan& plan, int64_t row_count, int64_t padded_k, int64_t scales, int64_t parts) {
    stride = quantized_stride(padded_k);
    rows = row_count;
    q = plan.add<int8_t>(rows * stride);
    scale = plan.add<float>(rows * scales);
    correction = plan.add<int32_t>(rows * parts);
  }
  void add(ScratchPlan& plan, int64_t row_count, const Matrix& w) {
    add(plan, row_count, w.padded_k(), w.scales_of_row(), w.parts());
  }
  QuantizedRows at(uint8_t* base) const {
    return {reinterpret_cast<int8_t*>(base + q), stride, reinterpret_cast<float*>(base + scale),
            reinterpret_cast<int32_t*>(base + correction), rows};
  }
};

// Prefetches the first codes of these blocks into cache; called while other work precedes their product.
void prefetch_blocks(const Matrix& w, int64_t first, int64_t last);

// Rounds rows for a matrix where needs_quantized(matrix.format).
void quantize_for(const Kernels& isa, const Matrix& w, const float* x, int64_t x_stride, int64_t rows, QuantizedRows out);

// What one worker needs besides: the rounded (or scaled) activations of one output group, and the integer kernels' own space.
class MatmulScratch {
 public:
  // Room for matrix `w`; call for each matrix that the worker will meet.
  void need(const Kernels& isa, const Matrix& w);
  void add(ScratchPlan& plan);
  void place(uint8_t* base);

 private:
  friend void matmul(const Kernels&, const Matrix&, int64_t, int64_t, const Rows&, const float*, float*, int64_t,
                     const MatmulScratch&);
  bool used_ = false, float_ = false;
  int64_t padded_k_ = 0, parts_ = 1, space_bytes_ = 0;
  size_t factor_offset_ = 0, temporary_offset_ = 0, scaled_offset_ = 0, space_offset_ = 0;
  QuantizedPlan plan_;
  float* factor_ = nullptr;
  float* temporary_ = nullptr;
  float* scaled_ = nullptr;
  uint8_t* space_ = nullptr;
  QuantizedRows rows_;
};

// Outputs of blocks [first, last) for every row: y[m * y_stride + i] is output 16 * first + i. `bias` is that of output 0 of
// the matrix, or NULL. first and last are multiples of w.blocks_together(), or last is the end.
void matmul(const Kernels& isa, const Matrix& w, int64_t first, int64_t last, const Rows& rows, const float* bias, float* y,
            int64_t y_stride, const MatmulScratch& scratch);

}  // namespace moec

#endif  // MOEC_MATMUL_H_
