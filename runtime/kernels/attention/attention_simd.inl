// Attention, norms and RoPE over a vector type. Included once by each attention_<isa>.cpp, after it has defined, in its own
// anonymous namespace, the type `V` (one register of floats) and its operations:
//   constexpr int64_t kLanes, kRows = 6 (rows of a register tile), kCols (vectors of a register tile), kDecodeRows (query
//   heads whose sums over 4 vectors of values fit the registers), kKeysTogether (keys scored side by side)
//   load(const float*), load(const int8_t*) (widened), store, set1, zero, add, sub, mul, fma(a, b, c) = a*b + c, max, div
//   exp2i(V) = 2^n of an integral-valued n in [-126, 127], round, hsum, hmax, less_equal_select(a, b, x, y) = a <= b ? x : y
//   reduce(const V part[kLanes]) -> V whose lane i is the sum of part[i]
//   absolute; store_int8(int8_t*, V): rounded half to even, clamped to [-127, 127] (NaN becomes any code)
//   swap_pairs(V): (1, 0, 3, 2, ...); duplicate_pairs(const float* c): (c0, c0, c1, c1, ...) of kLanes/2 values;
//   alternate_sign(V): (-0, +1, -2, +3, ...) of the lanes
// No inline function of the standard library may be used here: the linker could pick this file's copy of it, compiled for
// this instruction set, for the whole program.

constexpr float kLog2e = 1.44269504088896340736f;
// ln 2 in two parts, the first exact in 15 bits: r = x - n ln2 loses nothing for |n| < 512
constexpr float kLn2High = 0.693145751953125f;
constexpr float kLn2Low = 1.42860682030941723212e-6f;
constexpr float kNegative = -3.402823466e38f;  // stands for "no key": finite, so that differences stay numbers

// e^x for x <= 0 to 2 units in the last place; 0 below -87. NaN stays NaN.
inline V exp_negative(V x) {
  const V low = set1(-87.3365f);
  const V n = round(mul(x, set1(kLog2e)));
  V r = fma(n, set1(-kLn2High), x);
  r = fma(n, set1(-kLn2Low), r);
  V p = set1(1.0f / 5040.0f);
  p = fma(p, r, set1(1.0f / 720.0f));
  p = fma(p, r, set1(1.0f / 120.0f));
  p = fma(p, r, set1(1.0f / 24.0f));
  p = fma(p, r, set1(1.0f / 6.0f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  // n is meaningless below `low`: it is replaced before it becomes an exponent, and the product thrown away
  const V exponent = less_equal_select(x, low, zero(), n);
  return less_equal_select(x, low, zero(), mul(p, exp2i(exponent)));
}

// C[rows][cols] = factor[row] * C + A B.   A[i][k] = a[i * a_row + k * a_col], B row-major (float or int8), C row-major.
// `factor` null: C is overwritten.
template <int Rows, int Cols, typename B>
inline void multiply(int64_t depth, const float* a, int64_t a_row, int64_t a_col, const B* b, int64_t b_row, float* c,
                     int64_t c_row, const float* factor) {
  V sum[Rows][Cols];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Cols; ++j)
      sum[i][j] = factor ? mul(set1(factor[i]), load(c + i * c_row + j * kLanes)) : zero();
  for (int64_t k = 0; k < depth; ++k) {
    V right[Cols];
    for (int j = 0; j < Cols; ++j) right[j] = load(b + k * b_row + j * kLanes);
    for (int i = 0; i < Rows; ++i) {
      const V left = set1(a[i * a_row + k * a_col]);
      for (int j = 0; j < Cols; ++j) sum[i][j] = fma(left, right[j], sum[i][j]);
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Cols; ++j) store(c + i * c_row + j * kLanes, sum[i][j]);
}

template <int Cols, typename B>
inline void multiply_rows(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_col, const B* b,
                          int64_t b_row, float* c, int64_t c_row, const float* factor) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    multiply<kRows, Cols>(depth, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, factor ? factor + i : factor);
  a += i * a_row;
  c += i * c_row;
  factor = factor ? factor + i : factor;
  switch (rows - i) {
    case 1: return multiply<1, Cols>(depth, a, a_row, a_col, b, b_row, c, c_row, factor);
    case 2: return multiply<2, Cols>(depth, a, a_row, a_col, b, b_row, c, c_row, factor);
    case 3: return multiply<3, Cols>(depth, a, a_row, a_col, b, b_row, c, c_row, factor);
    case 4: return multiply<4, Cols>(depth, a, a_row, a_col, b, b_row, c, c_row, factor);
    case 5: return multiply<5, Cols>(depth, a, a_row, a_col, b, b_row, c, c_row, factor);
    default: return;
  }
}

// cols must be a multiple of kLanes.
template <typename B>
inline void multiply_all(int64_t rows, int64_t cols, int64_t depth, const float* a, int64_t a_row, int64_t a_col, const B* b,
                         int64_t b_row, float* c, int64_t c_row, const float* factor) {
  static_assert(kRows <= 6 && kCols <= 4, "the remainder switches end there");
  int64_t j = 0;
  for (; j + kCols * kLanes <= cols; j += kCols * kLanes)
    multiply_rows<kCols>(rows, depth, a, a_row, a_col, b + j, b_row, c + j, c_row, factor);
  switch ((cols - j) / kLanes) {
    case 1: return multiply_rows<1>(rows, depth, a, a_row, a_col, b + j, b_row, c + j, c_row, factor);
    case 2: return multiply_rows<2>(rows, depth, a, a_row, a_col, b + j, b_row, c + j, c_row, factor);
    case 3: return multiply_rows<3>(rows, depth, a, a_row, a_col, b + j, b_row, c + j, c_row, factor);
    default: return;
  }
}

// ------------------------------------------------------------------------------------------------------------ many tokens
//
// Scores are kept transposed, [key][row]: the product K Q^T then reads keys as the broadcast operand, straight from the
// cache, no key is ever transposed, and the softmax works on `kLanes` rows at a time without horizontal sums.

template <typename C>
inline void widen_rows(const C* cache, const float* scales, int64_t first, int64_t count, int64_t kv_heads, int64_t head,
                       int64_t d, int64_t width, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = (first + i) * kv_heads + head;
    const C* x = cache + row * d;
    const float s = scales ? scales[row] : 1.0f;
    float* y = out + i * width;
    int64_t j = 0;
    for (; j + kLanes <= d; j += kLanes) store(y + j, mul(load(x + j), set1(s)));
    for (; j < d; ++j) y[j] = static_cast<float>(x[j]) * s;
    for (; j < width; ++j) y[j] = 0.0f;
  }
}

template <typename C>
void tile_of(const AttentionCall& call, const AttentionItem& item, float* scratch) {
  const int64_t d = call.head_dim, e = call.value_dim, kv = call.kv_heads, per = call.heads / kv;
  const int64_t tokens = item.token_end - item.token_begin, rows = tokens * per;
  const int64_t rows_padded = padded(rows, kLanes), d_padded = padded(d, kLanes), e_padded = padded(e, kLanes);
  float* q_t = scratch;                              // [d][rows_padded], scaled
  float* scores = q_t + d * rows_padded;             // [kKeyBlock][rows_padded]
  float* keys = scores + kKeyBlock * rows_padded;    // [kKeyBlock][d_padded]
  float* values = keys + kKeyBlock * d_padded;       // [kKeyBlock][e_padded]
  float* acc = values + kKeyBlock * e_padded;        // [rows_padded][e_padded]
  float* row_max = acc + rows_padded * e_padded;     // [rows_padded], and so on
  float* row_sum = row_max + rows_padded;
  float* factor = row_sum + rows_padded;
  float* last_key = factor + rows_padded;            // positions relative to key_begin, exact as floats (< 2^24)
  float* first_key = last_key + rows_padded;

  for (int64_t r = 0; r < rows_padded; ++r) {
    const int64_t token = item.token_begin + (r < rows ? r / per : tokens - 1);
    last_key[r] = static_cast<float>(call.start + token - item.key_begin);
    first_key[r] = static_cast<float>(call.first_key(token) - item.key_begin);
    row_max[r] = kNegative;
    row_sum[r] = 0.0f;
    if (r >= rows) {
      for (int64_t j = 0; j < d; ++j) q_t[j * rows_padded + r] = 0.0f;
      continue;
    }
    const float* q = call.q + (token * call.heads + item.kv_head * per + r % per) * d;
    for (int64_t j = 0; j < d; ++j) q_t[j * rows_padded + r] = q[j] * call.scale;
  }
  for (int64_t i = 0; i < rows_padded * e_padded; ++i) acc[i] = 0.0f;

  const C* k_cache = static_cast<const C*>(call.k_cache);
  const C* v_cache = static_cast<const C*>(call.v_cache);
  // between these two every key is visible to every row: no masking
  const int64_t all_from = call.first_key(item.token_end - 1), all_to = call.start + item.token_begin + 1;
  for (int64_t begin = item.key_begin; begin < item.key_end; begin += kKeyBlock) {
    const int64_t count = item.key_end - begin < kKeyBlock ? item.key_end - begin : kKeyBlock;
    widen_rows(k_cache, call.k_scale, begin, count, kv, item.kv_head, d, d_padded, keys);
    widen_rows(v_cache, call.v_scale, begin, count, kv, item.kv_head, e, e_padded, values);
    multiply_all<float>(count, rows_padded, d, keys, d_padded, 1, q_t, rows_padded, scores, rows_padded, nullptr);
    const bool masked = begin < all_from || begin + count > all_to;
    const float offset = static_cast<float>(begin - item.key_begin);
    for (int64_t r = 0; r < rows_padded; r += kLanes) {
      float* column = scores + r;
      const V last = load(last_key + r), first = load(first_key + r), old = load(row_max + r);
      V top = old;
      for (int64_t i = 0; i < count; ++i) {
        V s = load(column + i * rows_padded);
        if (masked) {
          const V position = set1(offset + static_cast<float>(i));
          s = less_equal_select(position, last, s, set1(kNegative));
          s = less_equal_select(first, position, s, set1(kNegative));
          store(column + i * rows_padded, s);
        }
        top = max(top, s);
      }
      V sum = zero();
      const V nothing = set1(kNegative);
      for (int64_t i = 0; i < count; ++i) {
        const V s = load(column + i * rows_padded);
        V p = exp_negative(sub(s, top));
        // a row that has seen no key yet has top == kNegative, and every score would weigh e^0
        if (masked) p = less_equal_select(s, nothing, zero(), p);
        store(column + i * rows_padded, p);
        sum = add(sum, p);
      }
      const V shrink = exp_negative(sub(old, top));
      store(factor + r, shrink);
      store(row_max + r, top);
      store(row_sum + r, fma(load(row_sum + r), shrink, sum));
    }
    multiply_all<float>(rows, e_padded, count, scores, 1, rows_padded, values, e_padded, acc, e_padded, factor);
  }

  for (int64_t r = 0; r < rows; ++r) {
    const float* from = acc + r * e_padded;
    if (item.partial_acc) {
      for (int64_t j = 0; j < e; ++j) item.partial_acc[r * e + j] = from[j];
      item.partial_max[r] = row_max[r];
      item.partial_sum[r] = row_sum[r];
      continue;
    }
    const float inverse = 1.0f / row_sum[r];
    float* to = call.out + ((item.token_begin + r / per) * call.heads + item.kv_head * per + r % per) * e;
    for (int64_t j = 0; j < e; ++j) to[j] = from[j] * inverse;
  }
}

// -------------------------------------------------------------------------------------------------------------- one token
//
// Bound by reading the cache, whose rows of all KV heads lie side by side: one pass over the keys, then one over the
// values, each for all heads. A head's vectors are widened once for the query heads that share them.

// Asks for `bytes` bytes from `p` on, one cache line at a time. Touches no memory: p may lie beyond the cache.
inline void prefetch(const void* p, int64_t bytes) {
  const char* c = static_cast<const char*>(p);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(c + i);
}

// scores[j][i] = q_j . key_i of Queries query heads, i < count. kKeysTogether keys share one load of the queries.
template <int Queries, typename C>
inline void dot_keys(const float* q, int64_t d, const C* keys, int64_t key_stride, int64_t count, float* scores,
                     int64_t score_stride) {
  static_assert(kLanes % kKeysTogether == 0, "whole steps");
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t lanes = count - i < kLanes ? count - i : kLanes;
    V part[Queries][kLanes];
    for (int64_t lane = 0; lane < kLanes; lane += kKeysTogether) {
      const C* key[kKeysTogether];
      // past the end: the last key again, its scores are not stored
      for (int64_t m = 0; m < kKeysTogether; ++m)
        key[m] = keys + (lane + m < lanes ? i + lane + m : count - 1) * key_stride;
      V sum[Queries][kKeysTogether];
      for (int j = 0; j < Queries; ++j)
        for (int64_t m = 0; m < kKeysTogether; ++m) sum[j][m] = zero();
      for (int64_t c = 0; c < d; c += kLanes) {
        V k[kKeysTogether];
        for (int64_t m = 0; m < kKeysTogether; ++m) k[m] = load(key[m] + c);
        for (int j = 0; j < Queries; ++j) {
          const V query = load(q + j * d + c);
          for (int64_t m = 0; m < kKeysTogether; ++m) sum[j][m] = fma(k[m], query, sum[j][m]);
        }
      }
      for (int j = 0; j < Queries; ++j)
        for (int64_t m = 0; m < kKeysTogether; ++m) part[j][lane + m] = sum[j][m];
    }
    for (int j = 0; j < Queries; ++j) {
      const V total = reduce(part[j]);
      if (lanes == kLanes) {
        store(scores + j * score_stride + i, total);
        continue;
      }
      float tail[kLanes];
      store(tail, total);
      for (int64_t lane = 0; lane < lanes; ++lane) scores[j * score_stride + i + lane] = tail[lane];
    }
  }
}

template <typename C>
inline void dot_keys_of(int64_t queries, const float* q, int64_t d, const C* keys, int64_t key_stride, int64_t count,
                        float* scores, int64_t score_stride) {
  while (queries > 0) {
    const int64_t parts = (queries + 3) / 4, now = (queries + parts - 1) / parts;
    switch (now) {
      case 1: dot_keys<1>(q, d, keys, key_stride, count, scores, score_stride); break;
      case 2: dot_keys<2>(q, d, keys, key_stride, count, scores, score_stride); break;
      case 3: dot_keys<3>(q, d, keys, key_stride, count, scores, score_stride); break;
      default: dot_keys<4>(q, d, keys, key_stride, count, scores, score_stride); break;
    }
    queries -= now;
    q += now * d;
    scores += now * score_stride;
  }
}

// Scores become weights: e^(s * k_factor - max) * v_factor of `count` keys, 0 behind them; max and the sum of the e's.
inline void weigh(float* s, int64_t count, int64_t stride, const float* k_factor, const float* v_factor, float* row_max,
                  float* row_sum) {
  for (int64_t i = count; i < stride; ++i) s[i] = 0.0f;
  V top = set1(kNegative);
  for (int64_t i = 0; i < stride; i += kLanes) {
    const V x = mul(load(s + i), load(k_factor + i));
    store(s + i, x);
    if (i + kLanes <= count) top = max(top, x);
  }
  float highest = hmax(top);
  for (int64_t i = count / kLanes * kLanes; i < count; ++i) highest = s[i] > highest ? s[i] : highest;
  for (int64_t i = count; i < stride; ++i) s[i] = kNegative;
  V sum = zero();
  for (int64_t i = 0; i < stride; i += kLanes) {
    const V p = exp_negative(sub(load(s + i), set1(highest)));
    store(s + i, mul(p, load(v_factor + i)));
    sum = add(sum, p);
  }
  *row_max = highest;
  *row_sum = hsum(sum);
}

// factor[i] = scale * from[i * step] of `count` keys (scale itself where `from` is null), 0 behind them.
inline void gather_factors(const float* from, int64_t step, float scale, int64_t count, int64_t stride, float* factor) {
  int64_t i = 0;
  for (; from && i + 4 <= count; i += 4, from += 4 * step) {
    const float a = from[0], b = from[step], c = from[2 * step], d = from[3 * step];
    factor[i] = scale * a;
    factor[i + 1] = scale * b;
    factor[i + 2] = scale * c;
    factor[i + 3] = scale * d;
  }
  for (; i < count; ++i) {
    factor[i] = from ? scale * *from : scale;
    from = from ? from + step : from;
  }
  for (; i < stride; ++i) factor[i] = 0.0f;
}

// acc[row][0 .. Cols) (+)= sum over n keys of weight[row][key] * value[key]. Each value is widened once for all rows.
template <int Rows, int Cols, typename C>
inline void add_values(int64_t n, const float* weights, int64_t stride, const C* values, int64_t value_stride, int64_t e,
                       float* acc, bool first) {
  V sum[Rows][Cols];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Cols; ++j) sum[i][j] = first ? zero() : load(acc + i * e + j * kLanes);
  for (int64_t k = 0; k < n; ++k) {
    V left[Rows];
    for (int i = 0; i < Rows; ++i) left[i] = set1(weights[i * stride + k]);
    for (int j = 0; j < Cols; ++j) {
      const V value = load(values + k * value_stride + j * kLanes);
      for (int i = 0; i < Rows; ++i) sum[i][j] = fma(left[i], value, sum[i][j]);
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Cols; ++j) store(acc + i * e + j * kLanes, sum[i][j]);
}

template <int Rows, typename C>
inline void add_value_columns(int64_t n, const float* weights, int64_t stride, const C* values, int64_t value_stride,
                              int64_t e, float* acc, bool first) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= e; j += 4 * kLanes)
    add_values<Rows, 4>(n, weights, stride, values + j, value_stride, e, acc + j, first);
  for (; j < e; j += kLanes) add_values<Rows, 1>(n, weights, stride, values + j, value_stride, e, acc + j, first);
}

template <typename C>
inline void add_values_of(int64_t queries, int64_t n, const float* weights, int64_t stride, const C* values,
                          int64_t value_stride, int64_t e, float* acc, bool first) {
  static_assert(kDecodeRows >= 3 && kDecodeRows <= 5, "the cases below");
  while (queries > 0) {
    const int64_t parts = (queries + kDecodeRows - 1) / kDecodeRows, now = (queries + parts - 1) / parts;
    switch (now) {
      case 1: add_value_columns<1>(n, weights, stride, values, value_stride, e, acc, first); break;
      case 2: add_value_columns<2>(n, weights, stride, values, value_stride, e, acc, first); break;
      case 3: add_value_columns<3>(n, weights, stride, values, value_stride, e, acc, first); break;
      case 4: add_value_columns<kDecodeRows >= 4 ? 4 : 1>(n, weights, stride, values, value_stride, e, acc, first); break;
      default: add_value_columns<kDecodeRows >= 5 ? 5 : 1>(n, weights, stride, values, value_stride, e, acc, first); break;
    }
    queries -= now;
    weights += now * stride;
    acc += now * e;
  }
}

template <typename C>
void decode_of(const AttentionCall& call, const AttentionItem& item, float* scratch) {
  const int64_t d = call.head_dim, e = call.value_dim, kv = call.kv_heads, per = call.heads / kv;
  const int64_t count = item.key_end - item.key_begin;
  const int64_t stride = padded(count, kLanes);
  const C* k_cache = static_cast<const C*>(call.k_cache) + item.key_begin * kv * d;
  const C* v_cache = static_cast<const C*>(call.v_cache) + item.key_begin * kv * e;
  float* scores = scratch;  // [H][stride]
  float* k_factor = scores + call.heads * stride;  // [stride], of one KV head
  float* v_factor = k_factor + stride;
  for (int64_t begin = 0; begin < count; begin += kKeyBlock) {
    const int64_t n = count - begin < kKeyBlock ? count - begin : kKeyBlock;
    for (int64_t g = 0; g < kv; ++g) {
      // heads visit the block one after the other, in strides: each asks for its share of the next block, so that the
      // memory sees one steady stream. After the last block come the first values.
      if (begin + kKeyBlock < count)
        prefetch(k_cache + ((begin + kKeyBlock) * kv + g * kKeyBlock) * d, kKeyBlock * d * int64_t{sizeof(C)});
      else
        prefetch(v_cache + g * kKeyBlock * e, kKeyBlock * e * int64_t{sizeof(C)});
      dot_keys_of(per, call.q + g * per * d, d, k_cache + (begin * kv + g) * d, kv * d, n, scores + g * per * stride + begin,
                  stride);
    }
  }
  for (int64_t g = 0; g < kv; ++g) {
    const float* k_scale = call.k_scale ? call.k_scale + item.key_begin * kv + g : nullptr;
    const float* v_scale = call.v_scale ? call.v_scale + item.key_begin * kv + g : nullptr;
    gather_factors(k_scale, kv, call.scale, count, stride, k_factor);
    gather_factors(v_scale, kv, 1.0f, count, stride, v_factor);
    for (int64_t h = g * per; h < (g + 1) * per; ++h)
      weigh(scores + h * stride, count, stride, k_factor, v_factor, item.partial_max + h, item.partial_sum + h);
  }
  for (int64_t begin = 0; begin < count; begin += kKeyBlock) {
    const int64_t n = count - begin < kKeyBlock ? count - begin : kKeyBlock;
    for (int64_t g = 0; g < kv; ++g) {
      if (begin + kKeyBlock < count)
        prefetch(v_cache + ((begin + kKeyBlock) * kv + g * kKeyBlock) * e, kKeyBlock * e * int64_t{sizeof(C)});
      add_values_of(per, n, scores + g * per * stride + begin, stride, v_cache + (begin * kv + g) * e, kv * e, e,
                    item.partial_acc + g * per * e, begin == 0);
    }
  }
}

void tile(const AttentionCall& call, const AttentionItem& item, float* scratch) {
  if (call.k_scale) return tile_of<int8_t>(call, item, scratch);
  tile_of<float>(call, item, scratch);
}

void decode(const AttentionCall& call, const AttentionItem& item, float* scratch) {
  if (call.k_scale) return decode_of<int8_t>(call, item, scratch);
  decode_of<float>(call, item, scratch);
}

void quantize_row(const float* x, int64_t n, int8_t* q, float* scale) {
  V top = zero(), wrong = zero();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const V v = load(x + i);
    top = max(top, absolute(v));
    wrong = add(wrong, sub(v, v));  // 0, or NaN if v is not finite
  }
  float highest = hmax(top), fault = hsum(wrong);
  for (; i < n; ++i) {
    const float a = x[i] < 0 ? -x[i] : x[i];
    highest = a > highest ? a : highest;
    fault += x[i] - x[i];
  }
  *scale = highest / 127.0f + fault;  // a row with a value that is not finite becomes NaN as a whole
  const float inverse = highest > 0 ? 127.0f / highest : 0.0f;
  i = 0;
  for (; i + kLanes <= n; i += kLanes) store_int8(q + i, mul(load(x + i), set1(inverse)));
  if (i == n) return;
  float tail[kLanes] = {};
  int8_t codes[kLanes];
  for (int64_t j = i; j < n; ++j) tail[j - i] = x[j];
  store_int8(codes, mul(load(tail), set1(inverse)));
  for (int64_t j = i; j < n; ++j) q[j] = codes[j - i];
}

void rms_norm_row(const float* x, const float* weight, int64_t n, float eps, float* y) {
  V sum = zero();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = fma(load(x + i), load(x + i), sum);
  float total = hsum(sum);
  for (; i < n; ++i) total += x[i] * x[i];
  const float factor = 1.0f / __builtin_sqrtf(total / static_cast<float>(n) + eps);
  i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    V v = mul(load(x + i), set1(factor));
    if (weight) v = mul(v, load(weight + i));
    store(y + i, v);
  }
  for (; i < n; ++i) y[i] = weight ? x[i] * factor * weight[i] : x[i] * factor;
}

void rope_row(const float* x, const float* cos, const float* sin, int64_t n, bool interleaved, float* y) {
  const int64_t half = n / 2;
  if (interleaved) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const V v = load(x + i), c = duplicate_pairs(cos + i / 2), s = alternate_sign(duplicate_pairs(sin + i / 2));
      store(y + i, fma(v, c, mul(swap_pairs(v), s)));
    }
    for (; i < n; i += 2) {
      const float a = x[i], b = x[i + 1], c = cos[i / 2], s = sin[i / 2];
      y[i] = a * c - b * s;
      y[i + 1] = b * c + a * s;
    }
    return;
  }
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const V a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(y + i, sub(mul(a, c), mul(b, s)));
    store(y + half + i, fma(b, c, mul(a, s)));
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i], c = cos[i], s = sin[i];
    y[i] = a * c - b * s;
    y[half + i] = b * c + a * s;
  }
}
