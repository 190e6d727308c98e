// Attention, norms and RoPE over a vector type. Included once by each attention_<isa>.cpp, after it has defined, in its own
// anonymous namespace, the type `V` (one register of floats) and its operations:
//   constexpr int64_t kLanes, kRows = 6 (rows of a register tile), kCols (vectors of a register tile), kDecodeRows (query
//   heads whose sums over 4 vectors of values fit the registers), kKeysTogether (keys scored side by side),
//   kScoreKeys x kScoreCols (keys and vectors of rows whose scores one step of a tile sums)
//   load(const float*), load(const int8_t*) (widened), store, set1, zero, add, sub, mul, div, fma(a, b, c) = a*b + c, max
//   exp2i(V) = 2^n of an integral-valued n in [-126, 127], round, hsum, hmax, less_equal_select(a, b, x, y) = a <= b ? x : y
//   reduce(const V part[kLanes]) -> V whose lane i is the sum of part[i]: lanes kOrder[0] + kOrder[1], kOrder[2] + kOrder[3],
//   ..., then sums of neighbours again. constexpr int kOrder[kLanes] says that order, in which a tile sums too
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

// tanh(x) to 3 units in the last place: near 0 an odd polynomial (least squares, relative error 1e-9 before rounding), beyond
// it (1 - e^-2|x|) / (1 + e^-2|x|).
inline V tanh_of(V x) {
  const V size = absolute(x), one = set1(1.0f), e = exp_negative(mul(size, set1(-2.0f)));
  const V positive = div(sub(one, e), add(one, e)), far = less_equal_select(x, zero(), sub(zero(), positive), positive);
  const V z = mul(x, x);
  V p = set1(-0.00627423f);
  p = fma(p, z, set1(0.02107167f));
  p = fma(p, z, set1(-0.05385231f));
  p = fma(p, z, set1(0.13332586f));
  p = fma(p, z, set1(-0.33333318f));
  return less_equal_select(size, set1(0.55f), fma(mul(p, z), x, x), far);
}

// softcap * tanh(s / softcap) of scores [n], n a multiple of kLanes.
inline void cap_scores(float* s, int64_t n, float softcap) {
  const V limit = set1(softcap), inverse = set1(1.0f / softcap);
  for (int64_t i = 0; i < n; i += kLanes) store(s + i, mul(limit, tanh_of(mul(load(s + i), inverse))));
}

// C[rows][cols] = A B, or with `more` C + A B.   A[i][k] = a[i * a_row + k * a_col], B row-major, C row-major.
template <int Rows, int Cols>
inline void multiply(int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, float* c,
                     int64_t c_row, bool more) {
  V sum[Rows][Cols];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Cols; ++j) sum[i][j] = more ? load(c + i * c_row + j * kLanes) : zero();
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

template <int Cols>
inline void multiply_rows(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b,
                          int64_t b_row, float* c, int64_t c_row, bool more) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    multiply<kRows, Cols>(depth, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, more);
  a += i * a_row;
  c += i * c_row;
  switch (rows - i) {
    case 1: return multiply<1, Cols>(depth, a, a_row, a_col, b, b_row, c, c_row, more);
    case 2: return multiply<2, Cols>(depth, a, a_row, a_col, b, b_row, c, c_row, more);
    case 3: return multiply<3, Cols>(depth, a, a_row, a_col, b, b_row, c, c_row, more);
    case 4: return multiply<4, Cols>(depth, a, a_row, a_col, b, b_row, c, c_row, more);
    case 5: return multiply<5, Cols>(depth, a, a_row, a_col, b, b_row, c, c_row, more);
    default: return;
  }
}

// cols must be a multiple of kLanes.
inline void multiply_all(int64_t rows, int64_t cols, int64_t depth, const float* a, int64_t a_row, int64_t a_col,
                         const float* b, int64_t b_row, float* c, int64_t c_row, bool more) {
  static_assert(kRows <= 6 && kCols <= 4, "the remainder switches end there");
  int64_t j = 0;
  for (; j + kCols * kLanes <= cols; j += kCols * kLanes)
    multiply_rows<kCols>(rows, depth, a, a_row, a_col, b + j, b_row, c + j, c_row, more);
  switch ((cols - j) / kLanes) {
    case 1: return multiply_rows<1>(rows, depth, a, a_row, a_col, b + j, b_row, c + j, c_row, more);
    case 2: return multiply_rows<2>(rows, depth, a, a_row, a_col, b + j, b_row, c + j, c_row, more);
    case 3: return multiply_rows<3>(rows, depth, a, a_row, a_col, b + j, b_row, c + j, c_row, more);
    default: return;
  }
}

// The sum of part[kLanes], lane by lane, in the order in which `reduce` sums the lanes of one vector.
template <int Count = kLanes>
inline V ordered_sum(const V* part, int first = 0) {
  if constexpr (Count == 1) {
    return part[kOrder[first]];
  } else {
    return add(ordered_sum<Count / 2>(part, first), ordered_sum<Count / 2>(part, first + Count / 2));
  }
}

// Keys x Cols vectors of scores.
template <int Keys, int Cols>
struct Scores {
  V v[Keys][Cols];
};

// The dot products of Keys keys with Cols * kLanes rows, of which q_t [width][q_stride] is the transpose: the sums that
// `dot_keys` has in its lanes, one lane after the other, added as `reduce` adds them.
// Width: that of the keys, or 0 where it is not known here.
template <int Keys, int Cols, int Width, int Count = kLanes>
inline __attribute__((always_inline)) Scores<Keys, Cols> dot_rows(int64_t any_width, const float* keys, const float* q_t,
                                                                  int64_t q_stride, int first = 0) {
  const int64_t width = Width ? Width : any_width;
  Scores<Keys, Cols> sum;
  if constexpr (Count == 1) {
    for (int i = 0; i < Keys; ++i)
      for (int j = 0; j < Cols; ++j) sum.v[i][j] = zero();
    _Pragma("GCC unroll 16") for (int64_t k = kOrder[first]; k < width; k += kLanes) {
      V right[Cols];
      for (int j = 0; j < Cols; ++j) right[j] = load(q_t + k * q_stride + j * kLanes);
      for (int i = 0; i < Keys; ++i) {
        const V left = set1(keys[i * width + k]);
        for (int j = 0; j < Cols; ++j) sum.v[i][j] = fma(left, right[j], sum.v[i][j]);
      }
    }
  } else {
    const auto a = dot_rows<Keys, Cols, Width, Count / 2>(width, keys, q_t, q_stride, first);
    const auto b = dot_rows<Keys, Cols, Width, Count / 2>(width, keys, q_t, q_stride, first + Count / 2);
    for (int i = 0; i < Keys; ++i)
      for (int j = 0; j < Cols; ++j) sum.v[i][j] = add(a.v[i][j], b.v[i][j]);
  }
  return sum;
}

template <int Keys, int Cols, int Width>
inline void score(int64_t width, const float* keys, const float* factor, const float* q_t, int64_t rows, float* scores) {
  const auto sum = dot_rows<Keys, Cols, Width>(width, keys, q_t, rows);
  for (int i = 0; i < Keys; ++i)
    for (int j = 0; j < Cols; ++j) store(scores + i * rows + j * kLanes, mul(sum.v[i][j], set1(factor[i])));
}

template <int Cols, int Width>
inline void score_keys(int64_t count, int64_t width, const float* keys, const float* factor, const float* q_t, int64_t rows,
                       float* scores) {
  int64_t i = 0;
  for (; i + kScoreKeys <= count; i += kScoreKeys)
    score<kScoreKeys, Cols, Width>(width, keys + i * width, factor + i, q_t, rows, scores + i * rows);
  for (; i < count; ++i) score<1, Cols, Width>(width, keys + i * width, factor + i, q_t, rows, scores + i * rows);
}

template <int Width>
inline void score_rows(int64_t count, int64_t width, const float* keys, const float* factor, const float* q_t, int64_t rows,
                       float* scores) {
  int64_t j = 0;
  for (; j + kScoreCols * kLanes <= rows; j += kScoreCols * kLanes)
    score_keys<kScoreCols, Width>(count, width, keys, factor, q_t + j, rows, scores + j);
  for (; j < rows; j += kLanes) score_keys<1, Width>(count, width, keys, factor, q_t + j, rows, scores + j);
}

// scores[key][row] = factor[key] * key . row; `rows` and `width` are multiples of kLanes.
inline void score_all(int64_t count, int64_t width, const float* keys, const float* factor, const float* q_t, int64_t rows,
                      float* scores) {
  if (width == 64) return score_rows<64>(count, width, keys, factor, q_t, rows, scores);
  if (width == 128) return score_rows<128>(count, width, keys, factor, q_t, rows, scores);
  score_rows<0>(count, width, keys, factor, q_t, rows, scores);
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

// ------------------------------------------------------------------------------------------------------------ many tokens
//
// Scores are kept transposed, [key][row]: the product K Q^T then reads keys as the broadcast operand, straight from the
// cache, no key is ever transposed, and the softmax works on `kLanes` rows at a time without horizontal sums.

template <typename C>
inline void widen_rows(const C* cache, int64_t first, int64_t count, int64_t kv_heads, int64_t head, int64_t d, int64_t width,
                       float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const C* x = cache + ((first + i) * kv_heads + head) * d;
    float* y = out + i * width;
    int64_t j = 0;
    for (; j + kLanes <= d; j += kLanes) store(y + j, load(x + j));
    for (; j < d; ++j) y[j] = static_cast<float>(x[j]);
    for (; j < width; ++j) y[j] = 0.0f;
  }
}

// Scores [count][rows] become weights, kLanes rows at a time: e^(score - max) * v_factor[key], with 0 for keys that a row does
// not see; sums are taken in the order of `weigh`.
inline void weigh_rows(float* scores, int64_t count, int64_t rows, bool masked, const float* first_key, const float* last_key,
                       const float* v_factor, float* row_max, float* row_sum) {
  const V nothing = set1(kNegative);
  for (int64_t r = 0; r < rows; r += kLanes) {
    float* column = scores + r;
    const V last = load(last_key + r), first = load(first_key + r);
    V top = nothing;
    for (int64_t i = 0; i < count; ++i) {
      V s = load(column + i * rows);
      if (masked) {
        const V position = set1(static_cast<float>(i));
        s = less_equal_select(position, last, s, nothing);
        s = less_equal_select(first, position, s, nothing);
        store(column + i * rows, s);
      }
      top = max(top, s);
    }
    V part[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) part[lane] = zero();
    for (int64_t begin = 0; begin < count; begin += kLanes) {
      const int64_t n = count - begin < kLanes ? count - begin : kLanes;
      for (int64_t lane = 0; lane < n; ++lane) {
        float* at = column + (begin + lane) * rows;
        const V s = load(at);
        V p = exp_negative(sub(s, top));
        // a row that sees none of these keys has top == kNegative, and every score would get weight e^0
        if (masked) p = less_equal_select(s, nothing, zero(), p);
        part[lane] = add(part[lane], p);
        store(at, mul(p, set1(v_factor[begin + lane])));
      }
    }
    store(row_max + r, top);
    store(row_sum + r, ordered_sum(part));
  }
}

template <typename C>
void tile_of(const AttentionCall& call, const AttentionItem& item, float* scratch) {
  const int64_t d = call.head_dim, e = call.value_dim, kv = call.kv_heads, per = call.heads / kv, g = item.kv_begin;
  const int64_t rows = (item.token_end - item.token_begin) * per, count = item.key_end - item.key_begin;
  const int64_t rows_padded = padded(rows, kLanes), d_padded = padded(d, kLanes), e_padded = padded(e, kLanes);
  float* q_t = scratch;                              // [d_padded][rows_padded]
  float* scores = q_t + d_padded * rows_padded;      // [kKeyChunk][rows_padded]
  float* acc = scores + kKeyChunk * rows_padded;     // [rows_padded][e_padded]
  float* first_key = acc + rows_padded * e_padded;   // [rows_padded]: relative to key_begin, exact as floats (< 2^24)
  float* last_key = first_key + rows_padded;
  float* block = last_key + rows_padded;             // [kKeyBlock][d_padded + e_padded]
  float* k_factor = block + kKeyBlock * (d_padded + e_padded);  // [kKeyChunk]
  float* v_factor = k_factor + kKeyChunk;

  for (int64_t r = 0; r < rows_padded; ++r) {
    const int64_t token = r < rows ? item.token_begin + r / per : item.token_end - 1;
    last_key[r] = static_cast<float>(call.start + token - item.key_begin);
    first_key[r] = static_cast<float>(call.first_key(token) - item.key_begin);
    const float* q = call.q + (token * call.heads + g * per + r % per) * d;
    for (int64_t j = 0; j < d_padded; ++j) q_t[j * rows_padded + r] = r < rows && j < d ? q[j] : 0.0f;
  }
  gather_factors(call.k_scale ? call.k_scale + item.key_begin * kv + g : nullptr, kv, call.scale, count, count, k_factor);
  gather_factors(call.v_scale ? call.v_scale + item.key_begin * kv + g : nullptr, kv, 1.0f, count, count, v_factor);

  const C* k_cache = static_cast<const C*>(call.k_cache);
  const C* v_cache = static_cast<const C*>(call.v_cache);
  for (int64_t begin = 0; begin < count; begin += kKeyBlock) {
    const int64_t n = count - begin < kKeyBlock ? count - begin : kKeyBlock;
    widen_rows(k_cache, item.key_begin + begin, n, kv, g, d, d_padded, block);
    score_all(n, d_padded, block, k_factor + begin, q_t, rows_padded, scores + begin * rows_padded);
    if (call.softcap > 0.0f) cap_scores(scores + begin * rows_padded, n * rows_padded, call.softcap);
  }
  // between these two every key is visible to every row: no masking
  const int64_t all_from = call.first_key(item.token_end - 1), all_to = call.start + item.token_begin + 1;
  const bool masked = item.key_begin < all_from || item.key_end > all_to;
  weigh_rows(scores, count, rows_padded, masked, first_key, last_key, v_factor, acc, acc + rows_padded);
  for (int64_t r = 0; r < rows; ++r) {
    item.partial_max[r] = acc[r];
    item.partial_sum[r] = acc[rows_padded + r];
  }
  for (int64_t begin = 0; begin < count; begin += kKeyBlock) {
    const int64_t n = count - begin < kKeyBlock ? count - begin : kKeyBlock;
    widen_rows(v_cache, item.key_begin + begin, n, kv, g, e, e_padded, block);
    multiply_all(rows, e_padded, n, scores + begin * rows_padded, 1, rows_padded, block, e_padded, acc, e_padded, begin > 0);
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < e; ++j) item.partial_acc[r * e + j] = acc[r * e_padded + j];
}

// -------------------------------------------------------------------------------------------------------------- one token
//
// Bound by reading the cache, whose rows of all KV heads lie side by side: one pass over the keys, then one over the
// values, each for all heads. A head's vectors are widened once for the query heads that share them.

// Prefetches `bytes` bytes from `p` on, one cache line at a time. Reads nothing: p may lie beyond the KV cache.
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

// Scores become weights: e^(s * k_factor, capped, - max) * v_factor of keys [skip, count), 0 before and behind them; max and the sum of
// the e's.
inline void weigh(float* s, int64_t skip, int64_t count, int64_t stride, const float* k_factor, const float* v_factor,
                  float softcap, float* row_max, float* row_sum) {
  for (int64_t i = 0; i < count; i += kLanes) store(s + i, mul(load(s + i), load(k_factor + i)));
  if (softcap > 0.0f) cap_scores(s, padded(count, kLanes), softcap);
  for (int64_t i = 0; i < skip; ++i) s[i] = kNegative;
  for (int64_t i = count; i < stride; ++i) s[i] = kNegative;
  V top = set1(kNegative);
  for (int64_t i = 0; i < stride; i += kLanes) top = max(top, load(s + i));
  const float highest = hmax(top);
  V sum[kLanes];  // one, and what `reduce` wants beside it
  for (int64_t lane = 0; lane < kLanes; ++lane) sum[lane] = zero();
  for (int64_t i = 0; i < stride; i += kLanes) {
    const V p = exp_negative(sub(load(s + i), set1(highest)));
    store(s + i, mul(p, load(v_factor + i)));
    sum[0] = add(sum[0], p);
  }
  float sums[kLanes];
  store(sums, reduce(sum));
  *row_max = highest;
  *row_sum = sums[0];
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
  const int64_t count = item.key_end - item.key_begin, stride = padded(count, kLanes);
  const int64_t hidden = call.first_key(0) - item.key_begin, skip = hidden > 0 ? hidden : 0;
  const C* k_cache = static_cast<const C*>(call.k_cache) + item.key_begin * kv * d;
  const C* v_cache = static_cast<const C*>(call.v_cache) + item.key_begin * kv * e;
  float* scores = scratch;  // [H][stride]
  float* k_factor = scores + call.heads * stride;  // [stride], of one KV head
  float* v_factor = k_factor + stride;
  for (int64_t begin = 0; begin < count; begin += kKeyBlock) {
    const int64_t n = count - begin < kKeyBlock ? count - begin : kKeyBlock;
    for (int64_t g = item.kv_begin; g < item.kv_end; ++g) {
      // heads visit the block one after the other, in strides: each prefetches its share of the next block, so that the
      // memory sees one steady stream. After the last block come the first values.
      if (begin + kKeyBlock < count)
        prefetch(k_cache + ((begin + kKeyBlock) * kv + g * kKeyBlock) * d, kKeyBlock * d * int64_t{sizeof(C)});
      else
        prefetch(v_cache + g * kKeyBlock * e, kKeyBlock * e * int64_t{sizeof(C)});
      dot_keys_of(per, call.q + g * per * d, d, k_cache + (begin * kv + g) * d, kv * d, n, scores + g * per * stride + begin,
                  stride);
    }
  }
  for (int64_t g = item.kv_begin; g < item.kv_end; ++g) {
    const float* k_scale = call.k_scale ? call.k_scale + item.key_begin * kv + g : nullptr;
    const float* v_scale = call.v_scale ? call.v_scale + item.key_begin * kv + g : nullptr;
    gather_factors(k_scale, kv, call.scale, count, stride, k_factor);
    gather_factors(v_scale, kv, 1.0f, count, stride, v_factor);
    for (int64_t h = g * per; h < (g + 1) * per; ++h)
      weigh(scores + h * stride, skip, count, stride, k_factor, v_factor, call.softcap, item.partial_max + h,
            item.partial_sum + h);
  }
  for (int64_t begin = 0; begin < count; begin += kKeyBlock) {
    const int64_t n = count - begin < kKeyBlock ? count - begin : kKeyBlock;
    for (int64_t g = item.kv_begin; g < item.kv_end; ++g) {
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

void fold_row(const float* part, float part_max, float part_sum, int64_t n, float* acc, float* row_max, float* row_sum) {
  const float top = part_max > *row_max ? part_max : *row_max;
  const V old = exp_negative(set1(*row_max - top)), fresh = exp_negative(set1(part_max - top));
  float weights[2][kLanes];
  store(weights[0], old);
  store(weights[1], fresh);
  *row_sum = weights[0][0] * *row_sum + weights[1][0] * part_sum;
  *row_max = top;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(acc + j, fma(load(part + j), fresh, mul(load(acc + j), old)));
  for (; j < n; ++j) acc[j] = weights[0][0] * acc[j] + weights[1][0] * part[j];
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
