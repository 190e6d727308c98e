// The reference: the equations, one value at a time. The vector files are tested against it.
#include <math.h>
#include <string.h>

#include "attention_kernels.h"

namespace moec {
namespace {

float at(const void* cache, int64_t row, int64_t width, int64_t i) { return static_cast<const float*>(cache)[row * width + i]; }

// Over an INT8 cache a query is rounded to 16 bits, and the weights of a chunk to 15: see attention_codes.inl.
float code_of(float x, float inverse, float most) {
  const float v = nearbyintf(x * inverse);
  return v > -most ? (v < most ? v : most) : -most;  // NaN: -most
}

float largest(const float* x, int64_t n, float* fault) {
  float highest = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    if (fabsf(x[i]) > highest) highest = fabsf(x[i]);
    *fault += x[i] - x[i];  // 0, or NaN if the value is not finite
  }
  return highest;
}

void attend_codes(const AttentionCall& call, const AttentionItem& item, int64_t token, int64_t head, float* scratch, float* acc,
                  float* row_max, float* row_sum) {
  const int64_t d = call.head_dim, e = call.value_dim, kv = call.kv_heads, g = head / (call.heads / kv);
  const int64_t rest = call.rest_dim, width = call.width();
  const int8_t* k_codes = static_cast<const int8_t*>(call.k_cache);
  const int8_t* rest_codes = static_cast<const int8_t*>(call.k_rest);
  const int8_t* v_codes = static_cast<const int8_t*>(call.v_cache);
  int64_t first = call.first_key(token), last = call.start + token + 1;
  if (first < item.key_begin) first = item.key_begin;
  if (last > item.key_end) last = item.key_end;
  const int64_t limit = 0x7fffffff / (128 * width), top_code = limit < 1 ? 1 : limit;
  const float most = static_cast<float>(top_code < kMostCode ? top_code : kMostCode);
  float fault = 0.0f;
  float* codes = scratch + kKeyChunk;  // [width]
  memcpy(codes, call.q + (token * call.heads + head) * d, static_cast<size_t>(d) * sizeof(float));
  if (rest) memcpy(codes + d, call.q_rest + (token * call.heads + head) * rest, static_cast<size_t>(rest) * sizeof(float));
  const float highest = largest(codes, width, &fault), inverse = highest > 1e-30f ? most / highest : 0.0f;
  const float step = (highest > 1e-30f ? highest / most : 1.0f) + fault;
  for (int64_t i = 0; i < width; ++i) codes[i] = code_of(codes[i], inverse, most);
  float top = -3.402823466e38f, sum = 0.0f, heaviest = 0.0f, wrong = 0.0f;
  for (int64_t j = first; j < last; ++j) {
    int64_t dot = 0;
    for (int64_t i = 0; i < d; ++i) dot += static_cast<int64_t>(codes[i]) * k_codes[(j * kv + g) * d + i];
    int64_t dot_rest = 0;
    for (int64_t i = 0; i < rest; ++i) dot_rest += static_cast<int64_t>(codes[d + i]) * rest_codes[(j * kv + g) * rest + i];
    float score = static_cast<float>(dot) * (call.scale * call.k_scale[j * kv + g]);
    if (rest) score += static_cast<float>(dot_rest) * (call.scale * call.k_rest_scale[j * kv + g]);
    score *= step;
    if (call.softcap > 0.0f) score = call.softcap * tanhf(score / call.softcap);
    scratch[j - first] = score;
    if (!(score <= top)) top = score;
  }
  for (int64_t j = first; j < last; ++j) {
    const float p = expf(scratch[j - first] - top), scale = call.v_scale[j * kv + g];
    const bool sound = scale >= 0.0f && scale <= 3.402823466e38f;
    sum += p;
    scratch[j - first] = sound ? p * scale : 0.0f;
    if (!sound) wrong = NAN;
    if (scratch[j - first] > heaviest) heaviest = scratch[j - first];
  }
  const float all = static_cast<float>(kMostCode), by = heaviest > 1e-30f ? all / heaviest : 0.0f;
  for (int64_t j = first; j < last; ++j) scratch[j - first] = code_of(scratch[j - first], by, all);
  for (int64_t i = 0; i < e; ++i) {
    int64_t total = 0;
    for (int64_t j = first; j < last; ++j) total += static_cast<int64_t>(scratch[j - first]) * v_codes[(j * kv + g) * e + i];
    acc[i] = static_cast<float>(total) * (heaviest * (1.0f / all) + wrong);
  }
  *row_max = top;
  *row_sum = sum;
}

// One query head over its keys; two passes over the scores, which `scratch` holds.
void attend(const AttentionCall& call, const AttentionItem& item, int64_t token, int64_t head, float* scratch, float* acc,
            float* row_max, float* row_sum) {
  if (call.k_scale) return attend_codes(call, item, token, head, scratch, acc, row_max, row_sum);
  const int64_t d = call.head_dim, e = call.value_dim, kv = call.kv_heads, g = head / (call.heads / kv);
  const float* q = call.q + (token * call.heads + head) * d;
  int64_t first = call.first_key(token), last = call.start + token + 1;
  if (first < item.key_begin) first = item.key_begin;
  if (last > item.key_end) last = item.key_end;
  for (int64_t i = 0; i < e; ++i) acc[i] = 0.0f;
  float top = -3.402823466e38f, sum = 0.0f;
  for (int64_t j = first; j < last; ++j) {
    float dot = 0.0f;
    for (int64_t i = 0; i < d; ++i) dot += q[i] * at(call.k_cache, j * kv + g, d, i);
    for (int64_t i = 0; i < call.rest_dim; ++i)
      dot += call.q_rest[(token * call.heads + head) * call.rest_dim + i] * at(call.k_rest, j * kv + g, call.rest_dim, i);
    scratch[j - first] = dot * call.scale;
    if (call.softcap > 0.0f) scratch[j - first] = call.softcap * tanhf(scratch[j - first] / call.softcap);
    if (!(scratch[j - first] <= top)) top = scratch[j - first];
  }
  for (int64_t j = first; j < last; ++j) {
    const float p = expf(scratch[j - first] - top);
    sum += p;
    for (int64_t i = 0; i < e; ++i) acc[i] += p * at(call.v_cache, j * kv + g, e, i);
  }
  *row_max = top;
  *row_sum = sum;
}

void prepare(const AttentionCall&, const AttentionItem&, float*) {}

void tile(const AttentionCall& call, const AttentionItem& item, float* scratch) {
  const int64_t per = call.heads / call.kv_heads, e = call.value_dim;
  int64_t row = 0;
  for (int64_t t = item.token_begin; t < item.token_end; ++t)
    for (int64_t h = item.kv_begin * per; h < item.kv_end * per; ++h, ++row)
      attend(call, item, t, h, scratch, item.partial_acc + row * e, item.partial_max + row, item.partial_sum + row);
}

void decode(const AttentionCall& call, const AttentionItem& item, float* scratch) {
  const int64_t per = call.heads / call.kv_heads;
  for (int64_t h = item.kv_begin * per; h < item.kv_end * per; ++h)
    attend(call, item, 0, h, scratch, item.partial_acc + h * call.value_dim, item.partial_max + h, item.partial_sum + h);
}

void fold_row(const float* part, float part_max, float part_sum, int64_t n, float* acc, float* row_max, float* row_sum) {
  const float top = part_max > *row_max ? part_max : *row_max;
  const float old = expf(*row_max - top), fresh = expf(part_max - top);
  *row_sum = old * *row_sum + fresh * part_sum;
  *row_max = top;
  for (int64_t j = 0; j < n; ++j) acc[j] = old * acc[j] + fresh * part[j];
}

void quantize_row(const float* x, int64_t n, int8_t* q, float* scale) {
  float highest = 0.0f, fault = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    if (fabsf(x[i]) > highest) highest = fabsf(x[i]);
    fault += x[i] - x[i];  // 0, or NaN if the value is not finite
  }
  *scale = highest / 127.0f + fault;
  const float inverse = highest > 0.0f ? 127.0f / highest : 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float v = nearbyintf(x[i] * inverse);
    q[i] = static_cast<int8_t>(v > -127.0f ? (v < 127.0f ? v : 127.0f) : -127.0f);  // NaN: -127
  }
}

void rms_norm_row(const float* x, const float* weight, int64_t n, float eps, float* y) {
  float sum = 0.0f;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  const float factor = 1.0f / sqrtf(sum / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) y[i] = weight ? x[i] * factor * weight[i] : x[i] * factor;
}

void rope_row(const float* x, const float* cos, const float* sin, int64_t n, bool interleaved, float* y) {
  const int64_t half = n / 2;
  for (int64_t i = 0; i < half; ++i) {
    const int64_t first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : half + i;
    const float a = x[first], b = x[second];
    y[first] = a * cos[i] - b * sin[i];
    y[second] = b * cos[i] + a * sin[i];
  }
}

const AttentionKernels kKernels = {1, 1, decode, prepare, tile, fold_row, quantize_row, rms_norm_row, rope_row};

}  // namespace

const AttentionKernels& scalar_attention() { return kKernels; }

}  // namespace moec
