// The C API of moec.h: ids, checked arguments, and faults as values.
#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "../include/moec.h"
#include "generation.h"
#include "objects.h"

namespace {

constexpr int64_t kMostText = int64_t{64} << 20;  // bytes of a text
constexpr int64_t kMostMessages = 10'000, kMostBiases = 100'000, kMostCalls = 1000;

thread_local std::string last_error;

class Registry {
 public:
  int64_t add(std::shared_ptr<Object> object) {
    const std::lock_guard<std::mutex> lock(mutex_);
    objects_.emplace(++last_, std::move(object));
    return last_;
  }
  std::shared_ptr<Object> find(int64_t id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(id);
    return found == objects_.end() ? nullptr : found->second;
  }
  bool remove(int64_t id) {
    std::shared_ptr<Object> object;  // declared first, so that it is destroyed without the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(id);
    if (found == objects_.end()) return false;
    object = std::move(found->second);
    objects_.erase(found);
    return true;
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<Object>> objects_;
  int64_t last_ = 0;
};

Registry& registry() {
  static auto* made = new Registry;  // never destroyed: threads may still call while the process ends
  return *made;
}

// One line, whatever a file or its name had in it; at most 500 bytes, of whole characters.
void keep_error(const char* what) {
  Characters characters;  // for names of files that are not UTF-8: the reason stands behind them
  std::string text = characters.push(what);
  text += characters.finish();
  if (text.size() > 500) text.resize(500);
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 32 || c == 127) c = ' ';
  text.resize(valid_utf8(text));
  last_error = text.empty() ? "failed" : text;
}

template <typename T, typename Body>
T guarded(Body body) {
  try {
    last_error.clear();
    return body();
  } catch (const std::bad_alloc&) {
    keep_error("out of memory");
  } catch (const std::exception& e) {
    keep_error(e.what());
  } catch (...) {
    keep_error("failed");
  }
  return static_cast<T>(-1);
}

template <typename T>
std::shared_ptr<T> named(int64_t id, const char* kind) {
  const auto found = std::dynamic_pointer_cast<T>(registry().find(id));
  if (!found) throw Fault(std::to_string(id) + " is no open " + kind);
  return found;
}

std::shared_ptr<OpenArtifact> artifact_of(int64_t id) { return named<OpenArtifact>(id, "artifact"); }
std::shared_ptr<OpenSession> session_of(int64_t id) { return named<OpenSession>(id, "session"); }
std::shared_ptr<OpenSplitter> splitter_of(int64_t id) { return named<OpenSplitter>(id, "splitter"); }
std::shared_ptr<Generation> generation_of(int64_t id) { return named<Generation>(id, "generation"); }

template <typename T>
void check_size(const T* given, const char* name) {
  if (!given) throw Fault(std::string(name) + ": NULL");
  if (given->size != sizeof(T))
    throw Fault(std::string(name) + ".size is " + std::to_string(given->size) + ", not " + std::to_string(sizeof(T)) +
                ": set it, and compile with the header of this library");
}

std::string text_of(const char* text, int64_t bytes, const char* name) {
  if (!text) throw Fault(std::string(name) + ": NULL");
  const size_t size = bytes < 0 ? strnlen(text, static_cast<size_t>(kMostText) + 1) : static_cast<size_t>(bytes);
  if (size > static_cast<size_t>(kMostText)) throw Fault(std::string(name) + ": more than 64 MB");
  return std::string(text, size);
}

template <typename T, typename Found>
int64_t written(const Found& found, T* out, int64_t capacity) {
  if (capacity < 0 || (capacity > 0 && !out)) throw Fault("no buffer, or a negative capacity");
  const auto count = std::min(static_cast<int64_t>(found.size()), capacity);
  if (count > 0) std::copy(found.begin(), found.begin() + count, out);
  return static_cast<int64_t>(found.size());
}

std::vector<int32_t> ids_of(const int32_t* ids, int64_t count) {
  if (count < 0 || (count > 0 && !ids)) throw Fault("no ids, or a negative count");
  return std::vector<int32_t>(ids, ids + count);
}

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

}  // namespace

const char* moec_app_error(void) { return last_error.c_str(); }

int64_t moec_app_open(const char* folder, const moec_app_open_options* options) {
  return guarded<int64_t>([&] {
    moec_app_open_options given = {sizeof(moec_app_open_options), 0, 0};
    if (options) {
      check_size(options, "options");
      given = *options;
    }
    if (given.threads < 0 || given.memory_bytes < 0) throw Fault("options: a negative number");
    return registry().add(std::make_shared<OpenArtifact>(text_of(folder, -1, "folder"), given.threads, given.memory_bytes));
  });
}

int32_t moec_app_close(int64_t id) {
  return guarded<int32_t>([&] {
    if (!registry().remove(id)) throw Fault(std::to_string(id) + " is not open");
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

int64_t moec_app_tokenize(int64_t artifact, const char* text, int64_t bytes, int32_t flags, int32_t* ids, int64_t capacity) {
  return guarded<int64_t>([&] {
    const auto found = artifact_of(artifact);
    if (flags & ~(MOEC_APP_PLAIN | MOEC_APP_AS_TEXT)) throw Fault("flags: unknown ones");
    return written(found->tokenize(text_of(text, bytes, "text"), flags), ids, capacity);
  });
}

int64_t moec_app_detokenize(int64_t artifact, const int32_t* ids, int64_t count, int32_t flags, char* text, int64_t capacity) {
  return guarded<int64_t>([&] {
    const auto found = artifact_of(artifact);
    if (flags & ~MOEC_APP_SPECIAL) throw Fault("flags: unknown ones");
    return written(found->detokenize(ids_of(ids, count), flags & MOEC_APP_SPECIAL), text, capacity);
  });
}

int64_t moec_app_chat(int64_t artifact, const moec_app_message* messages, int64_t count, int32_t* ids, int64_t capacity) {
  return guarded<int64_t>([&] {
    const auto found = artifact_of(artifact);
    if (count < 1 || count > kMostMessages || !messages) throw Fault("messages: NULL, or not 1 to 10000 of them");
    std::vector<std::string> texts;
    for (int64_t i = 0; i < count; ++i) {
      const std::string name = "messages[" + std::to_string(i) + "]";
      texts.push_back(text_of(messages[i].role, -1, (name + ".role").c_str()));
      texts.push_back(text_of(messages[i].content, -1, (name + ".content").c_str()));
      if (valid_utf8(texts.back()) != texts.back().size()) throw Fault(name + ".content: is not UTF-8");
    }
    std::vector<ChatMessage> given;
    for (size_t i = 0; i < texts.size(); i += 2) given.push_back({texts[i], texts[i + 1]});
    return written(found->chat(given), ids, capacity);
  });
}

int64_t moec_app_chat_with_tools(int64_t artifact, const char* tools, const moec_app_turn* turns, int64_t count, int32_t* ids,
                                 int64_t capacity) {
  return guarded<int64_t>([&] {
    const auto found = artifact_of(artifact);
    if (count < 1 || count > kMostMessages || !turns) throw Fault("turns: NULL, or not 1 to 10000 of them");
    const std::string definitions = tools ? text_of(tools, -1, "tools") : "";
    if (tools && definitions.empty()) throw Fault("tools: is not JSON, at byte 0");
    std::deque<std::string> texts;  // where they lie does not change
    const auto kept = [&](const char* text, const std::string& name) -> std::string_view {
      texts.push_back(text_of(text, -1, name.c_str()));
      if (valid_utf8(texts.back()) != texts.back().size()) throw Fault(name + ": is not UTF-8");
      return texts.back();
    };
    std::vector<ChatTurn> given;
    for (int64_t i = 0; i < count; ++i) {
      const moec_app_turn& turn = turns[i];
      const std::string name = "turns[" + std::to_string(i) + "]";
      check_size(&turn, name.c_str());
      if (turn.call_count < 0 || turn.call_count > kMostCalls || (turn.call_count > 0 && !turn.calls))
        throw Fault(name + ".calls: NULL, or not 0 to 1000 of them");
      given.push_back({kept(turn.role, name + ".role"), "", {}});
      if (turn.content || turn.call_count == 0) given.back().content = kept(turn.content, name + ".content");
      for (int64_t j = 0; j < turn.call_count; ++j) {
        const std::string call = name + ".calls[" + std::to_string(j) + "]";
        const char* arguments = turn.calls[j].arguments;
        given.back().calls.push_back({kept(turn.calls[j].name, call + ".name"), kept(arguments ? arguments : "", call + ".arguments")});
      }
    }
    return written(found->chat(definitions, given), ids, capacity);
  });
}

int64_t moec_app_session(int64_t artifact) {
  return guarded<int64_t>([&] {
    const auto found = artifact_of(artifact);
    return registry().add(std::make_shared<OpenSession>(found, moec_session_open(found->model())));
  });
}

int64_t moec_app_fork(int64_t session) {
  return guarded<int64_t>([&] {
    const auto found = session_of(session);
    const std::lock_guard<std::mutex> lock(found->busy);
    return registry().add(found->fork());
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
    if (given.segments & ~(MOEC_APP_SEGMENTS | MOEC_APP_TOOLS)) throw Fault("segments: unknown flags");
    wanted.kept = found->artifact().markers(given.segments);
    if (given.constraint) {
      check_size(given.constraint, "constraint");
      if (!given.constraint->allowed || !given.constraint->take) throw Fault("constraint: allowed or take is NULL");
      wanted.constraint = *given.constraint;
    }
    return registry().add(std::make_shared<Generation>(found, ids_of(prompt, count), std::move(wanted)));
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

int64_t moec_app_splitter(int64_t artifact, const int32_t* prompt, int64_t count, int32_t flags) {
  return guarded<int64_t>([&] {
    const auto found = artifact_of(artifact);
    if (flags & ~(MOEC_APP_SEGMENTS | MOEC_APP_TOOLS)) throw Fault("flags: unknown ones");
    return registry().add(std::make_shared<OpenSplitter>(*found, ids_of(prompt, count), flags));
  });
}

int32_t moec_app_split(int64_t splitter, const char* piece, int64_t bytes) {
  return guarded<int32_t>([&] {
    const auto found = splitter_of(splitter);
    if (!piece) {
      found->finish();
      return 0;
    }
    const std::string text = text_of(piece, bytes, "piece");
    if (valid_utf8(text) != text.size()) throw Fault("piece: is not UTF-8");
    found->push(text);
    return 0;
  });
}

int32_t moec_app_next_segment(int64_t splitter, moec_app_segment* segment) {
  return guarded<int32_t>([&] {
    const auto found = splitter_of(splitter);
    check_size(segment, "segment");
    const Segment* next = found->next();
    *segment = {};
    segment->size = sizeof *segment;
    if (!next) return 0;
    segment->kind = next->kind;
    segment->text = next->text.c_str();
    segment->bytes = static_cast<int64_t>(next->text.size());
    segment->name = next->call.name.c_str();
    segment->arguments = next->call.arguments.c_str();
    return 1;
  });
}
