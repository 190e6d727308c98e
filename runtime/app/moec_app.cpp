// The C API of moec.h: artifacts, sessions and generations.
#include <string>
#include <vector>

#include "api.h"
#include "scores.h"

namespace {

constexpr int64_t kMostBiases = 100'000;

void fill_defaults(const OpenArtifact& artifact, moec_app_options* options) {
  const SamplingDefaults& given = artifact.tokenizer().tables().sampling;
  *options = {};
  options->size = sizeof *options;
  options->temperature = given.temperature;
  options->top_k = given.top_k >= 0 && given.top_k <= INT32_MAX ? static_cast<int32_t>(given.top_k) : 0;
  options->top_p = given.top_p;
  options->min_p = given.min_p;
  options->repeat_penalty = given.repeat_penalty;
  options->max_new_tokens = -1;
  options->speculate = 1;
  options->top_scores = -1;
}

Sampling sampling_of(const moec_app_options& options, int64_t vocabulary) {
  Sampling found;
  found.temperature = options.temperature;
  found.top_k = options.top_k;
  found.top_p = options.top_p;
  found.min_p = options.min_p;
  found.repeat_penalty = options.repeat_penalty;
  found.presence_penalty = options.presence_penalty;
  found.frequency_penalty = options.frequency_penalty;
  found.seed = options.seed;
  if (options.bias_count < 0 || options.bias_count > kMostBiases || (options.bias_count > 0 && !options.biases))
    throw Fault("biases: NULL, or not 0 to 100000 of them");
  for (int64_t i = 0; i < options.bias_count; ++i) found.biases.emplace_back(options.biases[i].token, options.biases[i].bias);
  const std::string fault = found.check(vocabulary);
  if (!fault.empty()) throw Fault(fault);
  if (options.max_new_tokens < -1) throw Fault("max_new_tokens: -1 (to the end of the context), 0 or above");
  return found;
}

std::vector<std::string> stops_of(const moec_app_options& options) {
  if (options.stop_count < 0 || options.stop_count > static_cast<int64_t>(StopStrings::kMost) || (options.stop_count > 0 && !options.stops))
    throw Fault("stops: NULL, or not 0 to 1000 of them");
  std::vector<std::string> found;
  for (int64_t i = 0; i < options.stop_count; ++i) {
    const std::string name = "stops[" + std::to_string(i) + "]";
    found.push_back(text_of(options.stops[i], -1, name.c_str()));
    if (found.back().empty() || found.back().size() > StopStrings::kLongest) throw Fault(name + ": empty, or more than 4096 bytes");
    if (valid_utf8(found.back()) != found.back().size()) throw Fault(name + ": is not UTF-8");
  }
  return found;
}

// A session of the model that drafts: the one of an id, or a new one of an artifact; nullptr for 0.
std::shared_ptr<OpenSession> draft_of(int64_t id) {
  if (id == 0) return nullptr;
  if (const auto artifact = std::dynamic_pointer_cast<OpenArtifact>(registered(id)))
    return std::make_shared<OpenSession>(artifact, moec_session_open(artifact->model()));
  return named<OpenSession>(id, "artifact or session that drafts");
}

}  // namespace

const char* moec_app_error(void) { return kept_error(); }

int64_t moec_app_open(const char* folder, const moec_app_open_options* options) {
  return guarded<int64_t>([&] {
    moec_app_open_options given = {sizeof(moec_app_open_options), 0, 0};
    if (options) {
      check_size(options, "options");
      given = *options;
    }
    if (given.threads < 0 || given.memory_bytes < 0) throw Fault("options: a negative number");
    return register_object(std::make_shared<OpenArtifact>(text_of(folder, -1, "folder"), given.threads, given.memory_bytes));
  });
}

int32_t moec_app_close(int64_t id) {
  return guarded<int32_t>([&] {
    if (!unregister(id)) throw Fault(std::to_string(id) + " is not open");
    return 0;
  });
}

int32_t moec_app_describe(int64_t artifact, moec_app_info* info) {
  return guarded<int32_t>([&] {
    const auto found = artifact_of(artifact);
    check_size(info, "info");
    const TextTables& tables = found->tokenizer().tables();
    const bool calls = tables.answers.calls >= 0 || tables.answers.channels, thinks = tables.answers.thinks || tables.answers.channels;
    *info = {sizeof(moec_app_info), tables.chat ? 1 : 0, found->info().vocab_size, found->info().context, found->info().threads,
             found->info().rewinds ? 1 : 0, calls ? 1 : 0, thinks ? 1 : 0, found->speculates() ? 1 : 0,
             tables.chat && tables.tools && tables.tools->missing().empty() ? 1 : 0, 0};
    return 0;
  });
}

int64_t moec_app_stop_tokens(int64_t artifact, int32_t* ids, int64_t capacity) {
  return guarded<int64_t>([&] { return written(artifact_of(artifact)->stop_tokens(), ids, capacity); });
}

int64_t moec_app_session(int64_t artifact) {
  return guarded<int64_t>([&] {
    const auto found = artifact_of(artifact);
    return register_object(std::make_shared<OpenSession>(found, moec_session_open(found->model())));
  });
}

int64_t moec_app_fork(int64_t session) {
  return guarded<int64_t>([&] {
    const auto found = session_of(session);
    const std::lock_guard<std::mutex> lock(found->busy);
    return register_object(found->fork());
  });
}

int64_t moec_app_tokens(int64_t session, int32_t* ids, int64_t capacity) {
  return guarded<int64_t>([&] {
    const auto found = session_of(session);
    const std::lock_guard<std::mutex> lock(found->busy);
    return written(found->tokens(), ids, capacity);
  });
}

int32_t moec_app_rewind(int64_t session, int64_t position) {
  return guarded<int32_t>([&] {
    const auto found = session_of(session);
    const std::lock_guard<std::mutex> lock(found->busy);
    found->rewind(position);
    return 0;
  });
}

int32_t moec_app_save(int64_t session, const char* path) {
  return guarded<int32_t>([&] {
    const auto found = session_of(session);
    const std::lock_guard<std::mutex> lock(found->busy);
    found->save(text_of(path, -1, "path"));
    return 0;
  });
}

int32_t moec_app_restore(int64_t session, const char* path) {
  return guarded<int32_t>([&] {
    const auto found = session_of(session);
    const std::lock_guard<std::mutex> lock(found->busy);
    found->restore(text_of(path, -1, "path"));
    return 0;
  });
}

int32_t moec_app_defaults(int64_t artifact, moec_app_options* options) {
  return guarded<int32_t>([&] {
    const auto found = artifact_of(artifact);
    check_size(options, "options");
    fill_defaults(*found, options);
    return 0;
  });
}

int64_t moec_app_generate(int64_t session, const int32_t* prompt, int64_t count, const moec_app_options* options) {
  return guarded<int64_t>([&] {
    const auto found = session_of(session);
    moec_app_options given = {};
    if (options) {
      check_size(options, "options");
      given = *options;
    } else {
      fill_defaults(found->artifact(), &given);
    }
    GenerationOptions wanted;
    wanted.sampling = sampling_of(given, found->artifact().info().vocab_size);
    wanted.stops = stops_of(given);
    wanted.max_new_tokens = given.max_new_tokens;
    if (given.speculate != 0 && given.speculate != 1) throw Fault("speculate: 0 or 1");
    wanted.speculate = given.speculate == 1;
    if (given.draft != 0 && !wanted.speculate) throw Fault("draft: drafts need speculate = 1");
    wanted.draft = draft_of(given.draft);
    if (given.top_scores < -1 || given.top_scores > kMostTopScores) throw Fault("top_scores: -1 (none) to 100");
    wanted.top_scores = given.top_scores;
    if (given.on_full != MOEC_APP_STOP && given.on_full != MOEC_APP_DROP_OLDEST)
      throw Fault("on_full: MOEC_APP_STOP or MOEC_APP_DROP_OLDEST");
    if (given.keep_first < 0) throw Fault("keep_first: 0 or above");
    wanted.drop_oldest = given.on_full == MOEC_APP_DROP_OLDEST;
    wanted.keep_first = given.keep_first;
    if (given.segments & ~(MOEC_APP_SEGMENTS | MOEC_APP_TOOLS)) throw Fault("segments: unknown flags");
    wanted.kept = found->artifact().markers(given.segments);
    if (given.constraint) {
      check_size(given.constraint, "constraint");
      if (!given.constraint->allowed || !given.constraint->take) throw Fault("constraint: allowed or take is NULL");
      wanted.constraint = *given.constraint;
    }
    return register_object(std::make_shared<Generation>(found, ids_of(prompt, count), std::move(wanted)));
  });
}

int32_t moec_app_next(int64_t generation, const char** piece, int64_t* bytes) {
  return guarded<int32_t>([&] {
    const auto found = generation_of(generation);
    const bool more = found->next();
    if (piece) *piece = found->piece().c_str();
    if (bytes) *bytes = static_cast<int64_t>(found->piece().size());
    return more ? 1 : 0;
  });
}

int32_t moec_app_cancel(int64_t generation) {
  return guarded<int32_t>([&] {
    generation_of(generation)->cancel();
    return 0;
  });
}

int32_t moec_app_run(int64_t generation, moec_app_piece each, void* user) {
  return guarded<int32_t>([&] {
    const auto found = generation_of(generation);
    if (!each) throw Fault("each: NULL");
    while (found->next()) {
      const std::string piece = found->piece();  // a copy: the callback may use the generation
      if (each(user, piece.c_str(), static_cast<int64_t>(piece.size())) == 0) continue;
      found->cancel();
      while (found->next()) {  // to its end, which computes nothing; the callback is called no more
      }
    }
    return 0;
  });
}

int32_t moec_app_stats_of(int64_t generation, moec_app_stats* stats) {
  return guarded<int32_t>([&] {
    const auto found = generation_of(generation);
    check_size(stats, "stats");
    *stats = found->stats();
    stats->size = sizeof *stats;
    return 0;
  });
}

int64_t moec_app_scores(int64_t generation, int64_t first, moec_app_score* scores, int64_t capacity) {
  return guarded<int64_t>([&] { return written(generation_of(generation)->scores(first), scores, capacity); });
}
