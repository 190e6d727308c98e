#include "json_text.h"
#include "profile.h"

namespace {

std::string memory_json(const moec_memory& m) {
  char text[512];
  std::snprintf(text, sizeof text,
                "{\"resident\": %lld, \"weights\": %lld, \"caches\": %lld, \"activations\": %lld, \"anonymous\": %lld, "
                "\"libraries\": %lld, \"file_cached\": %lld}",
                static_cast<long long>(m.resident), static_cast<long long>(m.weights), static_cast<long long>(m.caches),
                static_cast<long long>(m.activations), static_cast<long long>(m.anonymous),
                static_cast<long long>(m.libraries), static_cast<long long>(m.file_cached));
  return text;
}

std::string table(const std::vector<std::vector<int64_t>>& rows) {
  std::string out = "[";
  for (const auto& row : rows) out += (out.size() > 1 ? ", " : "") + list(row);
  return out + "]";
}

std::string point_json(const ProfilePoint& p) {
  return "{\"tokens\": " + std::to_string(p.tokens) + ", \"prefill_s\": " + list(p.prefill_s) + ", \"decode_s\": " +
         list(p.decode_s) + ", \"token_s\": " + list(p.token_s) + ", \"experts_touched\": " +
         std::to_string(p.experts_touched) + ", \"prefilled\": " + memory_json(p.prefilled) + ", \"decoded\": " +
         memory_json(p.decoded) + "}";
}

std::string counts_json(const moec_expert_layer_stats& c) {
  return list(std::vector<int64_t>{c.hits, c.misses, c.bytes_read, c.stalled_ns, c.reading_ns, c.waiting_ns, c.active_ns, c.exposed_ns,
                                   c.ahead, c.ahead_used});
}

std::string use_json(const ExpertUse& use) {
  std::string layers;
  for (const moec_expert_layer_stats& layer : use.layers) layers += (layers.empty() ? "" : ", ") + counts_json(layer);
  return "{\"tokens\": " + std::to_string(use.tokens) + ", \"all\": " + counts_json(use.all) + ", \"layers\": [" + layers + "]}";
}

// The counts are in the order of moec_expert_layer_stats.
std::string budget_json(const ProfileResult& r) {
  if (!r.budget.budget) return "";
  return ", \"expert_cache\": {\"budget\": " + std::to_string(r.budget.budget) + ", \"experts\": " +
         std::to_string(r.budget.experts) + ", \"slots\": " + std::to_string(r.budget.slots) + ", \"slot_bytes\": " +
         std::to_string(r.budget.slot_bytes) + ", \"prefill\": " + use_json(r.prefill_use) + ", \"decode\": " +
         use_json(r.decode_use) + "}";
}

}  // namespace

std::string profile_json(const std::string& path, moec_model* model, const LoadReport& load, const ProfileOptions& options,
                         const ProfileResult& result) {
  moec_model_info info = {};
  moec_model_get_info(model, &info);
  const auto number = [](const char* name, int64_t value) {
    return std::string("\"") + name + "\": " + std::to_string(value) + ", ";
  };
  std::string points;
  for (const ProfilePoint& p : result.points) points += (points.empty() ? "" : ", ") + point_json(p);
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%.6f", load.seconds);
  return "{\"model\": " + quoted(path) + ", \"isa\": " + quoted(moec_model_isa()) + ", " + number("threads", info.threads) +
         number("file_bytes", info.file_bytes) + number("arena_bytes", info.arena_bytes) +
         number("max_tokens", info.max_tokens) + number("decode_tokens", options.decode) +
         number("cached_before", load.cached_bytes) + number("peak", result.peak_bytes) +
         "\"dropped\": " + (load.dropped ? "true" : "false") + ", \"load_s\": " + seconds +
         ", \"before\": " + memory_json(load.before) + ", \"loaded\": " + memory_json(load.loaded) + ", \"points\": [" +
         points + "], \"prefill_counts\": " + table(result.prefill_counts) + ", \"decode_counts\": " +
         table(result.decode_counts) + ", \"generated\": " + list(result.generated) + budget_json(result) + "}";
}
