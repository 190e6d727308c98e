// moec_linear and moec_embedding.
#include <cinttypes>
#include <cstring>

#include "matmul.h"
#include "parallel.h"
#include "scratch.h"
#include "status.h"

namespace moec {
namespace {

constexpr int64_t kTokenTile = 48;         // rows that share one reading of a chunk of weights
constexpr int64_t kChunkBytes = 96 << 10;  // of weights per unit of work: stays in the second-level cache
// Of a matrix of a few hundred kB: each unit begins with a wait for its first bytes, and two still let a fast worker take
// three of four. Six cost a fifth of the speed of a 768 x 768 matrix at one token.
constexpr int64_t kUnitsPerWorker = 2;

// Row blocks per unit of work.
int64_t chunk_blocks(const Matrix& w, int64_t threads) {
  const int64_t bytes = w.format.kind == MOEC_F32 ? kBlockRows * w.k * 4 : w.block_bytes();
  const int64_t together = w.blocks_together(), blocks = w.blocks();
  int64_t chunk = kChunkBytes / bytes;
  const int64_t fair = divide_up(blocks, threads * kUnitsPerWorker);
  if (chunk > fair) chunk = fair;
  return round_up(chunk < 1 ? 1 : chunk, together);
}

int32_t run_linear(const Matrix& w, int64_t t, const float* x, const float* bias, float* y) {
  const Kernels& isa = kernels();
  const int32_t threads = workers();
  const bool rounded = needs_quantized(w.format);
  MatmulScratch worker;
  worker.need(w);
  ScratchPlan plan, worker_plan;
  QuantizedPlan rounded_plan;
  if (rounded) rounded_plan.add(plan, t, w.padded_k(), w.groups());
  worker.add(worker_plan);
  const size_t shared_bytes = plan.total();
  uint8_t* const base = scratch(shared_bytes + worker_plan.total() * size_t(threads));
  if (!base) return fail(MOEC_OUT_OF_MEMORY, "linear: no memory for the scratch of %" PRId64 " tokens", t);

  const QuantizedRows all = rounded ? rounded_plan.at(base) : QuantizedRows{};
  const int64_t tiles = divide_up(t, kTokenTile), tile = divide_up(t, tiles);
  if (rounded) {
    for_each_unit(t > 8 ? threads : 1, tiles, [&](int32_t, int64_t i) {
      const int64_t row = i * tile, m = row + tile < t ? tile : t - row;
      if (m > 0) quantize_for(isa, w, x + row * w.k, w.k, m, all.from(row));
    });
  }
  const int64_t chunk = chunk_blocks(w, threads), chunks = divide_up(w.blocks(), chunk);
  for_each_unit(threads, chunks * tiles, [&](int32_t index, int64_t unit) {
    MatmulScratch mine = worker;
    mine.place(base + shared_bytes + worker_plan.total() * size_t(index));
    const int64_t first = unit / tiles * chunk, last = first + chunk < w.blocks() ? first + chunk : w.blocks();
    const int64_t row = unit % tiles * tile, m = row + tile < t ? tile : t - row;
    if (m <= 0) return;
    Rows rows{m, x + row * w.k, w.k, rounded ? all.from(row) : QuantizedRows{}};
    matmul(isa, w, first, last, rows, bias, y + row * w.n + first * kBlockRows, w.n, mine);
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
  const uint8_t* const codes = w.codes(n / kBlockRows) + 4 * (n % kBlockRows);
  for (int64_t k = 0; k < w.k; ++k) {
    const int64_t half = k % kUnit / 4, i = k % 4;
    const uint8_t* const unit = codes + k / kUnit * f.unit_bytes();
    y[k] = float(f.kind == MOEC_INT8 ? int8_t(unit[64 * half + i]) : (half ? unit[i] >> 4 : unit[i] & 15) - 8);
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
  Matrix matrix;
  MOEC_RETURN_IF_ERROR(open_matrices("w", 1, n, k, format, w, &matrix, nullptr));
  MOEC_RETURN_IF_ERROR(check_buffer("x", x.data, x.bytes, t, k, 4));
  MOEC_RETURN_IF_ERROR(check_buffer("y", y.data, y.bytes, t, n, 4));
  if (bias.data || bias.bytes) MOEC_RETURN_IF_ERROR(check_buffer("bias", bias.data, bias.bytes, 1, n, 4));
  if (t == 0) return MOEC_OK;
  return run_linear(matrix, t, static_cast<const float*>(x.data), static_cast<const float*>(bias.data),
                    static_cast<float*>(y.data));
}

int32_t moec_embedding(int64_t t, int64_t n, int64_t k, int32_t format, moec_in ids, moec_in w, moec_out y) {
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
