// The recurrences on the sixteen-lane types, the same source for every instruction set. Included by generic_kernels.h,
// inside its anonymous namespace, after exp16 and sigmoid16.

inline F32x16 load_some(const float* p, int n) { return n == 16 ? load(p) : load_n(p, n); }
inline void store_some(float* p, F32x16 x, int n) { n == 16 ? store(p, x) : store_n(p, x, n); }

// ----------------------------------------------------------------------------------------------------- short convolution

void short_conv(const ConvTask& a) {
  const int64_t kept = a.taps - 1, width = a.channels;
  for (int64_t c = a.begin; c < a.end; c += 16) {
    const int n = a.end - c < 16 ? int(a.end - c) : 16;
    // row i of z: the state's, then those of x
    const auto row = [&](int64_t i) {
      if (i >= kept) return load_some(a.x + (i - kept) * width + c, n);
      return a.fresh ? set1(0.0f) : load_some(a.state + i * width + c, n);
    };
    const F32x16 first = a.bias ? load_some(a.bias + c, n) : set1(0.0f);
    for (int64_t t = 0; t < a.tokens; ++t) {
      F32x16 y = first;
      for (int64_t j = 0; j <= kept; ++j) y = fma(load_some(a.weight + j * width + c, n), row(t + j), y);
      if (a.silu) y = mul(y, sigmoid16(y));
      store_some(a.out + t * width + c, y, n);
    }
    for (int64_t i = 0; i < kept; ++i) store_some(a.state + i * width + c, row(a.tokens + i), n);  // reads ahead of writes
  }
}

// ------------------------------------------------------------------------------------------------------ gated delta rule

// kN registers of columns from `from` on, the last of `lanes` columns.
template <int kN>
void delta_columns(const DeltaTask& a, int64_t from, int lanes) {
  const int64_t e = a.value_dim, d = a.key_dim, row = a.heads * e, key_row = a.key_heads * d;
  float* const state = a.state + a.head * d * e + from;
  const int64_t key = a.head / (a.heads / a.key_heads) * d;
  const auto width = [&](int j) { return j + 1 < kN ? 16 : lanes; };
  if (a.fresh) {
    for (int64_t i = 0; i < d; ++i) {
      for (int j = 0; j < kN; ++j) store_some(state + i * e + 16 * j, set1(0.0f), width(j));
    }
  }
  for (int64_t t = 0; t < a.tokens; ++t) {
    const float* const q = a.q + t * key_row + key;
    const float* const k = a.k + t * key_row + key;
    const float* const v = a.v + t * row + a.head * e + from;
    const F32x16 decay = set1(a.decay[t * a.heads + a.head]), beta = set1(a.beta[t * a.heads + a.head]);
    F32x16 recalled[kN], delta[kN], y[kN];
    for (int j = 0; j < kN; ++j) recalled[j] = y[j] = set1(0.0f);
    for (int64_t i = 0; i < d; ++i) {
      const F32x16 ki = set1(k[i]);
      for (int j = 0; j < kN; ++j) recalled[j] = fma(ki, load_some(state + i * e + 16 * j, width(j)), recalled[j]);
    }
    for (int j = 0; j < kN; ++j) delta[j] = mul(beta, sub(load_some(v + 16 * j, width(j)), mul(decay, recalled[j])));
    for (int64_t i = 0; i < d; ++i) {
      const F32x16 ki = set1(k[i]), qi = set1(q[i]);
      for (int j = 0; j < kN; ++j) {
        float* const at = state + i * e + 16 * j;
        const F32x16 s = fma(ki, delta[j], mul(decay, load_some(at, width(j))));
        store_some(at, s, width(j));
        y[j] = fma(qi, s, y[j]);
      }
    }
    for (int j = 0; j < kN; ++j) store_some(a.out + t * row + a.head * e + from + 16 * j, y[j], width(j));
  }
}

void gated_delta(const DeltaTask& a) {
  int64_t from = a.begin;
  for (; from + 32 <= a.end; from += 32) delta_columns<2>(a, from, 16);
  for (; from < a.end; from += 16) delta_columns<1>(a, from, a.end - from < 16 ? int(a.end - from) : 16);
}

// -------------------------------------------------------------------------------------------------------- selective scan

// `rows` rows of one head, for one token.
inline void scan_rows(const ScanTask& a, int64_t t, int64_t head, int64_t first, int64_t rows) {
  const int64_t n = a.state_dim, group = head / (a.heads / a.groups);
  const float dt = a.dt[t * a.heads + head];
  const float* const b = a.b + (t * a.groups + group) * n;
  const float* const c = a.c + (t * a.groups + group) * n;
  const F32x16 step = set1(dt);
  const F32x16 alike = exp16(mul(step, set1(a.a[head * a.a_columns])));
  const float skip = a.d ? a.d[head] : 0.0f;
  for (int64_t r = 0; r < rows; ++r) {
    float* const state = a.state + (head * a.head_dim + first + r) * n;
    const int64_t at = (t * a.heads + head) * a.head_dim + first + r;
    const F32x16 input = set1(dt * a.x[at]);
    F32x16 y = set1(0.0f);
    for (int64_t i = 0; i < n; i += 16) {
      const int m = n - i < 16 ? int(n - i) : 16;
      const F32x16 decay = a.a_columns == 1 ? alike : exp16(mul(step, load_some(a.a + head * n + i, m)));
      const F32x16 before = a.fresh && t == 0 ? set1(0.0f) : load_some(state + i, m);
      const F32x16 s = fma(input, load_some(b + i, m), mul(decay, before));
      store_some(state + i, s, m);
      y = fma(s, load_some(c + i, m), y);
    }
    a.out[at] = a.d ? std::fma(skip, a.x[at], reduce_add(y)) : reduce_add(y);
  }
}

void selective_scan(const ScanTask& a) {
  const int64_t p = a.head_dim;
  for (int64_t t = 0; t < a.tokens; ++t) {
    for (int64_t row = a.begin; row < a.end;) {
      const int64_t head = row / p, end = (head + 1) * p < a.end ? (head + 1) * p : a.end;
      scan_rows(a, t, head, row - head * p, end - row);
      row = end;
    }
  }
}
