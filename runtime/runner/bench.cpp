#include "bench.h"

#include <algorithm>
#include <chrono>

#include "greedy.h"

namespace {

const char kNoToken[] = "no logit is a number: the weights or the inputs are damaged";

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

moec_expert_stats difference(const moec_expert_stats& before, const moec_expert_stats& after) {
  moec_expert_stats found = after;
  for (const auto field :
       {&moec_expert_stats::hits, &moec_expert_stats::misses, &moec_expert_stats::bytes_read, &moec_expert_stats::stalled_ns,
        &moec_expert_stats::reading_ns, &moec_expert_stats::ahead, &moec_expert_stats::ahead_used,
        &moec_expert_stats::waiting_ns, &moec_expert_stats::active_ns, &moec_expert_stats::exposed_ns})
    found.*field -= before.*field;
  return found;
}

class Run {
 public:
  Run(moec_model* model, const BenchOptions& options) : model_(model), options_(options) {
    moec_model_get_info(model, &info_);
    logits_.resize(static_cast<size_t>(info_.vocab_size));
    chunk_ = options.chunk > 0 ? std::min(options.chunk, info_.max_tokens) : info_.max_tokens;
    stops_.resize(static_cast<size_t>(moec_model_eos_ids(model, nullptr, 0)));
    moec_model_eos_ids(model, stops_.data(), static_cast<int64_t>(stops_.size()));
  }

  // Ends with the logits of the last token.
  bool prefill(const int64_t* ids, int64_t count, int64_t start) {
    for (int64_t done = 0; done < count; done += chunk_) {
      const int64_t n = std::min(chunk_, count - done);
      if (!forward(ids + done, n, start + done)) return false;
    }
    return true;
  }

  int64_t best() const { return best_token(logits_); }

  bool decode(int64_t start, bool first, BenchResult* result) {
    moec_expert_stats before = {}, after = {};
    moec_model_expert_stats(model_, &before);
    const double begin = now();
    for (int64_t i = 0; i < options_.decode; ++i) {
      const int64_t id = options_.follow ? options_.prompt[static_cast<size_t>(start + i)] : best();
      if (id < 0) return false;
      if (first) result->generated.push_back(id);
      if (options_.stop && std::find(stops_.begin(), stops_.end(), id) != stops_.end()) break;
      const double began = now();
      if (!forward(&id, 1, start + i)) return false;
      result->decode_token_s.push_back(now() - began);
    }
    result->decode_s.push_back(now() - begin);
    moec_model_expert_stats(model_, &after);
    result->experts = difference(before, after);
    return true;
  }

  const moec_model_info& info() const { return info_; }

 private:
  bool forward(const int64_t* ids, int64_t n, int64_t start) {
    return moec_model_forward(model_, ids, n, start, 0, logits_.data(), info_.vocab_size) == 0;
  }

  moec_model* model_;
  const BenchOptions& options_;
  moec_model_info info_ = {};
  std::vector<float> logits_;
  std::vector<int64_t> stops_;
  int64_t chunk_ = 1;
};

}  // namespace

std::string run_bench(moec_model* model, const BenchOptions& options, BenchResult* result) {
  Run run(model, options);
  const int64_t prompt = static_cast<int64_t>(options.prompt.size()) - (options.follow ? options.decode : 0);
  const int64_t start = std::max(prompt, options.context);
  result->decode_start = start;
  if (prompt < 1) return options.follow ? "there are no ids before those to be decoded" : "the prompt is empty";
  if (start + options.decode > run.info().context)
    return "prompt, context and decoded tokens exceed the model's context of " + std::to_string(run.info().context);
  const std::vector<int64_t> filler = spread_tokens(start - prompt, run.info().vocab_size, 2);
  for (int64_t repeat = 0; repeat < options.repeats; ++repeat) {
    const double begin = now();
    if (!run.prefill(options.prompt.data(), prompt, 0)) return moec_model_error(model);
    result->prefill_s.push_back(now() - begin);
    // what a repeat wrote after the prompt is overwritten, or lies later than every query of the next one, which does not see it
    if (repeat == 0 && !filler.empty() && !run.prefill(filler.data(), start - prompt, prompt)) return moec_model_error(model);
    if (options.decode > 0 && !run.decode(start, repeat == 0, result)) {
      const std::string fault = moec_model_error(model);
      return fault.empty() ? kNoToken : fault;
    }
  }
  return "";
}

std::vector<int64_t> spread_tokens(int64_t count, int64_t vocab_size, uint64_t seed) {
  std::vector<int64_t> ids(static_cast<size_t>(std::max<int64_t>(count, 0)));
  uint64_t state = seed;
  for (int64_t& id : ids) {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    id = static_cast<int64_t>((z ^ (z >> 31)) % static_cast<uint64_t>(vocab_size));
  }
  return ids;
}

double median(std::vector<double> values) {
  if (values.empty()) return 0.0;
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 ? values[half] : (values[half - 1] + values[half]) / 2;
}
