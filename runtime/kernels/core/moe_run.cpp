// The mixture-of-experts block, in two schedules that compute the same bits.
//
// Few (token, expert) pairs: `run_narrow`. Three parallel regions, each cut along weight rows, because a region must read its
// weights with all threads: router + shared gate/up; routed gate/up + shared down; routed down + combine. Where experts are
// lent, the router is a region of its own, so that what it selects is read while the shared expert is computed.
// Many pairs: `run_wide`. Three regions: router per token tile; whole experts (gate/up, activation, down) per tile of their
// tokens, shared expert included; combine per token. An expert's weights are read once per tile.
//
// Names: pair = (token, rank), numbered token * top_k + rank. Pairs are counted and sorted by expert, stably, so that the
// pairs of expert e are order[first[e] .. first[e + 1]); position[pair] is the inverse.
#include "core/moe_run.h"

#include <cinttypes>
#include <cstring>

#include "core/experts.h"
#include "core/matmul.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/status.h"

namespace moec {
namespace {

constexpr int64_t kMostTile = 48;                // rows of an expert that share one reading of its weights
constexpr int64_t kRouterTile = 16;              // tokens routed together
constexpr int64_t kNarrowPairsPerThread = 8;     // up to here threads share rows of weights, above it whole experts
constexpr int64_t kUnitsPerWorker = 2;
constexpr int64_t kTileBytes = 3 << 20;          // activations of one worker's tile
constexpr int64_t kChunkBytes = int64_t{48} << 20;  // of expert outputs awaiting their combination

// The hidden width as a matrix dimension: rows of gate/up per hidden element.
int64_t hidden_rows(const Moe& moe) { return moe.gated ? 2 : 1; }

// One expert, routed or shared, as the tile functions see it.
struct Expert {
  Matrix w13, w2;  // of a routed expert: set while it is held
  const float* b13 = nullptr;
  const float* b2 = nullptr;
  int64_t width = 0;
  bool interleaved = false;
};

Expert routed_expert(const Moe& moe, int64_t e) {
  return {moe.w13, moe.w2, moe.b13 ? moe.b13 + e * moe.w13.n : nullptr,
          moe.b2 ? moe.b2 + e * moe.d : nullptr, moe.width, moe.interleaved};
}

Expert shared_expert(const Moe& moe) { return {moe.shared_w13, moe.shared_w2, nullptr, nullptr, moe.shared_width, false}; }

// hidden from h13 [rows, stride]: gate at column 0 and up at column up_column, or alternating.
void activate_rows(const Kernels& isa, const Moe& moe, bool interleaved, const float* h13, int64_t stride, int64_t up_column,
                   int64_t rows, int64_t width, float* hidden, int64_t hidden_stride) {
  ActivateTask a{};
  a.gate = h13;
  a.up = moe.gated ? h13 + (interleaved ? 1 : up_column) : nullptr;
  a.step = interleaved ? 2 : 1;
  a.stride = stride;
  a.rows = rows;
  a.width = width;
  a.activation = moe.activation;
  a.alpha = moe.alpha;
  a.gate_min = moe.gate_min;
  a.gate_max = moe.gate_max;
  a.up_min = moe.up_min;
  a.up_max = moe.up_max;
  a.up_offset = moe.up_offset;
  a.hidden = hidden;
  a.hidden_stride = hidden_stride;
  isa.activate(a);
}

// State that both schedules share.
struct Run {
  const Kernels& isa;
  const Moe& moe;
  int32_t threads;
  int64_t tokens, pairs;
  const float* x;
  const float* router_input;
  float* y;
  int32_t* indices;
  float* weights;
  // sorted pairs
  int32_t* first = nullptr;     // [experts + 1]
  int32_t* order = nullptr;     // [pairs]
  int32_t* position = nullptr;  // [pairs]
  int32_t* hit = nullptr;       // experts with tokens, in the order of the work on them
  int32_t* uses = nullptr;      // [experts]: how often the matrices of hit[i] are acquired
  int64_t hits = 0;
  Preference preference = {};   // of a call of one token

  int64_t count(int64_t e) const { return first[e + 1] - first[e]; }

  void sort_pairs() {
    std::memset(first, 0, size_t(moe.experts + 1) * 4);
    for (int64_t p = 0; p < pairs; ++p) ++first[indices[p] + 1];
    hits = 0;
    for (int64_t e = 0; e < moe.experts; ++e) {
      if (first[e + 1]) hit[hits++] = int32_t(e);
      first[e + 1] += first[e];
    }
    // first[e] advances to the end of its range, which is the beginning of the next: shift back afterwards
    for (int64_t p = 0; p < pairs; ++p) {
      const int32_t place = first[indices[p]]++;
      order[place] = int32_t(p);
      position[p] = place;
    }
    std::memmove(first + 1, first, size_t(moe.experts) * 4);
    first[0] = 0;
  }

  float input_weight(int64_t pair) const { return moe.routing.apply_input ? weights[pair] : 1.0f; }
  float output_weight(int64_t pair) const { return moe.routing.apply_input ? 1.0f : weights[pair]; }

  void route(int64_t token, int64_t n, float* logits, float* space) const {
    for (int64_t t = 0; t < n; ++t) {
      route_token(isa, moe.routing, moe.experts, moe.top_k, logits + t * moe.experts, moe.selection_bias, preference, space,
                  indices + (token + t) * moe.top_k, weights + (token + t) * moe.top_k);
    }
  }

  // sigmoid(x . shared_gate)
  float shared_factor(int64_t token) const {
    float logit = 0.0f, factor = 0.0f;
    isa.gemm_f32({moe.shared_gate, x + token * moe.d, moe.d, 1, 1, moe.d, nullptr, &logit, 1});
    isa.sigmoid(&logit, 1, &factor);
    return factor;
  }

  // Input row of a pair as floats: x, times the pair's weight when that applies to the input.
  void input_row(int64_t pair, float* out) const {
    const float* const from = x + pair / moe.top_k * moe.d;
    if (moe.routing.apply_input) {
      isa.add_scaled(from, weights[pair], moe.d, false, out);
    } else {
      std::memcpy(out, from, size_t(moe.d) * 4);
    }
  }

  void add_sort_plan(ScratchPlan& plan, size_t offsets[5]) const {
    offsets[0] = plan.add<int32_t>(moe.experts + 1);
    offsets[1] = plan.add<int32_t>(pairs);
    offsets[2] = plan.add<int32_t>(pairs);
    offsets[3] = plan.add<int32_t>(moe.experts);
    offsets[4] = plan.add<int32_t>(moe.experts);
  }
  void place_sort(uint8_t* base, const size_t offsets[5]) {
    first = reinterpret_cast<int32_t*>(base + offsets[0]);
    order = reinterpret_cast<int32_t*>(base + offsets[1]);
    position = reinterpret_cast<int32_t*>(base + offsets[2]);
    hit = reinterpret_cast<int32_t*>(base + offsets[3]);
    uses = reinterpret_cast<int32_t*>(base + offsets[4]);
  }
};

int32_t unreadable() { return fail(MOEC_UNREADABLE, "moe: the experts cannot be read"); }

int32_t no_memory(int64_t tokens) {
  return fail(MOEC_OUT_OF_MEMORY, "moe: no memory for the scratch of %" PRId64 " tokens", tokens);
}

// Rounded row i of `from`, for products with w, becomes row j of `to`.
void copy_quantized_row(const Matrix& w, const QuantizedRows& from, int64_t i, const QuantizedRows& to, int64_t j) {
  std::memcpy(to.q + j * to.stride, from.q + i * from.stride, size_t(from.stride));
  for (int64_t p = 0; p < w.scales_of_row(); ++p) to.scale[p * to.part_stride + j] = from.scale[p * from.part_stride + i];
  for (int64_t p = 0; p < w.parts(); ++p) {
    to.correction[p * to.part_stride + j] = from.correction[p * from.part_stride + i];
  }
}

// ------------------------------------------------------------------------------------------------------------------ wide

// What one worker holds: a tile's input, gate/up, hidden.
struct TileSpace {
  MatmulScratch matmul;
  float* x = nullptr;
  float* h13 = nullptr;
  float* hidden = nullptr;
  float* logits = nullptr;
  float* routing = nullptr;
  float* row = nullptr;
  QuantizedPlan input_plan, hidden_plan;
  QuantizedRows input, hidden_q;
  size_t x_at = 0, h13_at = 0, hidden_at = 0, logits_at = 0, routing_at = 0, row_at = 0;
};

struct WideTile {
  int32_t expert;  // -1: the shared one
  int32_t begin, count;
};

int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows of a tile so that a worker's activations stay within kTileBytes.
int64_t tile_rows(const Moe& moe) {
  const int64_t width = most(moe.width, moe.shared_width);
  const int64_t row = 4 * (hidden_rows(moe) * width + width + moe.d) + quantized_stride(moe.d) + quantized_stride(width);
  const int64_t rows = kTileBytes / row;
  return rows < 8 ? 8 : rows > kMostTile ? kMostTile : rows;
}

// Room for rows of `width` inputs that are rounded for the routed or for the shared matrix.
void add_rounded(QuantizedPlan& rounded, ScratchPlan& plan, const Moe& moe, int64_t rows, int64_t width, const Matrix& routed,
                 const Matrix& shared) {
  const bool both = moe.shared_width > 0;
  rounded.add(plan, rows, round_up(width, kUnit), most(routed.scales_of_row(), both ? shared.scales_of_row() : 1),
              most(routed.parts(), both ? shared.parts() : 1));
}

TileSpace plan_tile(const Kernels& isa, const Moe& moe, int64_t tile, ScratchPlan& plan) {
  TileSpace s;
  const int64_t width = most(moe.width, moe.shared_width);
  s.matmul.need(isa, moe.w13);
  s.matmul.need(isa, moe.w2);
  if (moe.shared_width) {
    s.matmul.need(isa, moe.shared_w13);
    s.matmul.need(isa, moe.shared_w2);
  }
  s.matmul.add(plan);
  s.x_at = plan.add<float>(tile * moe.d);
  s.h13_at = plan.add<float>(tile * hidden_rows(moe) * width);
  s.hidden_at = plan.add<float>(tile * width);
  s.logits_at = plan.add<float>(kRouterTile * moe.experts);
  s.routing_at = plan.add<float>(routing_scratch(moe.experts, moe.routing.groups, moe.top_k));
  s.row_at = plan.add<float>(moe.d);
  add_rounded(s.input_plan, plan, moe, tile, moe.d, moe.w13, moe.shared_w13);
  add_rounded(s.hidden_plan, plan, moe, tile, width, moe.w2, moe.shared_w2);
  return s;
}

void place_tile(TileSpace& s, uint8_t* base) {
  s.matmul.place(base);
  s.x = reinterpret_cast<float*>(base + s.x_at);
  s.h13 = reinterpret_cast<float*>(base + s.h13_at);
  s.hidden = reinterpret_cast<float*>(base + s.hidden_at);
  s.logits = reinterpret_cast<float*>(base + s.logits_at);
  s.routing = reinterpret_cast<float*>(base + s.routing_at);
  s.row = reinterpret_cast<float*>(base + s.row_at);
  s.input = s.input_plan.at(base);
  s.hidden_q = s.hidden_plan.at(base);
}

// The whole expert for m rows of input: out [m, d]. `held` gives w2 when gate/up is done; NULL: the shared one.
void run_expert(const Run& run, Expert& expert, HeldExpert* held, const Rows& input, TileSpace& s, float* out) {
  const Moe& moe = run.moe;
  const int64_t h13_stride = expert.w13.n;
  matmul(run.isa, expert.w13, 0, expert.w13.blocks(), input, expert.b13, s.h13, h13_stride, s.matmul);
  if (held && !held->w2(&expert.w2)) return;
  prefetch_blocks(expert.w2, 0, expert.w2.blocks());
  activate_rows(run.isa, moe, expert.interleaved, s.h13, h13_stride, expert.width, input.m, expert.width, s.hidden, expert.width);
  Rows hidden{input.m, s.hidden, expert.width, {}};
  if (needs_quantized(expert.w2.format)) {
    hidden.q = s.hidden_q;
    quantize_for(run.isa, expert.w2, s.hidden, expert.width, input.m, hidden.q);
  }
  matmul(run.isa, expert.w2, 0, expert.w2.blocks(), hidden, expert.b2, out, moe.d, s.matmul);
}

int32_t run_wide(Run& run) {
  const Moe& moe = run.moe;
  const int64_t d = moe.d, k = moe.top_k, rows = tile_rows(moe);
  const int64_t tile = rows < run.tokens ? rows : run.tokens;  // no expert gets more
  const int64_t shared_tiles = moe.shared_width ? divide_up(run.tokens, tile) : 0;
  const bool rounded_once = needs_quantized(moe.w13.format) && !moe.routing.apply_input;

  ScratchPlan plan, worker_plan;
  size_t sort[5];
  run.add_sort_plan(plan, sort);
  const size_t outputs_at = plan.add<float>(run.pairs * d);
  const int64_t most_tiles = shared_tiles + run.pairs / tile + (moe.experts < run.pairs ? moe.experts : run.pairs);
  const size_t tiles_at = plan.add<WideTile>(most_tiles);
  QuantizedPlan x_plan;
  if (rounded_once) x_plan.add(plan, run.tokens, moe.w13);
  const TileSpace space = plan_tile(run.isa, moe, tile, worker_plan);
  const size_t shared_bytes = plan.total();
  uint8_t* const base = scratch(shared_bytes + worker_plan.total() * size_t(run.threads));
  if (!base) return no_memory(run.tokens);
  run.place_sort(base, sort);
  auto* const outputs = reinterpret_cast<float*>(base + outputs_at);
  auto* const tiles = reinterpret_cast<WideTile*>(base + tiles_at);
  const QuantizedRows x_rounded = rounded_once ? x_plan.at(base) : QuantizedRows{};
  const auto mine = [&](int32_t worker) {
    TileSpace s = space;
    place_tile(s, base + shared_bytes + worker_plan.total() * size_t(worker));
    return s;
  };

  for_each_unit(run.threads, divide_up(run.tokens, kRouterTile), [&](int32_t worker, int64_t unit) {
    const TileSpace s = mine(worker);
    const int64_t t = unit * kRouterTile, n = run.tokens - t < kRouterTile ? run.tokens - t : kRouterTile;
    run.isa.gemm_f32({moe.router_weight, run.router_input + t * d, d, n, moe.experts, d, moe.router_bias, s.logits, moe.experts});
    run.route(t, n, s.logits, s.routing);
    if (rounded_once) quantize_for(run.isa, moe.w13, run.x + t * d, d, n, x_rounded.from(t));
  });

  run.sort_pairs();
  for (int64_t h = 0; h < run.hits; ++h) run.uses[h] = int32_t(2 * divide_up(run.count(run.hit[h]), tile));
  Experts experts(moe);
  if (!experts.begin(run.hit, run.uses, run.hits, shared_bytes + worker_plan.total() * size_t(run.threads))) return unreadable();
  experts.routed(run.tokens, run.router_input);
  int64_t n_tiles = 0;
  for (int64_t i = 0; i < shared_tiles; ++i) {  // first: they are the longest
    const int64_t begin = run.tokens * i / shared_tiles, end = run.tokens * (i + 1) / shared_tiles;
    tiles[n_tiles++] = {-1, int32_t(begin), int32_t(end - begin)};
  }
  for (int64_t h = 0; h < run.hits; ++h) {
    const int64_t e = run.hit[h], count = run.count(e), parts = divide_up(count, tile);
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t begin = count * i / parts, end = count * (i + 1) / parts;
      tiles[n_tiles++] = {int32_t(e), int32_t(run.first[e] + begin), int32_t(end - begin)};
    }
  }

  for_each_unit(run.threads, n_tiles, [&](int32_t worker, int64_t unit) {
    TileSpace s = mine(worker);
    const WideTile& job = tiles[unit];
    const bool is_shared = job.expert < 0;
    Expert expert = is_shared ? shared_expert(moe) : routed_expert(moe, job.expert);
    HeldExpert held(experts, job.expert);
    if (!is_shared && !held.w13(&expert.w13)) return;
    prefetch_blocks(expert.w13, 0, expert.w13.blocks());
    Rows input{job.count, s.x, d, s.input};
    if (is_shared) {
      input.x = run.x + job.begin * d;
    } else if (rounded_once) {
      for (int64_t i = 0; i < job.count; ++i) {
        copy_quantized_row(moe.w13, x_rounded, run.order[job.begin + i] / k, input.q, i);
      }
    } else {
      for (int64_t i = 0; i < job.count; ++i) run.input_row(run.order[job.begin + i], s.x + i * d);
    }
    if (needs_quantized(expert.w13.format) && (is_shared || !rounded_once)) {
      quantize_for(run.isa, expert.w13, input.x, d, job.count, input.q);
    }
    run_expert(run, expert, is_shared ? nullptr : &held, input, s, is_shared ? run.y + job.begin * d : outputs + job.begin * d);
  });

  experts.end();
  if (experts.failed()) return unreadable();

  for_each_unit(run.threads, divide_up(run.tokens, kRouterTile), [&](int32_t worker, int64_t unit) {
    const TileSpace s = mine(worker);
    for (int64_t t = unit * kRouterTile; t < run.tokens && t < (unit + 1) * kRouterTile; ++t) {
      float* const y = run.y + t * d;
      float* const sum = moe.shared_width ? s.row : y;
      for (int64_t j = 0; j < k; ++j) {
        const int64_t pair = t * k + j;
        run.isa.add_scaled(outputs + run.position[pair] * d, run.output_weight(pair), d, j > 0, sum);
      }
      if (!moe.shared_width) continue;
      if (moe.shared_gate) run.isa.add_scaled(y, run.shared_factor(t), d, false, y);
      run.isa.add(sum, d, y);
    }
  });
  return MOEC_OK;
}

// ---------------------------------------------------------------------------------------------------------------- narrow

// The hidden width in steps whose gate/up rows are whole row blocks (and whole groups along the output). A width that does
// not divide into such steps is one step.
struct HiddenSteps {
  int64_t step = 0, count = 0;

  HiddenSteps(const Expert& e, bool gated) {
    const int64_t rows = kBlockRows * e.w13.blocks_together();
    step = gated && e.interleaved ? rows / 2 : rows;
    if (gated && !e.interleaved && e.width % rows) step = e.width;
    count = divide_up(e.width, step);
  }
};

// gate/up rows of hidden elements [begin, end), then the activation: hidden [m, width], written at column begin.
void narrow_up(const Run& run, const Expert& e, int64_t begin, int64_t end, const Rows& input, const MatmulScratch& scratch,
               float* h13, float* hidden) {
  const Moe& moe = run.moe;
  const int64_t n = end - begin;
  int64_t stride = round_up(hidden_rows(moe) * n, kBlockRows), up_column = 0;
  if (!moe.gated) {
    matmul(run.isa, e.w13, begin / kBlockRows, divide_up(end, kBlockRows), input, e.b13, h13, stride, scratch);
  } else if (e.interleaved) {
    matmul(run.isa, e.w13, 2 * begin / kBlockRows, divide_up(2 * end, kBlockRows), input, e.b13, h13, stride, scratch);
  } else if (n == e.width) {
    matmul(run.isa, e.w13, 0, e.w13.blocks(), input, e.b13, h13, stride, scratch);
    up_column = e.width;
  } else {
    up_column = n;
    prefetch_blocks(e.w13, (e.width + begin) / kBlockRows, (e.width + end) / kBlockRows);
    matmul(run.isa, e.w13, begin / kBlockRows, end / kBlockRows, input, e.b13, h13, stride, scratch);
    matmul(run.isa, e.w13, (e.width + begin) / kBlockRows, (e.width + end) / kBlockRows, input, e.b13, h13 + n, stride, scratch);
  }
  activate_rows(run.isa, moe, e.interleaved, h13, stride, up_column, input.m, n, hidden + begin, e.width);
}

// How many steps a unit of work takes so that there are enough units, and no more than needed.
int64_t steps_per_unit(int64_t steps, int64_t lists, int32_t threads) {
  const int64_t wanted = threads == 1 ? lists : threads * kUnitsPerWorker;
  const int64_t units = most(1, wanted / most(1, lists));
  return divide_up(steps, units < steps ? units : steps);
}

int32_t run_narrow(Run& run) {
  const Moe& moe = run.moe;
  const int64_t d = moe.d, k = moe.top_k, t = run.tokens, f = moe.width, s = moe.shared_width;
  const bool shared = s > 0;
  const Expert shared_e = shared ? shared_expert(moe) : Expert{};
  const bool round_in = needs_quantized(moe.w13.format), round_hidden = needs_quantized(moe.w2.format);
  const bool round_shared = shared && needs_quantized(moe.shared_w13.format);
  const bool round_shared_hidden = shared && needs_quantized(moe.shared_w2.format);
  const int64_t input_rows = moe.routing.apply_input ? run.pairs : t;  // rows that gate/up is given

  const HiddenSteps up(routed_expert(moe, 0), moe.gated);
  const HiddenSteps shared_up = shared ? HiddenSteps(shared_e, moe.gated) : up;
  const int64_t most_hits = moe.experts < run.pairs ? moe.experts : run.pairs;

  ScratchPlan plan, worker_plan;
  size_t sort[5];
  run.add_sort_plan(plan, sort);
  const size_t logits_at = plan.add<float>(t * moe.experts);
  const size_t routing_at = plan.add<float>(routing_scratch(moe.experts, moe.routing.groups, k));
  const size_t inputs_at = plan.add<float>(run.pairs * d);
  const size_t hidden_at = plan.add<float>(run.pairs * f);
  const size_t shared_hidden_at = plan.add<float>(t * s);
  QuantizedPlan in_plan, hidden_plan, shared_plan, shared_hidden_plan, gather_plan;
  if (round_in) {
    in_plan.add(plan, input_rows, moe.w13);
    gather_plan.add(plan, run.pairs, moe.w13);
  }
  if (round_hidden) hidden_plan.add(plan, run.pairs, moe.w2);
  if (round_shared) shared_plan.add(plan, t, moe.shared_w13);
  if (round_shared_hidden) shared_hidden_plan.add(plan, t, moe.shared_w2);
  MatmulScratch matmul_plan;
  matmul_plan.need(run.isa, moe.w13);
  matmul_plan.need(run.isa, moe.w2);
  if (shared) {
    matmul_plan.need(run.isa, moe.shared_w13);
    matmul_plan.need(run.isa, moe.shared_w2);
  }
  matmul_plan.add(worker_plan);
  // a unit's gate/up rows, or a unit's outputs of all pairs
  const int64_t h13_floats = most(t * round_up(hidden_rows(moe) * most(f, s), kBlockRows), run.pairs * round_up(d, kBlockRows));
  const size_t h13_at = worker_plan.add<float>(h13_floats);
  const size_t row_at = worker_plan.add<float>(round_up(d, kBlockRows));
  const size_t shared_bytes = plan.total();
  uint8_t* const base = scratch(shared_bytes + worker_plan.total() * size_t(run.threads));
  if (!base) return no_memory(t);
  run.place_sort(base, sort);
  auto* const logits = reinterpret_cast<float*>(base + logits_at);
  auto* const inputs = reinterpret_cast<float*>(base + inputs_at);
  auto* const hidden = reinterpret_cast<float*>(base + hidden_at);
  auto* const shared_hidden = reinterpret_cast<float*>(base + shared_hidden_at);
  const auto worker_base = [&](int32_t worker) { return base + shared_bytes + worker_plan.total() * size_t(worker); };
  const auto matmul_scratch = [&](int32_t worker) {
    MatmulScratch m = matmul_plan;
    m.place(worker_base(worker));
    return m;
  };
  const auto floats = [&](int32_t worker, size_t at) { return reinterpret_cast<float*>(worker_base(worker) + at); };

  // Region 1: router, shared gate/up.
  const QuantizedRows shared_x = round_shared ? shared_plan.at(base) : QuantizedRows{};
  if (round_shared) quantize_for(run.isa, moe.shared_w13, run.x, d, t, shared_x);
  const int64_t router_rows = run.threads == 1 ? moe.experts : round_up(divide_up(moe.experts, 2 * run.threads), 4);
  const int64_t router_units = divide_up(moe.experts, router_rows);
  const int64_t shared_steps = shared ? steps_per_unit(shared_up.count, 1, run.threads) : 1;
  const int64_t shared_units = shared ? divide_up(shared_up.count, shared_steps) : 0;
  const auto router_unit = [&](int64_t unit) {
    const int64_t e = unit * router_rows, n = moe.experts - e < router_rows ? moe.experts - e : router_rows;
    run.isa.gemm_f32({moe.router_weight + e * d, run.router_input, d, t, n, d, moe.router_bias ? moe.router_bias + e : nullptr,
                      logits + e, moe.experts});
  };
  const auto shared_up_unit = [&](int32_t worker, int64_t unit) {
    const int64_t begin = unit * shared_steps * shared_up.step, end = begin + shared_steps * shared_up.step;
    narrow_up(run, shared_e, begin, end < s ? end : s, {t, run.x, d, shared_x}, matmul_scratch(worker), floats(worker, h13_at),
              shared_hidden);
  };
  const bool apart = expert_source() != nullptr;
  for_each_unit(run.threads, router_units + (apart ? 0 : shared_units), [&](int32_t worker, int64_t unit) {
    unit < router_units ? router_unit(unit) : shared_up_unit(worker, unit - router_units);
  });

  run.route(0, t, logits, reinterpret_cast<float*>(base + routing_at));
  run.sort_pairs();
  const int64_t up_steps = steps_per_unit(up.count, most_hits, run.threads), up_units = divide_up(up.count, up_steps);
  const int64_t w2_together = moe.w2.blocks_together();
  const int64_t out_blocks = w2_together * steps_per_unit(divide_up(moe.w2.blocks(), w2_together), 1, run.threads);
  const int64_t out_units = divide_up(moe.w2.blocks(), out_blocks);
  for (int64_t h = 0; h < run.hits; ++h) run.uses[h] = int32_t(up_units + out_units);
  Experts experts(moe);
  if (!experts.begin(run.hit, run.uses, run.hits, shared_bytes + worker_plan.total() * size_t(run.threads))) return unreadable();
  experts.routed(t, run.router_input);
  if (apart && shared) for_each_unit(run.threads, shared_units, shared_up_unit);
  QuantizedRows pair_q = round_in ? gather_plan.at(base) : QuantizedRows{};
  const bool gather_rounded = round_in && !moe.routing.apply_input;
  if (gather_rounded) {
    const QuantizedRows once = in_plan.at(base);
    quantize_for(run.isa, moe.w13, run.x, d, t, once);
    for (int64_t i = 0; i < run.pairs; ++i) copy_quantized_row(moe.w13, once, run.order[i] / k, pair_q, i);
  } else {
    for (int64_t i = 0; i < run.pairs; ++i) run.input_row(run.order[i], inputs + i * d);
    if (round_in) quantize_for(run.isa, moe.w13, inputs, d, run.pairs, pair_q);
  }
  const QuantizedRows shared_hidden_q = round_shared_hidden ? shared_hidden_plan.at(base) : QuantizedRows{};
  if (round_shared_hidden) quantize_for(run.isa, moe.shared_w2, shared_hidden, s, t, shared_hidden_q);

  // Region 2: routed gate/up, shared down (its outputs go to y).
  const int64_t together = shared ? moe.shared_w2.blocks_together() : 1;
  const int64_t down_steps = shared ? steps_per_unit(divide_up(moe.shared_w2.blocks(), together), 1, run.threads) : 1;
  const int64_t down_blocks = down_steps * together;
  const int64_t down_units = shared ? divide_up(moe.shared_w2.blocks(), down_blocks) : 0;
  const int64_t down_first = apart ? down_units : 0;  // the last experts of the list may still be read
  for_each_unit(run.threads, run.hits * up_units + down_units, [&](int32_t worker, int64_t number) {
    const MatmulScratch scratch_w = matmul_scratch(worker);
    const int64_t unit = number < down_first ? run.hits * up_units + number : number - down_first;
    if (unit < run.hits * up_units) {
      const int64_t e = run.hit[unit / up_units], begin = unit % up_units * up_steps * up.step;
      const int64_t end = begin + up_steps * up.step, at = run.first[e];
      const Rows input{run.count(e), inputs + at * d, d, round_in ? pair_q.from(at) : QuantizedRows{}};
      Expert expert = routed_expert(moe, e);
      HeldExpert held(experts, e);
      if (!held.w13(&expert.w13)) return;
      narrow_up(run, expert, begin, end < f ? end : f, input, scratch_w, floats(worker, h13_at), hidden + at * f);
      return;
    }
    const int64_t block = (unit - run.hits * up_units) * down_blocks, end = block + down_blocks;
    const int64_t last = end < moe.shared_w2.blocks() ? end : moe.shared_w2.blocks();
    matmul(run.isa, moe.shared_w2, block, last, {t, shared_hidden, s, shared_hidden_q}, nullptr, run.y + block * kBlockRows, d,
           scratch_w);
  });

  if (experts.failed()) return unreadable();
  const QuantizedRows hidden_q = round_hidden ? hidden_plan.at(base) : QuantizedRows{};
  if (round_hidden) quantize_for(run.isa, moe.w2, hidden, f, run.pairs, hidden_q);

  // Region 3: routed down for some outputs of all pairs, and their combination.
  for_each_unit(run.threads, out_units, [&](int32_t worker, int64_t unit) {
    const MatmulScratch scratch_w = matmul_scratch(worker);
    float* const outputs = floats(worker, h13_at);
    float* const row = floats(worker, row_at);
    const int64_t block = unit * out_blocks;
    const int64_t last = block + out_blocks < moe.w2.blocks() ? block + out_blocks : moe.w2.blocks();
    const int64_t begin = block * kBlockRows, n = (last * kBlockRows < d ? last * kBlockRows : d) - begin;
    for (int64_t h = 0; h < run.hits; ++h) {
      const int64_t e = run.hit[h], at = run.first[e];
      Expert expert = routed_expert(moe, e);
      HeldExpert held(experts, e);
      if (!held.w2(&expert.w2)) return;
      if (h + 1 < run.hits && !experts.lent()) prefetch_blocks(moe.expert_w2(run.hit[h + 1]), block, last);
      const Rows rows{run.count(e), hidden + at * f, f, round_hidden ? hidden_q.from(at) : QuantizedRows{}};
      matmul(run.isa, expert.w2, block, last, rows, expert.b2, outputs + at * n, n, scratch_w);
    }
    for (int64_t token = 0; token < t; ++token) {
      float* const y = run.y + token * d + begin;
      float* const sum = shared ? row : y;
      for (int64_t j = 0; j < k; ++j) {
        const int64_t pair = token * k + j;
        run.isa.add_scaled(outputs + run.position[pair] * n, run.output_weight(pair), n, j > 0, sum);
      }
      if (!shared) continue;
      if (moe.shared_gate) run.isa.add_scaled(y, run.shared_factor(token), n, false, y);
      run.isa.add(sum, n, y);
    }
  });
  return experts.failed() ? unreadable() : MOEC_OK;
}

thread_local const moec_expert_source* source = nullptr;

}  // namespace

const moec_expert_source* expert_source() { return source; }

int32_t run_moe(const Moe& moe, int64_t tokens, bool alone, const float* x, const float* router_input, float* y,
                int32_t* indices, float* weights) {
  if (tokens == 0) return MOEC_OK;
  Run run{kernels(), moe, workers(), tokens, tokens * moe.top_k, x, router_input, y, indices, weights};
  if (alone && source && source->preferred) {
    run.preference.share = source->preferred(source->user, moe.w13.data, moe.experts, &run.preference.flags);
    if (!(run.preference.share > 0.0f)) run.preference.flags = nullptr;
  }
  return run.pairs <= kNarrowPairsPerThread * run.threads ? run_narrow(run) : run_wide(run);
}

int64_t moe_chunk_tokens(const Moe& moe) {
  const int64_t tokens = kChunkBytes / (4 * moe.d * moe.top_k);
  return tokens < 64 ? 64 : tokens;
}

}  // namespace moec

void moec_use_expert_source(const moec_expert_source* source) { moec::source = source; }
