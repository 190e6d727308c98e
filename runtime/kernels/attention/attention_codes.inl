// Attention over INT8 caches, in integers. Included by attention_simd.inl; uses what attention_<isa>.cpp defines beside `V`:
//   I, a register of kLanes int32; izero, iload(const void*), istore(void*, I), broadcast(const void*) of one int32
//   constexpr kPack codes in an int32: 2 of int16 with kPlanes = 1, or 4 of int8 with kPlanes = 2 (high and low bytes)
//   Code, int16_t or int8_t; widen(const int8_t*, Code*): the next kLanes * kPack codes of a key
//   dot(I sum, I a, I b): adds the products of packed codes; gather(const int8_t* const row[kPack], int64_t at): the codes
//   at .. at + kLanes - 1 of kPack rows, packed by column; to_float(I), to_int(V) (to even), combine(I high, I low) =
//   256 high + low; ireduce: as `reduce`, of integers; pack_rows(const I[kPack], I out[kPlanes]): numbers in [0, kMostCode] of
//   kPack keys, packed; pack_keys(void*, I): the same of kLanes keys in a row, group by group and plane by plane
//   constexpr kCodeKeys x kCodeCols, kCodeRows x kCols: register tiles; kCodeDecodeRows x kCodeDecodeCols
//
// A query is rounded to 16 bits by its largest element, and the weights of a chunk (probability times the value's scale) to
// 15 bits by the largest of them: 2^-16 of the largest, where the cache itself is rounded to 2^-8. All sums are exact then, so
// their order is free, and both schedules give the same bits.

// q = clamp(rint(x * (most / max|x|))), most <= kMostCode, with sums of `d` products below 2^31; its step. NaN spoils the step.
inline int32_t query_most(int64_t d) {
  const int64_t most = 0x7fffffff / (128 * d);
  return static_cast<int32_t>(most < kMostCode ? (most > 1 ? most : 1) : kMostCode);
}

inline float round_query(const float* x, int64_t d, int32_t* q) {
  const float most = static_cast<float>(query_most(d));
  V top = zero(), wrong = zero();
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    const V v = load(x + i);
    top = max(top, absolute(v));
    wrong = add(wrong, sub(v, v));
  }
  float highest = hmax(top), fault = hsum(wrong);
  for (; i < d; ++i) {
    const float a = x[i] < 0 ? -x[i] : x[i];
    highest = a > highest ? a : highest;
    fault += x[i] - x[i];
  }
  const V inverse = set1(highest > kTiny ? most / highest : 0.0f), high = set1(most), low = set1(-most);
  for (i = 0; i + kLanes <= d; i += kLanes) istore(q + i, to_int(min(max(mul(load(x + i), inverse), low), high)));
  if (i < d) {
    float tail[kLanes] = {};
    int32_t codes[kLanes];
    for (int64_t j = i; j < d; ++j) tail[j - i] = x[j];
    istore(codes, to_int(min(max(mul(load(tail), inverse), low), high)));
    for (int64_t j = i; j < d; ++j) q[j] = codes[j - i];
  }
  return (highest > kTiny ? highest / most : 1.0f) + fault;  // never 0: scores are compared in units of it
}

// Codes q [kPack] as one int32 of a plane.
inline uint32_t packed_word(const int32_t* q, int plane) {
  uint32_t word = 0;
  for (int i = 0; i < kPack; ++i) {
    const uint32_t code = static_cast<uint32_t>(q[i]);
    if constexpr (kPlanes == 1)
      word |= (code & 0xffffu) << (16 * i);
    else
      word |= ((plane == 0 ? (code + 128u) >> 8 : code) & 0xffu) << (8 * i);
  }
  return word;
}

inline int64_t words_of(int64_t n) { return (n + kPack - 1) / kPack; }

// The parts of a query of `call`, one after the other: its own place if there is one part, else `joined`.
inline const float* whole_query(const AttentionCall& call, int64_t place, float* joined) {
  const float* q = call.q + place * call.head_dim;
  if (!call.rest_dim) return q;
  const float* rest = call.q_rest + place * call.rest_dim;
  for (int64_t j = 0; j < call.head_dim; ++j) joined[j] = q[j];
  for (int64_t j = 0; j < call.rest_dim; ++j) joined[call.head_dim + j] = rest[j];
  return joined;
}

// Queries of an item as words [group of kPack elements][plane][rows_padded], and their steps [rows_padded].
inline void prepare_codes(const AttentionCall& call, const AttentionItem& item, const TileScratch& s) {
  const int64_t d = call.width(), per = call.heads / call.kv_heads, rows = (item.token_end - item.token_begin) * per;
  const int64_t rows_padded = s.rows_padded, groups = words_of(d);
  uint32_t* words = reinterpret_cast<uint32_t*>(s.q_t);
  int32_t* q = reinterpret_cast<int32_t*>(s.block);  // [groups * kPack]
  float* joined = s.block + groups * kPack;           // [d]
  for (int64_t j = d; j < groups * kPack; ++j) q[j] = 0;
  for (int64_t r = 0; r < rows_padded; ++r) {
    const int64_t place = (item.token_begin + r / per) * call.heads + item.kv_begin * per + r % per;
    s.step[r] = r < rows ? round_query(whole_query(call, place, joined), d, q) : 1.0f;
    for (int64_t g = 0; g < groups; ++g)
      for (int plane = 0; plane < kPlanes; ++plane)
        words[(g * kPlanes + plane) * rows_padded + r] = r < rows ? packed_word(q + g * kPack, plane) : 0;
  }
}

// scores[key][row] (+)= factor[key] * (q_row . key) of Keys keys and Cols * kLanes rows. keys: `groups` words, `stride` apart.
template <int Keys, int Cols>
inline void score_codes(int64_t groups, const uint32_t* keys, int64_t stride, const float* factor, const uint32_t* q, int64_t rows,
                        float* scores, bool more) {
  I sum[kPlanes][Keys][Cols];
  for (int p = 0; p < kPlanes; ++p)
    for (int i = 0; i < Keys; ++i)
      for (int j = 0; j < Cols; ++j) sum[p][i][j] = izero();
  for (int64_t g = 0; g < groups; ++g) {
    I right[kPlanes][Cols];
    for (int p = 0; p < kPlanes; ++p)
      for (int j = 0; j < Cols; ++j) right[p][j] = iload(q + (g * kPlanes + p) * rows + j * kLanes);
    for (int i = 0; i < Keys; ++i) {
      const I left = broadcast(keys + i * stride + g);
      for (int p = 0; p < kPlanes; ++p)
        for (int j = 0; j < Cols; ++j) sum[p][i][j] = dot(sum[p][i][j], right[p][j], left);
    }
  }
  for (int i = 0; i < Keys; ++i)
    for (int j = 0; j < Cols; ++j) {
      const I total = kPlanes == 1 ? sum[0][i][j] : combine(sum[0][i][j], sum[kPlanes - 1][i][j]);
      float* at = scores + i * rows + j * kLanes;
      store(at, more ? fma(to_float(total), set1(factor[i]), load(at)) : mul(to_float(total), set1(factor[i])));
    }
}

template <int Cols>
inline void score_code_columns(int64_t count, int64_t groups, const uint32_t* keys, int64_t stride, const float* factor,
                               const uint32_t* q, int64_t rows, float* scores, bool more) {
  int64_t i = 0;
  for (; i + kCodeKeys <= count; i += kCodeKeys)
    score_codes<kCodeKeys, Cols>(groups, keys + i * stride, stride, factor + i, q, rows, scores + i * rows, more);
  for (; i < count; ++i)
    score_codes<1, Cols>(groups, keys + i * stride, stride, factor + i, q, rows, scores + i * rows, more);
}

// Scores of `count` keys with all rows, of one part of the keys.
inline void score_part(int64_t count, int64_t groups, const uint32_t* keys, int64_t stride, const float* factor, const uint32_t* q,
                       int64_t rows, float* scores, bool more) {
  int64_t j = 0;
  for (; j + kCodeCols * kLanes <= rows; j += kCodeCols * kLanes)
    score_code_columns<kCodeCols>(count, groups, keys, stride, factor, q + j, rows, scores + j, more);
  for (; j < rows; j += kLanes) score_code_columns<1>(count, groups, keys, stride, factor, q + j, rows, scores + j, more);
}

// Rows of d codes, `from_stride` apart, widened to words; zero behind d up to a whole word.
inline void widen_rows(const int8_t* from, int64_t from_stride, int64_t count, int64_t d, uint32_t* to, int64_t to_stride) {
  for (int64_t i = 0; i < count; ++i) {
    const int8_t* x = from + i * from_stride;
    Code* y = reinterpret_cast<Code*>(to + i * to_stride);
    int64_t j = 0;
    for (; j + kLanes * kPack <= d; j += kLanes * kPack) widen(x + j, y + j);
    for (; j < d; ++j) y[j] = x[j];
    for (; j < words_of(d) * kPack; ++j) y[j] = 0;
  }
}

// c[row][Cols * kLanes] (+)= sum over groups of keys of weight words times value words.
template <int Rows, int Cols>
inline void weigh_codes(int64_t groups, const uint32_t* w, int64_t w_stride, const uint32_t* values, int64_t stride, float* c,
                        int64_t c_row, bool more) {
  I sum[kPlanes][Rows][Cols];
  for (int p = 0; p < kPlanes; ++p)
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < Cols; ++j) sum[p][i][j] = izero();
  for (int64_t g = 0; g < groups; ++g) {
    I right[Cols];
    for (int j = 0; j < Cols; ++j) right[j] = iload(values + g * stride + j * kLanes);
    for (int i = 0; i < Rows; ++i)
      for (int p = 0; p < kPlanes; ++p) {
        const I left = broadcast(w + (g * kPlanes + p) * w_stride + i);
        for (int j = 0; j < Cols; ++j) sum[p][i][j] = dot(sum[p][i][j], right[j], left);
      }
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Cols; ++j) {
      float* at = c + i * c_row + j * kLanes;
      const I total = kPlanes == 1 ? sum[0][i][j] : combine(sum[0][i][j], sum[kPlanes - 1][i][j]);
      istore(at, more ? iadd(total, iload(at)) : total);
    }
}

template <int Rows, int Cols>
inline void weigh_code_rest(int64_t rows, int64_t groups, const uint32_t* w, int64_t w_stride, const uint32_t* values,
                            int64_t stride, float* c, int64_t c_row, bool more) {
  if (rows == Rows) return weigh_codes<Rows, Cols>(groups, w, w_stride, values, stride, c, c_row, more);
  if constexpr (Rows > 1) weigh_code_rest<Rows - 1, Cols>(rows, groups, w, w_stride, values, stride, c, c_row, more);
}

template <int Cols>
inline void weigh_code_rows(int64_t rows, int64_t groups, const uint32_t* w, int64_t w_stride, const uint32_t* values,
                            int64_t stride, float* c, int64_t c_row, bool more) {
  int64_t i = 0;
  for (; i + kCodeRows <= rows; i += kCodeRows)
    weigh_codes<kCodeRows, Cols>(groups, w + i, w_stride, values, stride, c + i * c_row, c_row, more);
  weigh_code_rest<kCodeRows - 1, Cols>(rows - i, groups, w + i, w_stride, values, stride, c + i * c_row, c_row, more);
}

// The scale of each value row, 0 in place of one that is none; whether there was such a one.
inline bool only_scales(float* factor, int64_t count) {
  bool all = true;
  for (int64_t i = 0; i < count; ++i) {
    if (factor[i] >= 0.0f && factor[i] <= kMostFloat) continue;
    all = false;
    factor[i] = 0.0f;
  }
  return all;
}

// Weights of one vector of rows, of which `top` are the largest: words in the place of floats; their steps.
inline void round_weights(float* column, int64_t count, int64_t rows, V top, float* row_step) {
  const V most = set1(static_cast<float>(kMostCode));
  const V inverse = less_equal_select(top, set1(kTiny), zero(), div(most, top));
  store(row_step, mul(top, set1(1.0f / static_cast<float>(kMostCode))));
  for (int64_t begin = 0, g = 0; begin < count; begin += kPack, ++g) {
    I codes[kPack], words[kPlanes];
    for (int64_t i = 0; i < kPack; ++i)
      codes[i] = begin + i < count ? to_int(mul(load(column + (begin + i) * rows), inverse)) : izero();
    pack_rows(codes, words);
    for (int p = 0; p < kPlanes; ++p) istore(column + (g * kPlanes + p) * rows, words[p]);
  }
}

// A value that is no number reaches the rows that see it, by the steps of their weights.
inline void spoil_rows(const AttentionCall& call, const AttentionItem& item, int64_t rows, float* step) {
  const int64_t per = call.heads / call.kv_heads;
  for (int64_t key = item.key_begin; key < item.key_end; ++key) {
    const float scale = call.v_scale[key * call.kv_heads + item.kv_begin];
    if (scale >= 0.0f && scale <= kMostFloat) continue;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = item.token_begin + r / per;
      if (key >= call.first_key(token) && key <= call.start + token) step[r] = __builtin_nanf("");
    }
  }
}

void tile_codes(const AttentionCall& call, const AttentionItem& item, float* scratch) {
  const int64_t d = call.head_dim, e = call.value_dim, kv = call.kv_heads, per = call.heads / kv, head = item.kv_begin;
  const int64_t rows = (item.token_end - item.token_begin) * per, count = item.key_end - item.key_begin;
  const TileScratch s = tile_scratch_of(call, item, scratch);
  const int64_t first_groups = words_of(d), groups = words_of(call.width()), width = s.rows_padded;
  const uint32_t* q = reinterpret_cast<const uint32_t*>(s.q_t);
  uint32_t* block = reinterpret_cast<uint32_t*>(s.block);
  see_keys(call, item, s);
  gather_factors(call.k_scale + item.key_begin * kv + head, kv, call.scale, count, count, s.k_factor);
  gather_factors(call.v_scale + item.key_begin * kv + head, kv, 1.0f, count, count, s.v_factor);
  const int8_t* k_cache = static_cast<const int8_t*>(call.k_cache) + (item.key_begin * kv + head) * d;
  const int8_t* v_cache = static_cast<const int8_t*>(call.v_cache) + (item.key_begin * kv + head) * e;
  for (int64_t begin = 0; begin < count; begin += kKeyBlock) {
    const int64_t n = count - begin < kKeyBlock ? count - begin : kKeyBlock;
    float* scores = s.scores + begin * width;
    widen_rows(k_cache + begin * kv * d, kv * d, n, d, block, groups);
    score_part(n, first_groups, block, groups, s.k_factor + begin, q, width, scores, false);
    if (call.rest_dim) {
      const int64_t rest = call.rest_dim, place = (item.key_begin + begin) * kv + head;
      float rest_factor[kKeyBlock];
      gather_factors(call.k_rest_scale + place, kv, call.scale, n, n, rest_factor);
      widen_rows(static_cast<const int8_t*>(call.k_rest) + place * rest, kv * rest, n, rest, block + first_groups, groups);
      score_part(n, groups - first_groups, block + first_groups, groups, rest_factor, q + first_groups * kPlanes * width, width,
                 scores, true);
    }
    if (call.softcap > 0.0f) {
      for (int64_t i = 0; i < n; ++i)
        for (int64_t r = 0; r < width; r += kLanes) store(scores + i * width + r, mul(load(scores + i * width + r), load(s.step + r)));
      cap_scores(scores, n * width, call.softcap);
    }
  }
  const bool sound = only_scales(s.v_factor, count);
  weigh_rows<true>(call, item, s);
  const float* step = s.first_key;  // of the weights
  if (!sound) spoil_rows(call, item, rows, s.first_key);
  take_sums(item, rows, s);
  for (int64_t begin = 0; begin < count; begin += kKeyBlock) {
    const int64_t n = count - begin < kKeyBlock ? count - begin : kKeyBlock, packs = words_of(n);
    for (int64_t g = 0; g < packs; ++g) {
      const int8_t* row[kPack];
      for (int64_t i = 0; i < kPack; ++i) row[i] = v_cache + (begin + (g * kPack + i < n ? g * kPack + i : n - 1)) * kv * e;
      uint32_t* y = block + g * s.e_padded;
      int64_t j = 0;
      for (; j + kLanes <= e; j += kLanes) istore(y + j, gather(row, j));
      for (; j < s.e_padded; ++j) {
        y[j] = 0;
        for (int64_t i = 0; i < kPack && j < e; ++i) {
          const Code code = row[i][j];
          __builtin_memcpy(reinterpret_cast<char*>(y + j) + i * sizeof(Code), &code, sizeof(Code));
        }
      }
    }
    const uint32_t* w = reinterpret_cast<const uint32_t*>(s.scores) + begin / kPack * kPlanes * width;
    int64_t j = 0;
    for (; j + kCodeValueCols * kLanes <= s.e_padded; j += kCodeValueCols * kLanes)
      weigh_code_rows<kCodeValueCols>(rows, packs, w, width, block + j, s.e_padded, s.acc + j, s.e_padded, begin > 0);
    for (; j < s.e_padded; j += kLanes)
      weigh_code_rows<1>(rows, packs, w, width, block + j, s.e_padded, s.acc + j, s.e_padded, begin > 0);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* from = s.acc + r * s.e_padded;
    float* to = item.partial_acc + r * e;
    int64_t j = 0;
    for (; j + kLanes <= e; j += kLanes) store(to + j, mul(to_float(iload(from + j)), set1(step[r])));
    if (j == e) continue;
    float tail[kLanes];
    store(tail, mul(to_float(iload(from + j)), set1(step[r])));
    for (int64_t i = j; i < e; ++i) to[i] = tail[i - j];
  }
}

// -------------------------------------------------------------------------------------------------------------- one token

// scores[j][i] = float(q_j . key_i) of Queries heads, whose codes are planes [Queries][kPlanes][d] of Code.
template <int Queries>
inline void dot_code_keys(const Code* q, int64_t d, const int8_t* keys, int64_t key_stride, int64_t count, float* scores,
                          int64_t score_stride) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t lanes = count - i < kLanes ? count - i : kLanes;
    I part[Queries][kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      // past the end: the last key again, its scores are not stored
      const int8_t* key = keys + (lane < lanes ? i + lane : count - 1) * key_stride;
      I sum[Queries][kPlanes];
      for (int j = 0; j < Queries; ++j)
        for (int p = 0; p < kPlanes; ++p) sum[j][p] = izero();
      for (int64_t c = 0; c < d; c += kLanes * kPack) {
        const I codes = wide(key + c);
        for (int j = 0; j < Queries; ++j)
          for (int p = 0; p < kPlanes; ++p) sum[j][p] = dot(sum[j][p], codes, iload(q + (j * kPlanes + p) * d + c));
      }
      for (int j = 0; j < Queries; ++j) part[j][lane] = kPlanes == 1 ? sum[j][0] : combine(sum[j][0], sum[j][kPlanes - 1]);
    }
    for (int j = 0; j < Queries; ++j) {
      const V total = to_float(ireduce(part[j]));
      float* to = scores + j * score_stride + i;
      if (lanes == kLanes) {
        store(to, total);
        continue;
      }
      float tail[kLanes];
      store(tail, total);
      for (int64_t lane = 0; lane < lanes; ++lane) to[lane] = tail[lane];
    }
  }
}

// acc[row][Cols * kLanes] (+)= sum over n keys of weight words times values, in integers.
template <int Rows, int Cols>
inline void add_code_values(int64_t n, const uint32_t* w, int64_t stride, const int8_t* values, int64_t value_stride, int64_t e,
                            float* acc, bool first) {
  I sum[Rows][kPlanes][Cols];
  for (int i = 0; i < Rows; ++i)
    for (int p = 0; p < kPlanes; ++p)
      for (int j = 0; j < Cols; ++j) sum[i][p][j] = izero();
  for (int64_t k = 0, g = 0; k < n; k += kPack, ++g) {
    const int8_t* row[kPack];
    for (int64_t i = 0; i < kPack; ++i) row[i] = values + (k + i < n ? k + i : n - 1) * value_stride;
    for (int j = 0; j < Cols; ++j) {
      const I codes = gather(row, j * kLanes);
      for (int i = 0; i < Rows; ++i)
        for (int p = 0; p < kPlanes; ++p)
          sum[i][p][j] = dot(sum[i][p][j], codes, broadcast(w + i * stride + g * kPlanes + p));
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Cols; ++j) {
      const I total = kPlanes == 1 ? sum[i][0][j] : combine(sum[i][0][j], sum[i][kPlanes - 1][j]);
      float* at = acc + i * e + j * kLanes;
      istore(at, first ? total : iadd(total, iload(at)));
    }
}

template <int Rows>
inline void add_code_columns(int64_t n, const uint32_t* w, int64_t stride, const int8_t* values, int64_t value_stride, int64_t e,
                             float* acc, bool first) {
  int64_t j = 0;
  for (; j + kCodeDecodeCols * kLanes <= e; j += kCodeDecodeCols * kLanes)
    add_code_values<Rows, kCodeDecodeCols>(n, w, stride, values + j, value_stride, e, acc + j, first);
  for (; j < e; j += kLanes) add_code_values<Rows, 1>(n, w, stride, values + j, value_stride, e, acc + j, first);
}

inline void dot_code_keys_of(int64_t queries, const Code* q, int64_t d, const int8_t* keys, int64_t key_stride, int64_t count,
                             float* scores, int64_t score_stride) {
  while (queries > 0) {
    const int64_t parts = (queries + 3) / 4, now = (queries + parts - 1) / parts;
    switch (now) {
      case 1: dot_code_keys<1>(q, d, keys, key_stride, count, scores, score_stride); break;
      case 2: dot_code_keys<2>(q, d, keys, key_stride, count, scores, score_stride); break;
      case 3: dot_code_keys<3>(q, d, keys, key_stride, count, scores, score_stride); break;
      default: dot_code_keys<4>(q, d, keys, key_stride, count, scores, score_stride); break;
    }
    queries -= now;
    q += now * kPlanes * d;
    scores += now * score_stride;
  }
}

// Codes of one part of a query, planes [kPlanes][d].
inline void pack_query(const int32_t* codes, int64_t d, Code* planes) {
  for (int p = 0; p < kPlanes; ++p)
    for (int64_t j = 0; j < d; j += kPack) {
      const uint32_t word = packed_word(codes + j, p);
      __builtin_memcpy(planes + p * d + j, &word, sizeof word);
    }
}

// Scores of one head become words of weights, in place; its step. rest: scores with a second part of the keys, or null.
inline float weigh_code_keys(float* s, int64_t skip, int64_t count, int64_t stride, const float* k_factor, const float* rest,
                             const float* rest_factor, const float* v_factor, float step, float softcap, float* row_max,
                             float* row_sum) {
  float unit = step;
  for (int64_t i = 0; i < count; i += kLanes) store(s + i, mul(load(s + i), load(k_factor + i)));
  for (int64_t i = 0; rest && i < count; i += kLanes) store(s + i, fma(load(rest + i), load(rest_factor + i), load(s + i)));
  if (softcap > 0.0f) {
    for (int64_t i = 0; i < count; i += kLanes) store(s + i, mul(load(s + i), set1(step)));
    cap_scores(s, padded(count, kLanes), softcap);
    unit = 1.0f;
  }
  const V top = weigh(s, skip, count, stride, v_factor, unit, row_max, row_sum);
  const float highest = hmax(top), most = static_cast<float>(kMostCode);
  const V inverse = set1(highest <= kTiny ? 0.0f : most / highest);
  for (int64_t i = 0; i < stride; i += kLanes) pack_keys(s + i / kPack * kPlanes, to_int(mul(load(s + i), inverse)));
  return highest * (1.0f / most);
}

void decode_codes(const AttentionCall& call, const AttentionItem& item, float* scratch) {
  const int64_t d = call.head_dim, e = call.value_dim, kv = call.kv_heads, per = call.heads / kv;
  const int64_t count = item.key_end - item.key_begin, stride = padded(count, kLanes);
  const int64_t hidden = call.first_key(0) - item.key_begin, skip = hidden > 0 ? hidden : 0;
  const int8_t* k_cache = static_cast<const int8_t*>(call.k_cache) + item.key_begin * kv * d;
  const int8_t* v_cache = static_cast<const int8_t*>(call.v_cache) + item.key_begin * kv * e;
  float* scores = scratch;  // [H][stride]
  float* k_factor = scores + call.heads * stride;  // [stride], of one KV head
  float* v_factor = k_factor + stride;
  float* step = v_factor + stride;  // [H]
  int32_t* one = reinterpret_cast<int32_t*>(step + call.heads);  // [width]
  Code* q = reinterpret_cast<Code*>(one + call.width());         // [H][kPlanes][d], then the second parts likewise
  const int64_t rest = call.rest_dim;
  Code* q_rest = q + call.heads * kPlanes * d;
  // [H][stride], [stride] and [width], where keys have a second part
  float* rest_scores = reinterpret_cast<float*>(one + (call.heads + 1) * call.width());
  float* rest_factor = rest_scores + call.heads * stride;
  for (int64_t h = item.kv_begin * per; h < item.kv_end * per; ++h) {
    step[h] = round_query(whole_query(call, h, rest_factor + stride), call.width(), one);
    pack_query(one, d, q + h * kPlanes * d);
    pack_query(one + d, rest, q_rest + h * kPlanes * rest);
  }
  for (int64_t begin = 0; begin < count; begin += kKeyBlock) {
    const int64_t n = count - begin < kKeyBlock ? count - begin : kKeyBlock;
    for (int64_t g = item.kv_begin; g < item.kv_end; ++g) {
      // as in decode_of
      if (begin + kKeyBlock < count)
        prefetch(k_cache + ((begin + kKeyBlock) * kv + g * kKeyBlock) * d, kKeyBlock * d);
      else
        prefetch(v_cache + g * kKeyBlock * e, kKeyBlock * e);
      const int8_t* keys = k_cache + (begin * kv + g) * d;
      dot_code_keys_of(per, q + g * per * kPlanes * d, d, keys, kv * d, n, scores + g * per * stride + begin, stride);
      if (!rest) continue;
      const int8_t* second = static_cast<const int8_t*>(call.k_rest) + ((item.key_begin + begin) * kv + g) * rest;
      dot_code_keys_of(per, q_rest + g * per * kPlanes * rest, rest, second, kv * rest, n,
                       rest_scores + g * per * stride + begin, stride);
    }
  }
  for (int64_t g = item.kv_begin; g < item.kv_end; ++g) {
    gather_factors(call.k_scale + item.key_begin * kv + g, kv, call.scale, count, stride, k_factor);
    gather_factors(call.v_scale + item.key_begin * kv + g, kv, 1.0f, count, stride, v_factor);
    if (rest) gather_factors(call.k_rest_scale + item.key_begin * kv + g, kv, call.scale, count, stride, rest_factor);
    for (int64_t i = 0; i < skip; ++i) v_factor[i] = 0.0f;  // not seen: nor may they spoil the row
    const bool sound = only_scales(v_factor, count);
    for (int64_t h = g * per; h < (g + 1) * per; ++h) {
      step[h] = weigh_code_keys(scores + h * stride, skip, count, stride, k_factor, rest ? rest_scores + h * stride : nullptr,
                                rest_factor, v_factor, step[h], call.softcap, item.partial_max + h, item.partial_sum + h);
      if (!sound) step[h] = __builtin_nanf("");
    }
  }
  for (int64_t begin = 0; begin < count; begin += kKeyBlock) {
    const int64_t n = count - begin < kKeyBlock ? count - begin : kKeyBlock;
    for (int64_t g = item.kv_begin; g < item.kv_end; ++g) {
      if (begin + kKeyBlock < count)
        prefetch(v_cache + ((begin + kKeyBlock) * kv + g * kKeyBlock) * e, kKeyBlock * e);
      const int8_t* values = v_cache + (begin * kv + g) * e;
      for (int64_t h = g * per; h < (g + 1) * per;) {
        const int64_t left = (g + 1) * per - h, parts = (left + kCodeDecodeRows - 1) / kCodeDecodeRows;
        const int64_t now = (left + parts - 1) / parts;
        const uint32_t* w = reinterpret_cast<const uint32_t*>(scores + h * stride) + begin / kPack * kPlanes;
        float* acc = item.partial_acc + h * e;
        static_assert(kCodeDecodeRows == 3, "the cases below");
        switch (now) {
          case 1: add_code_columns<1>(n, w, stride, values, kv * e, e, acc, begin == 0); break;
          case 2: add_code_columns<2>(n, w, stride, values, kv * e, e, acc, begin == 0); break;
          default: add_code_columns<3>(n, w, stride, values, kv * e, e, acc, begin == 0); break;
        }
        h += now;
      }
    }
  }
  for (int64_t h = item.kv_begin * per; h < item.kv_end * per; ++h)
    for (int64_t j = 0; j < e; j += kLanes) {
      float* at = item.partial_acc + h * e + j;
      store(at, mul(to_float(iload(at)), set1(step[h])));
    }
}
