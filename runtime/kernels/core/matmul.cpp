#include "core/matmul.h"

namespace moec {
namespace {

constexpr int64_t kTile = 48;               // rows whose activations are rounded together for one output group
constexpr int64_t kAhead = int64_t{16} << 10;  // bytes of codes that are prefetched before they are multiplied

void ask_for(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

}  // namespace

void prefetch_blocks(const Matrix& w, int64_t first, int64_t last) {
  if (w.format.kind == MOEC_F32) return;
  if (w.format.axis_out) ask_for(w.group_scales(first / w.blocks_together()), w.k * w.format.scale_bytes());
  const int64_t bytes = (last - first) * w.block_bytes();
  ask_for(w.codes(first), bytes < kAhead ? bytes : kAhead);
}

void quantize_for(const Kernels& isa, const Matrix& w, const float* x, int64_t x_stride, int64_t rows, QuantizedRows out) {
  QuantizeTask task{};
  task.x = x;
  task.x_stride = x_stride;
  task.rows = rows;
  task.k = w.k;
  task.group = w.format.group;
  task.by_block = w.format.block_activations;
  task.offset = code_offset(isa, w.format);
  task.out = out;
  isa.quantize(task);
}

void MatmulScratch::need(const Kernels& isa, const Matrix& w) {
  if (w.format.kind == MOEC_F32) return;
  if (isa.gemm_space && w.format.int8_activations) {
    const int64_t bytes = isa.gemm_space(w.padded_k());
    if (bytes > space_bytes_) space_bytes_ = bytes;
  }
  if (!w.format.axis_out) return;
  used_ = true;
  float_ |= !w.format.int8_activations;
  if (w.padded_k() > padded_k_) padded_k_ = w.padded_k();
  if (w.parts() > parts_) parts_ = w.parts();
}

void MatmulScratch::add(ScratchPlan& plan) {
  if (space_bytes_) space_offset_ = plan.add<uint8_t>(space_bytes_);
  if (!used_) return;
  factor_offset_ = plan.add<float>(padded_k_ + 16);
  temporary_offset_ = plan.add<float>(4 * round_up(padded_k_, 64));
  plan_.add(plan, kTile, padded_k_, parts_, parts_);
  if (float_) scaled_offset_ = plan.add<float>(kTile * padded_k_);
}

void MatmulScratch::place(uint8_t* base) {
  if (space_bytes_) space_ = base + space_offset_;
  if (!used_) return;
  factor_ = reinterpret_cast<float*>(base + factor_offset_);
  temporary_ = reinterpret_cast<float*>(base + temporary_offset_);
  scaled_ = reinterpret_cast<float*>(base + scaled_offset_);
  rows_ = plan_.at(base);
}

void matmul(const Kernels& isa, const Matrix& w, int64_t first, int64_t last, const Rows& rows, const float* bias, float* y,
            int64_t y_stride, const MatmulScratch& scratch) {
  const int64_t begin = first * kBlockRows;
  if (rows.m == 0 || first >= last) return;
  const int64_t outputs = (last * kBlockRows < w.n ? last * kBlockRows : w.n) - begin;
  if (bias) bias += begin;
  if (w.format.kind == MOEC_F32) {
    const auto* weights = reinterpret_cast<const float*>(w.data);  // alignment was checked with the buffer
    isa.gemm_f32({weights + begin * w.k, rows.x, rows.x_stride, rows.m, outputs, w.k, bias, y, y_stride});
    return;
  }
  GemmTask task{};
  task.codes = w.codes(first);
  task.block_bytes = w.block_bytes();
  task.f32_scales = w.format.f32_scales;
  task.padded_k = w.padded_k();
  task.bias = bias;
  task.y_stride = y_stride;
  task.space = scratch.space_;
  const int32_t kind = w.format.kind - 1;
  const bool by_block = w.format.block_activations;
  // Within a matrix the kernels prefetch the next blocks while they multiply. The first ones are prefetched here: the kernels'
  // loops have too few loads in flight to fetch them quickly.
  prefetch_blocks(w, first, last);
  if (!w.format.axis_out) {
    task.scales = w.block_scales(first);
    task.group = w.format.group;
    task.blocks = last - first;
    task.outputs = outputs;
    task.m = rows.m;
    task.rows = rows.q;
    task.x = rows.x;
    task.x_stride = rows.x_stride;
    task.y = y;
    w.format.int8_activations ? isa.gemm_int8[kind][0][by_block](task) : isa.gemm_float[kind][0](task);
    return;
  }
  // Groups along the output: the scale sits inside the sum over inputs, so it multiplies the activations first.
  const int64_t together = w.blocks_together();
  task.group = task.padded_k;
  for (int64_t block = first; block < last; block += together) {
    const int64_t group = block / together;
    ask_for(w.group_scales(group + 1 < w.groups() ? group + 1 : group), w.k * w.format.scale_bytes());
    const float* factor = reinterpret_cast<const float*>(w.group_scales(group));
    if (!w.format.f32_scales || reinterpret_cast<uintptr_t>(factor) % 4) {
      factor = scratch.factor_;
      if (w.format.f32_scales) {
        __builtin_memcpy(scratch.factor_, w.group_scales(group), size_t(w.k) * 4);
      } else {
        isa.f16_to_f32(w.group_scales(group), w.k, scratch.factor_);
      }
    }
    task.codes = w.codes(block);
    task.blocks = together;
    task.outputs = together * kBlockRows;
    task.bias = bias ? bias + (block - first) * kBlockRows : nullptr;
    for (int64_t row = 0; row < rows.m; row += kTile) {
      task.m = rows.m - row < kTile ? rows.m - row : kTile;
      task.y = y + row * y_stride + (block - first) * kBlockRows;
      const float* const x = rows.x + row * rows.x_stride;
      if (w.format.int8_activations) {
        QuantizedRows q = scratch.rows_;
        q.stride = quantized_stride(task.padded_k);
        isa.quantize({x, rows.x_stride, task.m, w.k, w.k, by_block, code_offset(isa, w.format), factor, scratch.temporary_, q});
        task.rows = q;
        isa.gemm_int8[kind][1][by_block](task);
        continue;
      }
      for (int64_t t = 0; t < task.m; ++t) {
        float* const z = scratch.scaled_ + t * task.padded_k;
        for (int64_t k = 0; k < w.k; ++k) z[k] = x[t * rows.x_stride + k] * factor[k];
        for (int64_t k = w.k; k < task.padded_k; ++k) z[k] = 0.0f;
      }
      task.x = scratch.scaled_;
      task.x_stride = task.padded_k;
      isa.gemm_float[kind][1](task);
    }
  }
}

}  // namespace moec
