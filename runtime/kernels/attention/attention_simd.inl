// Attention, norms and RoPE over a vector type. Included once by each attention_<isa>.cpp, after it has defined, in its own
// anonymous namespace, the type `V` (one register of floats) and its operations:
//   constexpr int64_t kLanes, kRows = 6 (rows of a register tile), kCols (vectors of a register tile), kDecodeRows (query
//   heads whose sums over 4 vectors of values fit the registers), kKeysTogether (keys scored side by side),
//   kScoreKeys x kScoreCols (keys and vectors of rows whose scores one step of a tile sums)
//   load(const float*), store, set1, zero, add, sub, mul, div, fma(a, b, c) = a*b + c, min, max (of a NaN
//   the second operand)
//   scale2(V p, V n) = p 2^n of an integral-valued n in [-126, 0], p in [0.7, 1.5]; round, hsum, hmax, less_equal_select(a, b, x, y) = a <= b ? x : y
//   reduce(const V part[kLanes]) -> V whose lane i is the sum of part[i]: lanes kOrder[0] + kOrder[1], kOrder[2] + kOrder[3],
//   ..., then sums of neighbours again. constexpr int kOrder[kLanes] says that order, in which a tile sums too
//   absolute; store_int8(int8_t*, V): rounded half to even, clamped to [-127, 127] (NaN becomes any code)
//   swap_pairs(V): (1, 0, 3, 2, ...); duplicate_pairs(const float* c): (c0, c0, c1, c1, ...) of kLanes/2 values;
//   alternate_sign(V): (-0, +1, -2, +3, ...) of the lanes
// No inline function of the standard library may be used here: the linker could pick this file's copy of it, compiled for
// this instruction set, for the whole program.

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kMostFloat = 3.402823466e38f;
constexpr float kTiny = 1e-30f;  // queries and weights of no larger element are 0
constexpr float kNegative = -kMostFloat;  // stands for "no key": finite, so that differences stay numbers

// 2^x for x <= 0, 2^-126 below -126: a polynomial in the fraction (least squares, relative error 1e-7). NaN stays NaN.
inline V exp2_negative(V x) {
  x = max(set1(-126.0f), x);
  const V n = round(x), f = sub(x, n);
  V p = set1(0.00132646591f);
  p = fma(p, f, set1(0.00967151485f));
  p = fma(p, f, set1(0.0555073374f));
  p = fma(p, f, set1(0.240222417f));
  p = fma(p, f, set1(0.693146977f));
  p = fma(p, f, set1(1.0f));
  return scale2(p, n);
}

inline V exp_negative(V x) { return exp2_negative(mul(x, set1(kLog2e))); }

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

// Rows of d floats to rows of `width`, zero behind d; those of `out` are `stride` apart.
inline void copy_rows(const float* cache, int64_t first, int64_t count, int64_t kv_heads, int64_t head, int64_t d, int64_t width,
                      float* out, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    const float* x = cache + ((first + i) * kv_heads + head) * d;
    float* y = out + i * stride;
    int64_t j = 0;
    for (; j + kLanes <= d; j += kLanes) store(y + j, load(x + j));
    for (; j < d; ++j) y[j] = x[j];
    for (; j < width; ++j) y[j] = 0.0f;
  }
}

// Where one `tile` keeps what; all in floats.
struct TileScratch {
  int64_t rows_padded, e_padded;
  float* q_t;        // [d_padded][rows_padded], or words of codes; made by `prepare`, as is `step`
  float* step;       // [rows_padded]: of the queries' codes
  float* scores;     // [kKeyChunk][rows_padded]
  float* acc;        // [rows_padded][e_padded]; before that the largest score and the sum of each row
  float* first_key;  // [rows_padded]: relative to key_begin, exact as floats (< 2^24); then the steps of the weights
  float* last_key;
  float* block;      // [kKeyBlock][d_padded + e_padded]
  float* k_factor;   // [kKeyChunk]
  float* v_factor;
};

inline TileScratch tile_scratch_of(const AttentionCall& call, const AttentionItem& item, float* scratch) {
  TileScratch s;
  const int64_t rows = (item.token_end - item.token_begin) * (call.heads / call.kv_heads), d_padded = padded(call.width(), kLanes);
  s.rows_padded = padded(rows, kLanes);
  s.e_padded = padded(call.value_dim, kLanes);
  s.q_t = scratch;
  s.step = s.q_t + d_padded * s.rows_padded;
  s.scores = s.step + s.rows_padded;
  s.acc = s.scores + kKeyChunk * s.rows_padded;
  s.first_key = s.acc + s.rows_padded * s.e_padded;
  s.last_key = s.first_key + s.rows_padded;
  s.block = s.last_key + s.rows_padded;
  s.k_factor = s.block + kKeyBlock * (d_padded + s.e_padded);
  s.v_factor = s.k_factor + kKeyChunk;
  return s;
}

inline void see_keys(const AttentionCall& call, const AttentionItem& item, const TileScratch& s) {
  const int64_t per = call.heads / call.kv_heads;
  for (int64_t r = 0; r < s.rows_padded; ++r) {
    const int64_t last = item.token_end - 1, token = item.token_begin + r / per < last ? item.token_begin + r / per : last;
    s.last_key[r] = static_cast<float>(call.start + token - item.key_begin);
    s.first_key[r] = static_cast<float>(call.first_key(token) - item.key_begin);
  }
}

inline void take_sums(const AttentionItem& item, int64_t rows, const TileScratch& s) {
  for (int64_t r = 0; r < rows; ++r) {
    item.partial_max[r] = s.acc[r];
    item.partial_sum[r] = s.acc[s.rows_padded + r];
  }
}

inline void round_weights(float* column, int64_t count, int64_t rows, V top, float* row_step);

// Scores [count][rows] become weights, kLanes rows at a time: e^(score - max) * v_factor[key], with 0 for keys that a row does
// not see; sums are taken in the order of `weigh`. Coded: scores are in units of `step`, and weights become words.
template <bool Coded>
inline void weigh_rows(const AttentionCall& call, const AttentionItem& item, const TileScratch& s) {
  const int64_t count = item.key_end - item.key_begin, rows = s.rows_padded;
  // between these two every key is visible to every row: no masking
  const int64_t all_from = call.first_key(item.token_end - 1), all_to = call.start + item.token_begin + 1;
  const bool masked = item.key_begin < all_from || item.key_end > all_to;
  const V nothing = set1(kNegative);
  for (int64_t r = 0; r < rows; r += kLanes) {
    float* column = s.scores + r;
    const V last = load(s.last_key + r), first = load(s.first_key + r);
    V top = nothing;
    for (int64_t i = 0; i < count; ++i) {
      V x = load(column + i * rows);
      if (masked) {
        const V position = set1(static_cast<float>(i));
        x = less_equal_select(position, last, x, nothing);
        x = less_equal_select(first, position, x, nothing);
        store(column + i * rows, x);
      }
      top = max(top, x);
    }
    const V unit = Coded && !(call.softcap > 0.0f) ? load(s.step + r) : set1(1.0f), scale = mul(unit, set1(kLog2e));
    V part[kLanes], heaviest = zero();
    for (int lane = 0; lane < kLanes; ++lane) part[lane] = zero();
    for (int64_t begin = 0; begin < count; begin += kLanes) {
      const int64_t n = count - begin < kLanes ? count - begin : kLanes;
      for (int64_t lane = 0; lane < n; ++lane) {
        float* at = column + (begin + lane) * rows;
        const V x = load(at);
        V p = exp2_negative(mul(sub(x, top), scale));
        // a row that sees none of these keys has top == kNegative, and every score would get weight e^0
        if (masked) p = less_equal_select(x, nothing, zero(), p);
        part[lane] = add(part[lane], p);
        const V weight = mul(p, set1(s.v_factor[begin + lane]));
        store(at, weight);
        if (Coded) heaviest = max(heaviest, weight);
      }
    }
    store(s.acc + r, mul(top, unit));
    store(s.acc + rows + r, ordered_sum(part));
    if (Coded) round_weights(column, count, rows, heaviest, s.first_key + r);
  }
}

inline void prepare_floats(const AttentionCall& call, const AttentionItem& item, const TileScratch& s) {
  const int64_t d = call.head_dim, per = call.heads / call.kv_heads, rows = (item.token_end - item.token_begin) * per;
  for (int64_t r = 0; r < s.rows_padded; ++r) {
    const int64_t token = r < rows ? item.token_begin + r / per : item.token_begin;
    const int64_t place = token * call.heads + item.kv_begin * per + r % per;
    const float* q = call.q + place * d;
    const float* rest = call.rest_dim ? call.q_rest + place * call.rest_dim : nullptr;
    for (int64_t j = 0; j < padded(d, kLanes); ++j) s.q_t[j * s.rows_padded + r] = r < rows && j < d ? q[j] : 0.0f;
    for (int64_t j = 0; j < call.rest_dim; ++j) s.q_t[(d + j) * s.rows_padded + r] = r < rows ? rest[j] : 0.0f;
  }
}

void tile_floats(const AttentionCall& call, const AttentionItem& item, float* scratch) {
  const int64_t d = call.head_dim, e = call.value_dim, kv = call.kv_heads, per = call.heads / kv, g = item.kv_begin;
  const int64_t rows = (item.token_end - item.token_begin) * per, count = item.key_end - item.key_begin;
  const TileScratch s = tile_scratch_of(call, item, scratch);
  const int64_t d_padded = padded(call.width(), kLanes), first_part = d_padded - call.rest_dim, width = s.rows_padded;
  see_keys(call, item, s);
  gather_factors(nullptr, kv, call.scale, count, count, s.k_factor);
  gather_factors(nullptr, kv, 1.0f, count, count, s.v_factor);
  const float* k_cache = static_cast<const float*>(call.k_cache);
  const float* v_cache = static_cast<const float*>(call.v_cache);
  for (int64_t begin = 0; begin < count; begin += kKeyBlock) {
    const int64_t n = count - begin < kKeyBlock ? count - begin : kKeyBlock;
    copy_rows(k_cache, item.key_begin + begin, n, kv, g, d, first_part, s.block, d_padded);
    if (call.rest_dim)
      copy_rows(static_cast<const float*>(call.k_rest), item.key_begin + begin, n, kv, g, call.rest_dim, call.rest_dim,
                s.block + first_part, d_padded);
    score_all(n, d_padded, s.block, s.k_factor + begin, s.q_t, width, s.scores + begin * width);
    if (call.softcap > 0.0f) cap_scores(s.scores + begin * width, n * width, call.softcap);
  }
  weigh_rows<false>(call, item, s);
  take_sums(item, rows, s);
  for (int64_t begin = 0; begin < count; begin += kKeyBlock) {
    const int64_t n = count - begin < kKeyBlock ? count - begin : kKeyBlock;
    copy_rows(v_cache, item.key_begin + begin, n, kv, g, e, s.e_padded, s.block, s.e_padded);
    multiply_all(rows, s.e_padded, n, s.scores + begin * width, 1, width, s.block, s.e_padded, s.acc, s.e_padded, begin > 0);
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < e; ++j) item.partial_acc[r * e + j] = s.acc[r * s.e_padded + j];
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
template <int Queries>
inline void dot_keys(const float* q, int64_t d, const float* keys, int64_t key_stride, int64_t count, float* scores,
                     int64_t score_stride) {
  static_assert(kLanes % kKeysTogether == 0, "whole steps");
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t lanes = count - i < kLanes ? count - i : kLanes;
    V part[Queries][kLanes];
    for (int64_t lane = 0; lane < kLanes; lane += kKeysTogether) {
      const float* key[kKeysTogether];
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

inline void dot_keys_of(int64_t queries, const float* q, int64_t d, const float* keys, int64_t key_stride, int64_t count,
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

// Scores in units of `unit` become weights: e^(s - max) * v_factor of keys [skip, count), 0 before and behind them; max and the
// sum of the e's. The largest weight of each lane.
inline V weigh(float* s, int64_t skip, int64_t count, int64_t stride, const float* v_factor, float unit, float* row_max,
               float* row_sum) {
  for (int64_t i = 0; i < skip; ++i) s[i] = kNegative;
  for (int64_t i = count; i < stride; ++i) s[i] = kNegative;
  const V nothing = set1(kNegative), scale = mul(set1(unit), set1(kLog2e));
  V top = nothing, heaviest = zero();
  for (int64_t i = 0; i < stride; i += kLanes) top = max(top, load(s + i));
  const float highest = hmax(top);
  V sum[kLanes];  // one, and what `reduce` wants beside it
  for (int64_t lane = 0; lane < kLanes; ++lane) sum[lane] = zero();
  for (int64_t i = 0; i < stride; i += kLanes) {
    const V x = load(s + i), p = less_equal_select(x, nothing, zero(), exp2_negative(mul(sub(x, set1(highest)), scale)));
    const V weight = mul(p, load(v_factor + i));
    store(s + i, weight);
    heaviest = max(heaviest, weight);
    sum[0] = add(sum[0], p);
  }
  float sums[kLanes];
  store(sums, reduce(sum));
  *row_max = highest * unit;
  *row_sum = sums[0];
  return heaviest;
}

// acc[row][0 .. Cols) (+)= sum over n keys of weight[row][key] * value[key]. Each value is widened once for all rows.
template <int Rows, int Cols>
inline void add_values(int64_t n, const float* weights, int64_t stride, const float* values, int64_t value_stride, int64_t e,
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

template <int Rows>
inline void add_value_columns(int64_t n, const float* weights, int64_t stride, const float* values, int64_t value_stride,
                              int64_t e, float* acc, bool first) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= e; j += 4 * kLanes)
    add_values<Rows, 4>(n, weights, stride, values + j, value_stride, e, acc + j, first);
  for (; j < e; j += kLanes) add_values<Rows, 1>(n, weights, stride, values + j, value_stride, e, acc + j, first);
}

inline void add_values_of(int64_t queries, int64_t n, const float* weights, int64_t stride, const float* values,
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

void decode_floats(const AttentionCall& call, const AttentionItem& item, float* scratch) {
  const int64_t d = call.head_dim, e = call.value_dim, kv = call.kv_heads, per = call.heads / kv;
  const int64_t count = item.key_end - item.key_begin, stride = padded(count, kLanes);
  const int64_t hidden = call.first_key(0) - item.key_begin, skip = hidden > 0 ? hidden : 0;
  const float* k_cache = static_cast<const float*>(call.k_cache) + item.key_begin * kv * d;
  const float* v_cache = static_cast<const float*>(call.v_cache) + item.key_begin * kv * e;
  float* scores = scratch;  // [H][stride]
  float* v_factor = scores + call.heads * stride;  // [stride]
  for (int64_t begin = 0; begin < count; begin += kKeyBlock) {
    const int64_t n = count - begin < kKeyBlock ? count - begin : kKeyBlock;
    for (int64_t g = item.kv_begin; g < item.kv_end; ++g) {
      // heads visit the block one after the other, in strides: each prefetches its share of the next block, so that the
      // memory sees one steady stream. After the last block come the first values.
      if (begin + kKeyBlock < count)
        prefetch(k_cache + ((begin + kKeyBlock) * kv + g * kKeyBlock) * d, kKeyBlock * d * int64_t{sizeof(float)});
      else
        prefetch(v_cache + g * kKeyBlock * e, kKeyBlock * e * int64_t{sizeof(float)});
      dot_keys_of(per, call.q + g * per * d, d, k_cache + (begin * kv + g) * d, kv * d, n, scores + g * per * stride + begin,
                  stride);
    }
  }
  gather_factors(nullptr, kv, 1.0f, count, stride, v_factor);
  const V scale = set1(call.scale);
  for (int64_t h = item.kv_begin * per; h < item.kv_end * per; ++h) {
    float* row = scores + h * stride;
    for (int64_t i = 0; i < count; i += kLanes) store(row + i, mul(load(row + i), scale));
    if (call.softcap > 0.0f) cap_scores(row, padded(count, kLanes), call.softcap);
    weigh(row, skip, count, stride, v_factor, 1.0f, item.partial_max + h, item.partial_sum + h);
  }
  for (int64_t begin = 0; begin < count; begin += kKeyBlock) {
    const int64_t n = count - begin < kKeyBlock ? count - begin : kKeyBlock;
    for (int64_t g = item.kv_begin; g < item.kv_end; ++g) {
      if (begin + kKeyBlock < count)
        prefetch(v_cache + ((begin + kKeyBlock) * kv + g * kKeyBlock) * e, kKeyBlock * e * int64_t{sizeof(float)});
      add_values_of(per, n, scores + g * per * stride + begin, stride, v_cache + (begin * kv + g) * e, kv * e, e,
                    item.partial_acc + g * per * e, begin == 0);
    }
  }
}

#include "attention_codes.inl"

void prepare(const AttentionCall& call, const AttentionItem& item, float* scratch) {
  const TileScratch s = tile_scratch_of(call, item, scratch);
  if (call.k_scale) return prepare_codes(call, item, s);
  prepare_floats(call, item, s);
}

void tile(const AttentionCall& call, const AttentionItem& item, float* scratch) {
  if (call.k_scale) return tile_codes(call, item, scratch);
  tile_floats(call, item, scratch);
}

void decode(const AttentionCall& call, const AttentionItem& item, float* scratch) {
  if (call.k_scale) return decode_codes(call, item, scratch);
  decode_floats(call, item, scratch);
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

#include "attention_rows.inl"
