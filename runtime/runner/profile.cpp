#include "profile.h"

#include <algorithm>
#include <chrono>

#include "greedy.h"

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Counts selections. A call of the model runs its MoE layers in order, so the n-th trace of a call is layer n.
class Selections {
 public:
  using Counts = std::vector<std::vector<int64_t>>;

  explicit Selections(bool enabled) {
    if (enabled) moec_model_trace(on_layer, this);
    enabled_ = enabled;
  }
  Selections(const Selections&) = delete;
  Selections& operator=(const Selections&) = delete;
  ~Selections() {
    if (enabled_) moec_model_trace(nullptr, nullptr);
  }

  void begin_call(Counts* counts) {
    counts_ = counts;
    layer_ = 0;
  }

 private:
  static void on_layer(void* user, int64_t tokens, int64_t, int64_t top_k, const float*, const int32_t* indices, const float*,
                       const float*) {
    auto& self = *static_cast<Selections*>(user);
    if (self.counts_->size() <= self.layer_) self.counts_->resize(self.layer_ + 1);
    auto& layer = (*self.counts_)[self.layer_++];
    for (int64_t i = 0; i < tokens * top_k; ++i) {
      const auto expert = static_cast<size_t>(indices[i]);
      if (layer.size() <= expert) layer.resize(expert + 1);
      ++layer[expert];
    }
  }

  Counts* counts_ = nullptr;
  size_t layer_ = 0;
  bool enabled_ = false;
};

int64_t touched(const Selections::Counts& a, const Selections::Counts& b) {
  int64_t count = 0;
  for (size_t l = 0; l < std::max(a.size(), b.size()); ++l) {
    const size_t experts = std::max(l < a.size() ? a[l].size() : 0, l < b.size() ? b[l].size() : 0);
    for (size_t e = 0; e < experts; ++e)
      count += (l < a.size() && e < a[l].size() && a[l][e] > 0) || (l < b.size() && e < b[l].size() && b[l][e] > 0);
  }
  return count;
}

moec_expert_layer_stats of_all(const moec_expert_stats& s) {
  return {s.hits,       s.misses,    s.bytes_read, s.stalled_ns, s.reading_ns,
          s.waiting_ns, s.active_ns, s.exposed_ns, s.ahead,      s.ahead_used};
}

// What the expert cache has counted so far; no layers without a budget.
struct ExpertCountsNow {
  moec_expert_layer_stats all = {};
  std::vector<moec_expert_layer_stats> layers;

  explicit ExpertCountsNow(moec_model* model) {
    moec_expert_stats stats = {};
    moec_model_expert_stats(model, &stats);
    all = of_all(stats);
    layers.resize(static_cast<size_t>(std::max<int64_t>(moec_model_expert_layer_stats(model, nullptr, 0), 0)));
    moec_model_expert_layer_stats(model, layers.data(), static_cast<int64_t>(layers.size()));
  }
};

void add_difference(const moec_expert_layer_stats& before, const moec_expert_layer_stats& now, moec_expert_layer_stats* sum) {
  for (const auto field :
       {&moec_expert_layer_stats::hits, &moec_expert_layer_stats::misses, &moec_expert_layer_stats::bytes_read,
        &moec_expert_layer_stats::stalled_ns, &moec_expert_layer_stats::reading_ns, &moec_expert_layer_stats::waiting_ns,
        &moec_expert_layer_stats::active_ns, &moec_expert_layer_stats::exposed_ns, &moec_expert_layer_stats::ahead,
        &moec_expert_layer_stats::ahead_used})
    sum->*field += now.*field - before.*field;
}

// Adds what was counted since `before` to `use`, for so many tokens more.
void count(const ExpertCountsNow& before, moec_model* model, int64_t tokens, ExpertUse* use) {
  const ExpertCountsNow now(model);
  use->tokens += tokens;
  use->layers.resize(now.layers.size());
  add_difference(before.all, now.all, &use->all);
  for (size_t i = 0; i < now.layers.size(); ++i) add_difference(before.layers[i], now.layers[i], &use->layers[i]);
}

class Pass {
 public:
  Pass(moec_model* model, const ProfileOptions& options, bool cold, ProfileResult* result)
      : model_(model), options_(options), cold_(cold), result_(result), selections_(cold) {
    moec_model_get_info(model, &info_);
    logits_.resize(static_cast<size_t>(info_.vocab_size));
  }

  bool run() {
    double prefill_s = 0.0;
    int64_t done = 0;
    result_->prefill_use = result_->decode_use = {};
    for (ProfilePoint& point : result_->points) {
      const ExpertCountsNow before(model_);
      const int64_t ahead = point.tokens - done;
      const double begin = now();
      for (; done < point.tokens; done += std::min(info_.max_tokens, point.tokens - done))
        if (!forward(&options_.prompt[static_cast<size_t>(done)], std::min(info_.max_tokens, point.tokens - done), done,
                     &result_->prefill_counts))
          return false;
      int64_t next = best();
      prefill_s += now() - begin;
      point.prefill_s.push_back(prefill_s);
      count(before, model_, ahead, &result_->prefill_use);
      if (cold_) moec_model_memory(model_, &point.prefilled);
      const ExpertCountsNow filled(model_);
      if (!decode(&point, next)) return false;
      count(filled, model_, options_.decode, &result_->decode_use);
      if (cold_) moec_model_memory(model_, &point.decoded);
      if (cold_) point.experts_touched = touched(result_->prefill_counts, result_->decode_counts);
    }
    return true;
  }

 private:
  // What it writes into the caches behind the point is overwritten when the prefill goes on.
  bool decode(ProfilePoint* point, int64_t next) {
    point->token_s.clear();
    const double begin = now();
    for (int64_t i = 0; i < options_.decode; ++i) {
      const int64_t id = options_.follow ? options_.prompt[static_cast<size_t>(point->tokens + i)] : next;
      if (cold_ && point == &result_->points.front()) result_->generated.push_back(next);
      const double before = now();
      if (!forward(&id, 1, point->tokens + i, &result_->decode_counts)) return false;
      next = best();
      point->token_s.push_back(now() - before);
    }
    point->decode_s.push_back(now() - begin);
    return true;
  }

  // where no logit is a number any token will do: what it costs is measured all the same
  int64_t best() const { return std::max<int64_t>(0, best_token(logits_)); }

  bool forward(const int64_t* ids, int64_t n, int64_t start, Selections::Counts* counts) {
    selections_.begin_call(counts);
    return moec_model_forward(model_, ids, n, start, 0, logits_.data(), info_.vocab_size) == 0;
  }

  moec_model* model_;
  const ProfileOptions& options_;
  bool cold_;
  ProfileResult* result_;
  Selections selections_;
  moec_model_info info_ = {};
  std::vector<float> logits_;
};

}  // namespace

std::string run_profile(moec_model* model, const ProfileOptions& options, ProfileResult* result) {
  moec_model_info info = {};
  moec_model_get_info(model, &info);
  const auto prompt = static_cast<int64_t>(options.prompt.size());
  if (prompt < 1) return "the prompt is empty";
  std::vector<int64_t> points = options.points;
  if (points.empty()) points.push_back(prompt);
  for (size_t i = 0; i < points.size(); ++i) {
    if (points[i] < 1 || (i > 0 && points[i] <= points[i - 1])) return "the points must be ascending, from 1 up";
    if (points[i] + (options.follow ? options.decode : 0) > prompt)
      return "point " + std::to_string(points[i]) + ": the prompt has " + std::to_string(prompt) + " tokens";
    if (points[i] + options.decode > info.context)
      return "prompt and decoded tokens exceed the model's context of " + std::to_string(info.context);
    ProfilePoint point;
    point.tokens = points[i];
    result->points.push_back(point);
  }
  for (int64_t pass = 0; pass <= options.warm; ++pass) {
    if (!Pass(model, options, pass == 0, result).run()) return moec_model_error(model);
    if (pass == 0) result->peak_bytes = moec_peak_rss();
  }
  moec_model_expert_stats(model, &result->budget);
  return "";
}
