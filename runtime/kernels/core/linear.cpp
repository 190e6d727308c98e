// moec_linear, moec_gated_linear and moec_embedding.
#include <cinttypes>
#include <cmath>
#include <cstring>

#include "core/matmul.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/status.h"

namespace moec {
namespace {

constexpr int64_t kTokenTile = 48;         // rows that share one reading of a chunk of weights
constexpr int64_t kChunkBytes = 96 << 10;  // of weights per unit of work: stays in the second-level cache
// For a matrix of a few hundred kB. Each unit begins with a wait for its first bytes; two are enough for a fast worker to take
// three of four. Six cost a fifth of the speed of a 768 x 768 matrix at one token.
constexpr int64_t kUnitsPerWorker = 2;
constexpr int64_t kMostGated = 16;  // blocks of gate and of up whose outputs wait for their activation: 98 kB for 48 rows

// Row blocks per unit of work, out of `blocks`, when a unit reads `sides` times as many.
int64_t chunk_blocks(const Matrix& w, int64_t blocks, int64_t sides, int64_t threads) {
  const int64_t bytes = w.format.kind == MOEC_F32 ? kBlockRows * w.k * 4 : w.block_bytes();
  int64_t chunk = kChunkBytes / (sides * bytes);
  const int64_t fair = divide_up(blocks, threads * kUnitsPerWorker);
  if (chunk > fair) chunk = fair;
  if (sides > 1 && chunk > kMostGated) chunk = kMostGated;
  return round_up(chunk < 1 ? 1 : chunk, w.blocks_together());
}

// y [t, N], or with an activation [t, N / 2]: the two halves of w's rows are gate and up.
int32_t run_linear(const Matrix& w, int64_t t, const float* x, const float* bias, const Activation* activation, float* y) {
  const Kernels& isa = kernels();
  const int64_t sides = activation ? 2 : 1, blocks = w.blocks() / sides, width = w.n / sides;
  const int32_t threads = workers();
  const bool rounded = needs_quantized(w.format);
  MatmulScratch worker;
  worker.need(isa, w);
  ScratchPlan plan, worker_plan;
  QuantizedPlan rounded_plan;
  if (rounded) rounded_plan.add(plan, t, w);
  worker.add(worker_plan);
  const int64_t tiles = divide_up(t, kTokenTile), tile = divide_up(t, tiles);
  const int64_t chunk = chunk_blocks(w, blocks, sides, threads), chunks = divide_up(blocks, chunk);
  const int64_t stride = sides * chunk * kBlockRows;  // of the gate and up of a unit
  const size_t both_at = activation ? worker_plan.add<float>(tile * stride) : 0;
  const size_t shared_bytes = plan.total();
  uint8_t* const base = scratch(shared_bytes + worker_plan.total() * size_t(threads));
  if (!base) return fail(MOEC_OUT_OF_MEMORY, "linear: no memory for the scratch of %" PRId64 " tokens", t);

  const QuantizedRows all = rounded ? rounded_plan.at(base) : QuantizedRows{};
  if (rounded) {
    for_each_unit(t > 8 ? threads : 1, tiles, [&](int32_t, int64_t i) {
      const int64_t row = i * tile, m = row + tile < t ? tile : t - row;
      if (m > 0) quantize_for(isa, w, x + row * w.k, w.k, m, all.from(row));
    });
  }
  for_each_unit(threads, chunks * tiles, [&](int32_t index, int64_t unit) {
    MatmulScratch mine = worker;
    uint8_t* const own = base + shared_bytes + worker_plan.total() * size_t(index);
    mine.place(own);
    const int64_t first = unit / tiles * chunk, last = first + chunk < blocks ? first + chunk : blocks;
    const int64_t row = unit % tiles * tile, m = row + tile < t ? tile : t - row;
    if (m <= 0) return;
    Rows rows{m, x + row * w.k, w.k, rounded ? all.from(row) : QuantizedRows{}};
    float* const out = y + row * width + first * kBlockRows;
    if (!activation) return matmul(isa, w, first, last, rows, bias, out, width, mine);
    const int64_t outputs = (last - first) * kBlockRows;
    auto* const gate = reinterpret_cast<float*>(own + both_at);
    float* const up = gate + outputs;
    matmul(isa, w, first, last, rows, nullptr, gate, stride, mine);
    matmul(isa, w, blocks + first, blocks + last, rows, nullptr, up, stride, mine);
    isa.activate({gate, up, 1, stride, m, outputs, *activation, 1.0f, -INFINITY, INFINITY, -INFINITY, INFINITY, 0.0f, out, width});
  });
  return MOEC_OK;
}

float scale_at(const uint8_t* scales, const Format& f, int64_t i) {
  float value;
  if (f.f32_scales) {
    std::memcpy(&value, scales + i * 4, 4);
  } else {
    kernels().f16_to_f32(scales + i * 2, 1, &value);
  }
  return value;
}

// Row n of a packed matrix, dequantized: exact, as a code times an f16 scale fits fp32.
void read_row(const Matrix& w, int64_t n, float* y) {
  const Format& f = w.format;
  if (f.kind == MOEC_F32) {
    std::memcpy(y, w.data + n * w.k * 4, size_t(w.k) * 4);
    return;
  }
  const uint8_t* const codes = w.codes(n / kBlockRows);
  for (int64_t k = 0; k < w.k; ++k) {
    const int32_t code = code_in_unit(f.kind, codes + k / kUnit * f.unit_bytes(), n % kBlockRows, k % kUnit);
    y[k] = float(f.kind == MOEC_INT8 ? int8_t(code) : has_levels(f.kind) ? level_of(f.kind, code) : code - 8);
  }
  if (f.axis_out) {
    const uint8_t* const scales = w.group_scales(n / f.group);
    for (int64_t k = 0; k < w.k; ++k) y[k] *= scale_at(scales, f, k);
    return;
  }
  const uint8_t* const scales = w.block_scales(n / kBlockRows);
  for (int64_t g = 0; g < w.groups(); ++g) {
    const float s = scale_at(scales, f, g * kBlockRows + n % kBlockRows);
    for (int64_t k = g * f.group; k < (g + 1) * f.group; ++k) y[k] *= s;
  }
}

}  // namespace
}  // namespace moec

using namespace moec;

int32_t moec_linear(int64_t t, int64_t n, int64_t k, int32_t format, moec_in x, moec_in w, moec_in bias, moec_out y) {
  MOEC_RETURN_IF_ERROR(select_isa());
  Matrix matrix;
  MOEC_RETURN_IF_ERROR(open_matrices("w", 1, n, k, format, w, &matrix, nullptr));
  MOEC_RETURN_IF_ERROR(check_buffer("x", x.data, x.bytes, t, k, 4));
  MOEC_RETURN_IF_ERROR(check_buffer("y", y.data, y.bytes, t, n, 4));
  if (bias.data || bias.bytes) MOEC_RETURN_IF_ERROR(check_buffer("bias", bias.data, bias.bytes, 1, n, 4));
  if (t == 0) return MOEC_OK;
  return run_linear(matrix, t, static_cast<const float*>(x.data), static_cast<const float*>(bias.data),
                    nullptr, static_cast<float*>(y.data));
}

int32_t moec_gated_linear(int64_t t, int64_t f, int64_t k, int32_t format, int32_t activation, moec_in x, moec_in w,
                          moec_out y) {
  uint64_t n = 0;
  if (!checked_product(2, f, 1, &n) || n > INT64_MAX) return fail(MOEC_INVALID_ARGUMENT, "f = %" PRId64 " is not a width", f);
  MOEC_RETURN_IF_ERROR(select_isa());
  Matrix matrix;
  MOEC_RETURN_IF_ERROR(open_matrices("w", 1, int64_t(n), k, format, w, &matrix, nullptr));
  const int64_t together = kBlockRows * matrix.blocks_together();
  if (f % together) {
    return fail(MOEC_INVALID_ARGUMENT, "a width of %" PRId64 " does not divide into blocks of %" PRId64 " rows", f, together);
  }
  if (activation < 0 || activation > int32_t(Activation::kRelu2)) {
    return fail(MOEC_INVALID_ARGUMENT, "activation %" PRId32 " is not known", activation);
  }
  MOEC_RETURN_IF_ERROR(check_buffer("x", x.data, x.bytes, t, k, 4));
  MOEC_RETURN_IF_ERROR(check_buffer("y", y.data, y.bytes, t, f, 4));
  if (t == 0) return MOEC_OK;
  const auto kind = static_cast<Activation>(activation);
  return run_linear(matrix, t, static_cast<const float*>(x.data), nullptr, &kind, static_cast<float*>(y.data));
}

int32_t moec_embedding(int64_t t, int64_t n, int64_t k, int32_t format, moec_in ids, moec_in w, moec_out y) {
  MOEC_RETURN_IF_ERROR(select_isa());
  Matrix matrix;
  MOEC_RETURN_IF_ERROR(open_matrices("w", 1, n, k, format, w, &matrix, nullptr));
  MOEC_RETURN_IF_ERROR(check_buffer("ids", ids.data, ids.bytes, t, 1, 8));
  MOEC_RETURN_IF_ERROR(check_buffer("y", y.data, y.bytes, t, k, 4));
  const auto* rows = static_cast<const int64_t*>(ids.data);
  for (int64_t i = 0; i < t; ++i) {
    if (rows[i] < 0 || rows[i] >= n) {
      return fail(MOEC_INVALID_ARGUMENT, "ids[%" PRId64 "] = %" PRId64 " is not a row of a table of %" PRId64, i, rows[i], n);
    }
  }
  auto* out = static_cast<float*>(y.data);
  for_each_unit(t > 4 ? workers() : 1, t, [&](int32_t, int64_t i) { read_row(matrix, rows[i], out + i * k); });
  return MOEC_OK;
}
