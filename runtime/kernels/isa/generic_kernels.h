// The kernels whose source is the same for every instruction set, written on the sixteen-lane types F32x16 and I32x16.
// Included after exactly one simd_*.h; everything is in an anonymous namespace: each instruction set compiles its own.
#ifndef MOEC_GENERIC_KERNELS_H_
#define MOEC_GENERIC_KERNELS_H_

#include <cmath>
#include <cstring>

#include "core/levels.h"
#include "isa/isa.h"
#include "isa/recurrent_tasks.h"
#include "moec_kernel.h"

namespace moec {
namespace {

// ---------------------------------------------------------------------------------------------------------- elementwise

inline F32x16 clamp(F32x16 x, F32x16 low, F32x16 high) { return minimum(high, maximum(low, x)); }  // a NaN stays

// e^x for x in [-87.3, 88.3], clamped to that outside; relative error below 2e-7. Cody and Waite reduction, degree 6.
inline F32x16 exp16(F32x16 x) {
  x = clamp(x, set1(-87.3f), set1(88.3f));
  const I32x16 n = round_to_int(mul(x, set1(1.44269504088896341f)));
  const F32x16 nf = to_float(n);
  F32x16 r = fma(nf, set1(-0.693359375f), x);
  r = fma(nf, set1(2.12194440e-4f), r);
  F32x16 p = fma(set1(1.9875691500e-4f), r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  return mul(p, from_bits(shift_left<23>(iadd(n, iset1(127)))));
}

inline F32x16 sigmoid16(F32x16 x) { return div(set1(1.0f), add(set1(1.0f), exp16(sub(set1(0.0f), x)))); }

// erf, Abramowitz and Stegun 7.1.26; absolute error below 5e-7 in fp32.
inline F32x16 erf16(F32x16 x) {
  const I32x16 sign = iand(bits(x), iset1(INT32_MIN));
  const F32x16 a = from_bits(iand(bits(x), iset1(0x7FFFFFFF)));
  const F32x16 t = div(set1(1.0f), fma(a, set1(0.3275911f), set1(1.0f)));
  F32x16 p = fma(set1(1.061405429f), t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  const F32x16 y = sub(set1(1.0f), mul(mul(p, t), exp16(sub(set1(0.0f), mul(a, a)))));
  return from_bits(iadd(bits(y), sign));  // y >= 0 there, so adding the sign bit sets it
}

template <Activation kActivation>
inline F32x16 activation16(F32x16 x, F32x16 alpha) {
  switch (kActivation) {
    case Activation::kSilu:
      return mul(x, sigmoid16(mul(alpha, x)));
    case Activation::kGelu:
      return mul(mul(x, set1(0.5f)), add(set1(1.0f), erf16(mul(x, set1(0.70710678118654752f)))));
    case Activation::kGeluTanh: {
      const F32x16 u = mul(set1(1.5957691216057308f), fma(mul(mul(x, x), x), set1(0.044715f), x));  // 2 sqrt(2/pi) (...)
      return mul(x, sigmoid16(u));
    }
    case Activation::kRelu:
      return maximum(set1(0.0f), x);
    default: {
      const F32x16 r = maximum(set1(0.0f), x);
      return mul(r, r);
    }
  }
}

// Gate (or up) elements i.. of a row, `n` of them, `step` apart.
inline F32x16 load_steps(const float* p, int64_t step, int n) {
  if (step == 1) return n == 16 ? load(p) : load_n(p, n);
  alignas(64) float t[16] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i * step];
  return load(t);
}

template <Activation kActivation>
void activate_as(const ActivateTask& a) {
  const F32x16 alpha = set1(a.alpha), gate_min = set1(a.gate_min), gate_max = set1(a.gate_max);
  const F32x16 up_min = set1(a.up_min), up_max = set1(a.up_max), up_offset = set1(a.up_offset);
  for (int64_t row = 0; row < a.rows; ++row) {
    const float* const gate = a.gate + row * a.stride;
    const float* const up = a.up ? a.up + row * a.stride : nullptr;
    float* const hidden = a.hidden + row * a.hidden_stride;
    for (int64_t i = 0; i < a.width; i += 16) {
      const int n = a.width - i < 16 ? int(a.width - i) : 16;
      F32x16 h = activation16<kActivation>(clamp(load_steps(gate + i * a.step, a.step, n), gate_min, gate_max), alpha);
      if (up) h = mul(h, add(clamp(load_steps(up + i * a.step, a.step, n), up_min, up_max), up_offset));
      n == 16 ? store(hidden + i, h) : store_n(hidden + i, h, n);
    }
  }
}

void activate(const ActivateTask& a) {
  switch (a.activation) {
    case Activation::kSilu: return activate_as<Activation::kSilu>(a);
    case Activation::kGelu: return activate_as<Activation::kGelu>(a);
    case Activation::kGeluTanh: return activate_as<Activation::kGeluTanh>(a);
    case Activation::kRelu: return activate_as<Activation::kRelu>(a);
    case Activation::kRelu2: return activate_as<Activation::kRelu2>(a);
  }
}

template <typename Function>
inline void map(const float* x, int64_t n, float* y, Function f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, f(load(x + i)));
  if (i < n) store_n(y + i, f(load_n(x + i, int(n - i))), int(n - i));
}

void sigmoid(const float* x, int64_t n, float* y) {
  map(x, n, y, [](F32x16 v) { return sigmoid16(v); });
}

void exponential(const float* x, int64_t n, float* y) {
  map(x, n, y, [](F32x16 v) { return exp16(v); });
}

void f16_to_f32(const uint8_t* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, load_half(x + 2 * i));
  if (i == n) return;
  uint8_t t[32] = {};
  std::memcpy(t, x + 2 * i, size_t(n - i) * 2);
  store_n(y + i, load_half(t), int(n - i));
}

void add_scaled(const float* x, float weight, int64_t n, bool accumulate, float* y) {
  const F32x16 w = set1(weight);
  for (int64_t i = 0; i < n; i += 16) {
    const int c = n - i < 16 ? int(n - i) : 16;
    F32x16 v = mul(w, c == 16 ? load(x + i) : load_n(x + i, c));
    if (accumulate) v = add(c == 16 ? load(y + i) : load_n(y + i, c), v);
    c == 16 ? store(y + i, v) : store_n(y + i, v, c);
  }
}

void add_rows(const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += 16) {
    const int c = n - i < 16 ? int(n - i) : 16;
    c == 16 ? store(y + i, add(load(y + i), load(x + i))) : store_n(y + i, add(load_n(y + i, c), load_n(x + i, c)), c);
  }
}

// ------------------------------------------------------------------------------------------------- activation rounding

// max|x| as the bits of a float: the patterns of non-negative floats are ordered as the floats are, with infinity and NaN
// on top. With a factor, x * factor goes to `product`.
template <bool kFactor>
inline int32_t largest_bits(const float* x, const float* factor, int64_t k, float* product) {
  const I32x16 magnitude = iset1(0x7FFFFFFF);
  I32x16 even = iset1(0), odd = iset1(0);
  const auto at = [&](int64_t i, int n) {
    F32x16 v = n == 16 ? load(x + i) : load_n(x + i, n);
    if (kFactor) {
      v = mul(v, n == 16 ? load(factor + i) : load_n(factor + i, n));
      store(product + i, v);
    }
    return iand(bits(v), magnitude);
  };
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    even = imax(even, at(i, 16));
    odd = imax(odd, at(i + 16, 16));
  }
  for (; i < k; i += 16) even = imax(even, at(i, k - i < 16 ? int(k - i) : 16));
  return reduce_imax(imax(even, odd));
}

// Rounds x[begin..end) times `inverse` to q; returns the sum of what it wrote.
inline int32_t round_part(const float* x, int64_t begin, int64_t end, F32x16 inverse, int8_t* q) {
  const auto at = [&](int64_t i) { return round_to_int(mul(load(x + i), inverse)); };
  I32x16 sum = iset1(0);
  int64_t i = begin;
  for (; i + 64 <= end; i += 64) {
    const I32x16 a = at(i), b = at(i + 16), c = at(i + 32), d = at(i + 48);
    sum = iadd(sum, iadd(iadd(a, b), iadd(c, d)));
    store_int8_64(q + i, a, b, c, d);
  }
  for (; i + 16 <= end; i += 16) {
    const I32x16 a = at(i);
    sum = iadd(sum, a);
    store_int8(q + i, a);
  }
  if (i < end) {
    const I32x16 a = round_to_int(mul(load_n(x + i, int(end - i)), inverse));
    sum = iadd(sum, a);
    int8_t t[16];
    store_int8(t, a);
    std::memcpy(q + i, t, size_t(end - i));
  }
  return reduce_iadd(sum);
}

// How values whose largest magnitude has these bits are rounded: x * inverse, to the nearest integer. inverse is 0 if all are
// zero, if they are so small that 127 / max overflows, or if one is not finite, which makes the scale NaN.
struct RowScale {
  float inverse, scale;
};
inline RowScale row_scale(int32_t largest_bits) {
  if (largest_bits >= 0x7F800000) return {0.0f, __builtin_nanf("")};
  float largest;
  std::memcpy(&largest, &largest_bits, 4);
  const float inverse = largest_bits ? 127.0f / largest : 0.0f;
  if (inverse == 0.0f || inverse > 3.4028234e38f) return {0.0f, 0.0f};
  return {inverse, largest / 127.0f};
}

// Up to 32 values, multiplied by their factors if they have any.
template <bool kFactor>
inline void load_block(const float* x, const float* factor, int n, F32x16 (&v)[2]) {
  const auto at = [&](const float* p, int i) {
    return n >= i + 16 ? load(p + i) : n > i ? load_n(p + i, n - i) : set1(0.0f);
  };
  for (int h = 0; h < 2; ++h) v[h] = kFactor ? mul(at(x, 16 * h), at(factor, 16 * h)) : at(x, 16 * h);
}

// A scale and a correction for each 32 inputs. The row is read once for the magnitudes, which lie in cache afterwards.
template <bool kFactor>
void quantize_blocks(const QuantizeTask& a) {
  constexpr int kTogether = 8;  // blocks whose reductions and divisions overlap
  const I32x16 magnitude = iset1(0x7FFFFFFF);
  for (int64_t row = 0; row < a.rows; ++row) {
    const float* const x = a.x + row * a.x_stride;
    int8_t* const q = a.out.q + row * a.out.stride;
    float* scale = a.out.scale + row;
    int32_t* correction = a.out.correction + row;
    const int64_t blocks = (a.k + 31) / 32;
    for (int64_t first = 0; first < blocks; first += kTogether) {
      const int count = blocks - first < kTogether ? int(blocks - first) : kTogether;
      const auto length = [&](int i) {
        const int64_t rest = a.k - (first + i) * 32;
        return rest < 32 ? int(rest) : 32;
      };
      int32_t most[kTogether];
      RowScale found[kTogether];
      F32x16 v[2];
      for (int i = 0; i < count; ++i) {
        load_block<kFactor>(x + (first + i) * 32, kFactor ? a.factor + (first + i) * 32 : nullptr, length(i), v);
        most[i] = reduce_imax(imax(iand(bits(v[0]), magnitude), iand(bits(v[1]), magnitude)));
      }
      for (int i = 0; i < count; ++i) found[i] = row_scale(most[i]);
      for (int i = 0; i < count; ++i, scale += a.out.part_stride, correction += a.out.part_stride) {
        load_block<kFactor>(x + (first + i) * 32, kFactor ? a.factor + (first + i) * 32 : nullptr, length(i), v);
        *scale = found[i].scale;
        int8_t* const to = q + (first + i) * 32;  // rows are padded to a multiple of 64 bytes
        if (found[i].inverse == 0.0f) {
          std::memset(to, 0, 32);
          *correction = 0;
          continue;
        }
        const F32x16 inverse = set1(found[i].inverse);
        const I32x16 low = round_to_int(mul(v[0], inverse)), high = round_to_int(mul(v[1], inverse));
        store_int8(to, low);
        store_int8(to + 16, high);
        *correction = -a.offset * reduce_iadd(iadd(low, high));
      }
    }
    if (a.out.stride > 32 * blocks) std::memset(q + 32 * blocks, 0, size_t(a.out.stride - 32 * blocks));
  }
}

// Rows are taken four at a time, so that the reductions of one overlap with the passes over another.
void quantize(const QuantizeTask& a) {
  if (a.by_block) return a.factor ? quantize_blocks<true>(a) : quantize_blocks<false>(a);
  constexpr int kRows = 4;
  const int64_t temporary_stride = (a.k + 63) / 64 * 64;
  for (int64_t first = 0; first < a.rows; first += kRows) {
    const int rows = a.rows - first < kRows ? int(a.rows - first) : kRows;
    const float* x[kRows];
    int32_t most[kRows];
    for (int r = 0; r < rows; ++r) {
      const float* const row = a.x + (first + r) * a.x_stride;
      float* const product = a.temporary + r * temporary_stride;
      most[r] = a.factor ? largest_bits<true>(row, a.factor, a.k, product) : largest_bits<false>(row, nullptr, a.k, nullptr);
      x[r] = a.factor ? product : row;
    }
    for (int r = 0; r < rows; ++r) {
      int8_t* const q = a.out.q + (first + r) * a.out.stride;
      int32_t* correction = a.out.correction + first + r;
      const auto [inverse, scale] = row_scale(most[r]);
      a.out.scale[first + r] = scale;
      if (inverse == 0.0f) {
        std::memset(q, 0, size_t(a.out.stride));
        for (int64_t k = 0; k < a.k; k += a.group, correction += a.out.part_stride) *correction = 0;
        continue;
      }
      for (int64_t k = 0; k < a.k; k += a.group, correction += a.out.part_stride) {
        *correction = -a.offset * round_part(x[r], k, k + a.group < a.k ? k + a.group : a.k, set1(inverse), q);
      }
      if (a.out.stride > a.k) std::memset(q + a.k, 0, size_t(a.out.stride - a.k));
    }
  }
}

// -------------------------------------------------------------------------------------------------------- float kernels

inline F32x16 load_scales(const uint8_t* p, bool f32) {
  return f32 ? from_bits(load_int32(p)) : load_half(p);
}

// Store 16 outputs of a row, or the `n` that exist; with the bias added.
inline void store_outputs(float* y, F32x16 v, const float* bias, int n) {
  if (n == 16) {
    store(y, bias ? add(v, load(bias)) : v);
  } else {
    store_n(y, bias ? add(v, load_n(bias, n)) : v, n);
  }
}

// The codes of input kI (0..7) of a unit of int4 or int8, for 16 rows.
template <int kKind, int kI>
inline F32x16 code_lanes(const uint8_t* unit) {
  if (kKind == MOEC_INT4) {
    const I32x16 nibble = iand(shift_right<8 * (kI % 4) + (kI >= 4 ? 4 : 0)>(load_int32(unit)), iset1(15));
    return to_float(iadd(nibble, iset1(-8)));
  }
  return to_float(shift_right<24>(shift_left<24 - 8 * (kI % 4)>(load_int32(unit + (kI >= 4 ? 64 : 0)))));
}

template <int kKind, int kI, int kM>
inline void multiply_code(const uint8_t* unit, const float* x, int64_t stride, F32x16* sum) {
  const F32x16 w = code_lanes<kKind, kI>(unit);
  for (int t = 0; t < kM; ++t) sum[t] = fma(set1(x[t * stride + kI]), w, sum[t]);
}

// A unit of nl3 as one of nibbles, 64 bytes.
inline void spread_unit(const uint8_t* unit, uint8_t* nibbles) {
  for (int j = 0; j < 32; ++j) {
    nibbles[j] = unit[j] & 0x33;
    nibbles[32 + j] = unit[j] >> 2 & 0x33;
  }
  for (int part = 0; part < 4; ++part) {
    for (int j = 0; j < 16; ++j) nibbles[16 * part + j] |= uint8_t((unit[32 + j] >> part & 0x11) << 2);
  }
}

template <int kKind, int kM>
inline void multiply_unit(const uint8_t* unit, const float* x, int64_t stride, F32x16* sum) {
  if (has_levels(kKind)) {  // the levels are a unit of int8
    alignas(64) uint8_t wide[128];
    if (kKind == MOEC_NL3) {
      spread_unit(unit, wide);
      unit = wide;
    }
    const I32x16 both = load_int32(unit), nibbles = iset1(0x0F0F0F0F);
    store_int32(wide, lookup(kLevelTable<kKind>.bytes, iand(both, nibbles)));
    store_int32(wide + 64, lookup(kLevelTable<kKind>.bytes, iand(shift_right<4>(both), nibbles)));
    return multiply_unit<MOEC_INT8, kM>(wide, x, stride, sum);
  }
  multiply_code<kKind, 0, kM>(unit, x, stride, sum);
  multiply_code<kKind, 1, kM>(unit, x, stride, sum);
  multiply_code<kKind, 2, kM>(unit, x, stride, sum);
  multiply_code<kKind, 3, kM>(unit, x, stride, sum);
  multiply_code<kKind, 4, kM>(unit, x, stride, sum);
  multiply_code<kKind, 5, kM>(unit, x, stride, sum);
  multiply_code<kKind, 6, kM>(unit, x, stride, sum);
  multiply_code<kKind, 7, kM>(unit, x, stride, sum);
}

// kM rows of float activations times one row block: sum over groups of s_w * (sum of x * q), or with groups along the
// output (x holds x * s_w already) the plain sum of x * q.
template <int kKind, bool kAxisOut, int kM>
void gemm_float_block(const GemmTask& a, const uint8_t* codes, const uint8_t* scales, int64_t row, float* y, const float* bias,
                      int outputs) {
  constexpr int64_t kUnitBytes = unit_bytes_of(kKind);
  const float* x = a.x + row * a.x_stride;
  F32x16 total[kM], sum[kM];
  for (int t = 0; t < kM; ++t) total[t] = sum[t] = set1(0.0f);
  for (int64_t k = 0; k < a.padded_k; k += a.group) {
    for (int64_t i = k; i < k + a.group; i += 8, codes += kUnitBytes) multiply_unit<kKind, kM>(codes, x + i, a.x_stride, sum);
    if (kAxisOut) break;
    const F32x16 s = load_scales(scales, a.f32_scales);
    scales += a.f32_scales ? 64 : 32;
    for (int t = 0; t < kM; ++t) {
      total[t] = fma(sum[t], s, total[t]);
      sum[t] = set1(0.0f);
    }
  }
  for (int t = 0; t < kM; ++t) store_outputs(y + t * a.y_stride, kAxisOut ? sum[t] : total[t], bias, outputs);
}

// Calls block(block, codes, scales, row, rows of this tile) for every row block, the tokens in tiles of kTile at most.
template <int kKind, bool kAxisOut>
void gemm_float(const GemmTask& a) {
  const int64_t scale_stride = kAxisOut ? 0 : a.padded_k / a.group * (a.f32_scales ? 64 : 32);
  for (int64_t block = 0; block < a.blocks; ++block) {
    const uint8_t* const codes = a.codes + block * a.block_bytes;
    const uint8_t* const scales = kAxisOut ? nullptr : a.scales + block * scale_stride;
    const int outputs = a.outputs - block * 16 < 16 ? int(a.outputs - block * 16) : 16;
    const float* const bias = a.bias ? a.bias + block * 16 : nullptr;
    int64_t row = 0;
    for (; row + 4 <= a.m; row += 4) {
      gemm_float_block<kKind, kAxisOut, 4>(a, codes, scales, row, a.y + row * a.y_stride + block * 16, bias, outputs);
    }
    for (; row < a.m; ++row) {
      gemm_float_block<kKind, kAxisOut, 1>(a, codes, scales, row, a.y + row * a.y_stride + block * 16, bias, outputs);
    }
  }
}

// kN rows of w times kM rows of x, sixteen partial sums each, added lanes 8, 4, 2, 1 apart.
template <int kN, int kM>
inline void dot_tile(const FloatGemmTask& a, int64_t n, int64_t m) {
  const float* const w = a.w + n * a.k;
  const float* const x = a.x + m * a.x_stride;
  F32x16 sum[kN][kM];
  for (int i = 0; i < kN; ++i) {
    for (int t = 0; t < kM; ++t) sum[i][t] = set1(0.0f);
  }
  int64_t k = 0;
  for (; k + 16 <= a.k; k += 16) {
    F32x16 xs[kM];
    for (int t = 0; t < kM; ++t) xs[t] = load(x + t * a.x_stride + k);
    for (int i = 0; i < kN; ++i) {
      const F32x16 ws = load(w + i * a.k + k);
      for (int t = 0; t < kM; ++t) sum[i][t] = fma(ws, xs[t], sum[i][t]);
    }
  }
  if (k < a.k) {
    const int rest = int(a.k - k);
    for (int i = 0; i < kN; ++i) {
      const F32x16 ws = load_n(w + i * a.k + k, rest);
      for (int t = 0; t < kM; ++t) sum[i][t] = fma(ws, load_n(x + t * a.x_stride + k, rest), sum[i][t]);
    }
  }
  for (int i = 0; i < kN; ++i) {
    for (int t = 0; t < kM; ++t) {
      const float y = reduce_add(sum[i][t]);
      a.y[(m + t) * a.y_stride + n + i] = a.bias ? y + a.bias[n + i] : y;
    }
  }
}

void gemm_f32(const FloatGemmTask& a) {
  for (int64_t n = 0; n < a.n;) {
    const int64_t rows = a.n - n >= 4 ? 4 : 1;
    int64_t m = 0;
    for (; m + 2 <= a.m; m += 2) rows == 4 ? dot_tile<4, 2>(a, n, m) : dot_tile<1, 2>(a, n, m);
    if (m < a.m) rows == 4 ? dot_tile<4, 1>(a, n, m) : dot_tile<1, 1>(a, n, m);
    n += rows;
  }
}

#include "isa/recurrent_kernels.h"

// f(kind) for every kind of quantized weight, as a constant.
template <typename F>
inline void for_each_kind(F f) {
  f(std::integral_constant<int32_t, MOEC_INT4>());
  f(std::integral_constant<int32_t, MOEC_INT8>());
  f(std::integral_constant<int32_t, MOEC_IQ4_NL>());
  f(std::integral_constant<int32_t, MOEC_FP4>());
  f(std::integral_constant<int32_t, MOEC_NL3>());
}

// The integer kernels of a table: `of(kind, axis_out, by_block)` gives the function of three constants.
template <typename Of>
inline void set_gemm_int8(Kernels& t, Of of) {
  for_each_kind([&](auto kind) {
    constexpr std::false_type no;
    constexpr std::true_type yes;
    auto& functions = t.gemm_int8[kind() - 1];
    functions[0][0] = of(kind, no, no);
    functions[0][1] = of(kind, no, yes);
    functions[1][0] = of(kind, yes, no);
    functions[1][1] = of(kind, yes, yes);
  });
}

// Where integer kernels need one unsigned operand: what makes the small levels of FP4 0..24, those of NL3 0..29.
constexpr bool has_small_levels(int32_t kind) { return kind == MOEC_FP4 || kind == MOEC_NL3; }
constexpr int32_t small_offset(int32_t kind) { return kind == MOEC_FP4 ? 12 : 16; }

// Everything but the integer kernels. offset: what those add to int8 codes and to levels of their range, 0 or 128; small levels
// have none with 0, else their small_offset.
inline Kernels generic_table(int32_t offset) {
  Kernels t{};
  t.code_offset[MOEC_INT4 - 1] = 8;
  t.code_offset[MOEC_INT8 - 1] = t.code_offset[MOEC_IQ4_NL - 1] = offset;
  t.quantize = quantize;
  for_each_kind([&](auto kind) {
    if (has_small_levels(kind())) t.code_offset[kind() - 1] = offset ? small_offset(kind()) : 0;
    t.gemm_float[kind() - 1][0] = gemm_float<kind(), false>;
    t.gemm_float[kind() - 1][1] = gemm_float<kind(), true>;
  });
  t.gemm_f32 = gemm_f32;
  t.activate = activate;
  t.sigmoid = sigmoid;
  t.exponential = exponential;
  t.f16_to_f32 = f16_to_f32;
  t.add_scaled = add_scaled;
  t.add = add_rows;
  t.short_conv = short_conv;
  t.gated_delta = gated_delta;
  t.selective_scan = selective_scan;
  return t;
}

}  // namespace
}  // namespace moec

#endif  // MOEC_GENERIC_KERNELS_H_
