// moec_head_linear: a matrix for each head, as latent attention has them.
#include <cinttypes>

#include "core/matmul.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/status.h"

namespace moec {
namespace {

constexpr int64_t kTokenTile = 48;  // as in linear.cpp

// Matrix h is `stride` bytes after matrix h - 1.
int32_t run(const Matrix& first, uint64_t stride, int64_t t, int64_t heads, const float* x, float* y) {
  const Kernels& isa = kernels();
  const bool rounded = needs_quantized(first.format);
  const int64_t tiles = divide_up(t, kTokenTile), tile = divide_up(t, tiles), n = first.n, k = first.k;
  const int32_t threads = workers();
  MatmulScratch worker;
  worker.need(isa, first);
  ScratchPlan plan;
  QuantizedPlan rounded_plan;
  if (rounded) rounded_plan.add(plan, tile, first);
  worker.add(plan);
  uint8_t* const base = scratch(plan.total() * size_t(threads));
  if (!base) return fail(MOEC_OUT_OF_MEMORY, "head_linear: no memory for the scratch of %" PRId64 " tokens", t);
  for_each_unit(threads, heads * tiles, [&](int32_t index, int64_t unit) {
    const int64_t head = unit / tiles, row = unit % tiles * tile, m = row + tile < t ? tile : t - row;
    if (m <= 0) return;
    uint8_t* const own = base + plan.total() * size_t(index);
    MatmulScratch mine = worker;
    mine.place(own);
    Matrix w = first;
    w.data += stride * uint64_t(head);
    Rows rows{m, x + (row * heads + head) * k, heads * k, rounded ? rounded_plan.at(own) : QuantizedRows{}};
    if (rounded) quantize_for(isa, w, rows.x, rows.x_stride, m, rows.q);
    matmul(isa, w, 0, w.blocks(), rows, nullptr, y + (row * heads + head) * n, heads * n, mine);
  });
  return MOEC_OK;
}

}  // namespace
}  // namespace moec

using namespace moec;

int32_t moec_head_linear(int64_t t, int64_t heads, int64_t n, int64_t k, int32_t format, moec_in x, moec_in w, moec_out y) {
  MOEC_RETURN_IF_ERROR(select_isa());
  Matrix matrix;
  uint64_t stride = 0, inputs = 0, outputs = 0;
  if (heads < 1) return fail(MOEC_INVALID_ARGUMENT, "head_linear: %" PRId64 " heads", heads);
  MOEC_RETURN_IF_ERROR(open_matrices("w", heads, n, k, format, w, &matrix, &stride));
  if (!checked_product(heads, k, 1, &inputs) || inputs > INT64_MAX || !checked_product(heads, n, 1, &outputs) ||
      outputs > INT64_MAX)
    return fail(MOEC_INVALID_ARGUMENT, "head_linear: %" PRId64 " heads of %" PRId64 " x %" PRId64, heads, n, k);
  MOEC_RETURN_IF_ERROR(check_buffer("x", x.data, x.bytes, t, int64_t(inputs), 4));
  MOEC_RETURN_IF_ERROR(check_buffer("y", y.data, y.bytes, t, int64_t(outputs), 4));
  if (t == 0) return MOEC_OK;
  return run(matrix, stride, t, heads, static_cast<const float*>(x.data), static_cast<float*>(y.data));
}
