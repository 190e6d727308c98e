// Rows of a cache rounded to INT8, RMS norms and rotary embedding. Included by attention_simd.inl.

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
