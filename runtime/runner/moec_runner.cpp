// moec_runner MODEL.pte: runs a compiled model without Python or torch, and says how fast and how large it was.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "bench.h"
#include "json_text.h"
#include "moec_runtime.h"
#include "profile.h"

namespace {

constexpr int kUserError = 2;

const char kUsage[] =
    "usage: moec_runner MODEL.pte (--tokens FILE | --prompt-length N) [options]\n"
    "  --tokens FILE      token ids of the prompt, separated by spaces, commas or newlines; - reads standard input\n"
    "  --prompt-length N  a prompt of N ids spread over the vocabulary instead\n"
    "  --decode N         generate N tokens, greedily (default 0)\n"
    "  --context N        start decoding at position N; the cache is filled up to it first, untimed\n"
    "  --chunk N          most tokens of one prefill call (default: what the program takes)\n"
    "  --repeats N        repeat prefill and decode, report medians (default 1)\n"
    "  --stop             end at a stop token\n"
    "  --threads N        threads (default: one per core, without the slow ones of a phone)\n"
    "  --seed N           of --prompt-length (default 1)\n"
    "  --json             one JSON object instead of text\n"
    "  --profile          memory, rates and expert use along one pass over the prompt, as JSON\n"
    "  --points N,N,...   lengths of context to measure at (default: the whole prompt)\n"
    "  --follow           decode ids of --tokens, not the model's own: the last N; with --profile those behind each point\n"
    "  --warm N           further passes with every page in memory, for rates alone (default 0)\n"
    "  --memory-mb N      read routed experts as they are needed, so that the process stays within N million bytes\n"
    "  --eviction NAME    which expert is given up then: lrfu (default), lfu or lru\n"
    "  --readers N        threads that read then (default 2)\n"
    "  --no-read-ahead    read no experts then before their layer is routed\n"
    "  --cache-aware X    prefer experts in memory then, by X (0 .. 1) of the range of a token's selection values: results\n"
    "                     depend on what was decoded before\n"
    "  --drop-cache       first let the system forget the file, so that only what is used is read\n"
    "MOEC_ISA in the environment chooses the instruction set of the kernels (default: the best of this machine).\n"
    "example: moec_runner model.pte --prompt-length 512 --decode 64 --repeats 3\n";

struct Options {
  std::string model, tokens;
  int64_t prompt_length = 0, threads = 0, seed = 1, memory_mb = 0, readers = 2;
  int32_t eviction = MOEC_EVICT_LRFU;
  double cache_aware = 0.0;
  bool json = false, profile = false, drop_cache = false, no_read_ahead = false, help = false;
  BenchOptions bench;
  ProfileOptions points;
};

bool fail(const std::string& message) {
  std::fprintf(stderr, "error: %s\n", message.c_str());
  return false;
}

bool number(const char* name, const char* text, int64_t low, int64_t* value) {
  char* end = nullptr;
  errno = 0;
  const long long parsed = text ? std::strtoll(text, &end, 10) : 0;
  if (!text || end == text || *end != '\0' || errno != 0 || parsed < low || parsed > INT32_MAX)
    return fail(std::string(name) + ": not a number from " + std::to_string(low) + " up: " + (text ? text : "nothing"));
  *value = parsed;
  return true;
}

bool numbers_of(const char* name, const char* text, std::vector<int64_t>* values) {
  std::string rest = text ? text : "";
  for (;;) {
    const size_t comma = rest.find(',');
    int64_t value = 0;
    if (!number(name, rest.substr(0, comma).c_str(), 1, &value)) return false;
    values->push_back(value);
    if (comma == std::string::npos) return true;
    rest.erase(0, comma + 1);
  }
}

bool parse(int argc, char** argv, Options* o) {
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const char* next = i + 1 < argc ? argv[i + 1] : nullptr;
    const struct {
      const char* name;
      int64_t low;
      int64_t* value;
    } numbers[] = {{"--prompt-length", 1, &o->prompt_length}, {"--decode", 0, &o->bench.decode},
                   {"--context", 0, &o->bench.context},       {"--chunk", 1, &o->bench.chunk},
                   {"--repeats", 1, &o->bench.repeats},       {"--threads", 1, &o->threads},
                   {"--seed", 0, &o->seed},                   {"--warm", 0, &o->points.warm},
                   {"--memory-mb", 1, &o->memory_mb},         {"--readers", 1, &o->readers}};
    bool known = false;
    for (const auto& option : numbers) {
      if (name != option.name) continue;
      if (!number(option.name, next, option.low, option.value)) return false;
      known = true;
      ++i;
    }
    if (known) continue;
    if (name == "--help" || name == "-h") {
      o->help = true;
      return true;
    }
    if (name == "--json") {
      o->json = true;
    } else if (name == "--stop") {
      o->bench.stop = true;
    } else if (name == "--profile") {
      o->profile = true;
    } else if (name == "--follow") {
      o->points.follow = o->bench.follow = true;
    } else if (name == "--drop-cache") {
      o->drop_cache = true;
    } else if (name == "--no-read-ahead") {
      o->no_read_ahead = true;
    } else if (name == "--points") {
      if (!numbers_of("--points", next, &o->points.points)) return false;
      ++i;
    } else if (name == "--eviction") {
      const std::string policy = next ? next : "nothing";
      if (policy != "lru" && policy != "lfu" && policy != "lrfu") return fail("--eviction: not lru, lfu or lrfu: " + policy);
      o->eviction = policy == "lru" ? MOEC_EVICT_LRU : policy == "lfu" ? MOEC_EVICT_LFU : MOEC_EVICT_LRFU;
      ++i;
    } else if (name == "--cache-aware") {
      char* end = nullptr;
      o->cache_aware = next ? std::strtod(next, &end) : 0.0;
      if (!next || end == next || *end != '\0' || !(o->cache_aware > 0.0 && o->cache_aware <= 1.0))
        return fail(std::string("--cache-aware: not a number above 0, at most 1: ") + (next ? next : "nothing"));
      ++i;
    } else if (name == "--tokens") {
      if (!next) return fail("--tokens: a file is missing");
      o->tokens = next;
      ++i;
    } else if (name.rfind("--", 0) == 0 || !o->model.empty()) {
      return fail("unknown argument " + name);
    } else {
      o->model = name;
    }
  }
  if (o->model.empty()) return fail("no model given");
  if (o->bench.follow && !o->profile && (o->tokens.empty() || o->bench.context > 0))
    return fail("--follow needs --tokens, and no --context");
  if (o->cache_aware > 0.0 && o->memory_mb == 0) return fail("--cache-aware needs --memory-mb");
  if (o->tokens.empty() == (o->prompt_length == 0)) return fail("give one of --tokens and --prompt-length");
  return true;
}

bool read_tokens(const std::string& file, std::vector<int64_t>* ids) {
  std::string text;
  const auto append = [&](FILE* from) {
    char buffer[4096];
    for (size_t got; (got = std::fread(buffer, 1, sizeof buffer, from)) > 0;) text.append(buffer, got);
  };
  if (file == "-") {
    append(stdin);
  } else {
    const std::unique_ptr<FILE, int (*)(FILE*)> stream(std::fopen(file.c_str(), "rb"), std::fclose);
    if (!stream) return fail(file + ": " + std::strerror(errno));
    append(stream.get());
    if (std::ferror(stream.get())) return fail(file + ": " + std::strerror(errno));
  }
  const auto space = [](char c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; };
  for (char& c : text)
    if (c == ',' || c == '[' || c == ']') c = ' ';
  const char *p = text.c_str(), *const last = p + text.size();
  for (;;) {
    while (p < last && space(*p)) ++p;
    if (p == last) return true;
    char* end = nullptr;
    errno = 0;
    const long long id = std::strtoll(p, &end, 10);
    if (end == p || errno != 0 || (end < last && !space(*end)))
      return fail(file + ": not a token id: " + std::string(p, std::min<size_t>(20, last - p)));
    ids->push_back(id);
    p = end;
  }
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double rate(double tokens, double time) { return time > 0 ? tokens / time : 0.0; }

std::string experts_json(const char* key, const moec_expert_stats& e) {
  char text[700];
  std::snprintf(text, sizeof text,
                ", \"%s\": {\"budget_mb\": %.1f, \"experts\": %lld, \"slots\": %lld, \"slot_bytes\": %lld, \"hits\": %lld, "
                "\"misses\": %lld, \"bytes_read\": %lld, \"stalled_s\": %.6f, \"reading_s\": %.6f, \"preferred\": %lld, "
                "\"ahead\": %lld, \"ahead_used\": %lld, \"waiting_s\": %.6f, "
                "\"active_s\": %.6f, \"exposed_s\": %.6f}",
                key, static_cast<double>(e.budget) / 1e6, static_cast<long long>(e.experts), static_cast<long long>(e.slots),
                static_cast<long long>(e.slot_bytes), static_cast<long long>(e.hits), static_cast<long long>(e.misses),
                static_cast<long long>(e.bytes_read), static_cast<double>(e.stalled_ns) / 1e9,
                static_cast<double>(e.reading_ns) / 1e9, static_cast<long long>(e.preferred), static_cast<long long>(e.ahead),
                static_cast<long long>(e.ahead_used), static_cast<double>(e.waiting_ns) / 1e9,
                static_cast<double>(e.active_ns) / 1e9, static_cast<double>(e.exposed_ns) / 1e9);
  return e.budget ? text : "";
}

void report(const Options& o, const moec_model_info& info, double load_s, const BenchResult& r, const moec_expert_stats& experts) {
  const double prefill_s = median(r.prefill_s);
  const double token_s = median(r.decode_token_s);
  const size_t prompt = o.bench.prompt.size() - static_cast<size_t>(o.bench.follow ? o.bench.decode : 0);
  const double decoded = r.decode_s.empty() ? 0.0 : static_cast<double>(r.decode_token_s.size()) / static_cast<double>(r.decode_s.size());
  const double decode_s = median(r.decode_s);
  const double mb = 1e6;
  const double peak = static_cast<double>(moec_peak_rss()) / mb, anonymous = static_cast<double>(moec_anonymous_rss()) / mb;
  if (o.json) {
    std::printf(
        "{\"model\": %s, \"file_bytes\": %lld, \"isa\": \"%s\", \"threads\": %lld, \"load_s\": %.4f, \"prefill_tokens\": %zu, "
        "\"prefill_s\": %s, \"prefill_tokens_per_s\": %.3f, \"decode_start\": %lld, \"decode_tokens\": %lld, \"decode_s\": %s, "
        "\"decode_tokens_per_s\": %.3f, \"decode_median_token_s\": %.6g, \"repeats\": %lld, \"peak_rss_mb\": %.1f, "
        "\"anonymous_mb\": %.1f, \"generated\": %s%s}\n",
        quoted(o.model).c_str(), static_cast<long long>(info.file_bytes), moec_model_isa(),
        static_cast<long long>(info.threads), load_s, prompt, list(r.prefill_s).c_str(), rate(static_cast<double>(prompt), prefill_s),
        static_cast<long long>(r.decode_start), static_cast<long long>(decoded), list(r.decode_s).c_str(),
        rate(decoded, decode_s), token_s, static_cast<long long>(o.bench.repeats), peak, anonymous, list(r.generated).c_str(),
        (experts_json("experts", experts) + (decoded > 0 ? experts_json("decode_experts", r.experts) : "")).c_str());
    return;
  }
  for (const int64_t id : r.generated) std::printf("%lld ", static_cast<long long>(id));
  if (!r.generated.empty()) std::printf("\n");
  std::printf("load %.3f s; prefill %zu tokens, %.1f tokens/s", load_s, prompt, rate(static_cast<double>(prompt), prefill_s));
  if (decoded > 0)
    std::printf("; decode %.0f tokens from position %lld, %.1f tokens/s", decoded, static_cast<long long>(r.decode_start),
                rate(decoded, decode_s));
  std::printf("; %lld threads, %s; peak RSS %.0f MB (%.0f MB anonymous)\n", static_cast<long long>(info.threads),
              moec_model_isa(), peak, anonymous);
  if (experts.budget)
    std::printf("experts: %lld of %lld in memory; %lld hits, %lld misses, %.1f MB read, %.3f s stalled of %.3f s reading\n",
                static_cast<long long>(experts.slots), static_cast<long long>(experts.experts), static_cast<long long>(experts.hits),
                static_cast<long long>(experts.misses), static_cast<double>(experts.bytes_read) / mb,
                static_cast<double>(experts.stalled_ns) / 1e9, static_cast<double>(experts.reading_ns) / 1e9);
}

// 0 if the output was written: a full disk is a failure.
int written() {
  if (std::fflush(stdout) == 0 && !std::ferror(stdout)) return 0;
  fail(std::string("the output could not be written: ") + std::strerror(errno));
  return 1;
}

int profile(const Options& o, LoadReport load, moec_model* model) {
  ProfileOptions options = o.points;
  options.prompt = o.bench.prompt;
  options.decode = o.bench.decode;
  moec_model_memory(model, &load.loaded);
  ProfileResult result;
  const std::string fault = run_profile(model, options, &result);
  if (!fault.empty()) {
    fail(fault);
    return kUserError;
  }
  std::printf("%s\n", profile_json(o.model, model, load, options, result).c_str());
  return written();
}

int run(int argc, char** argv) {
  Options o;
  if (!parse(argc, argv, &o)) {
    std::fputs(kUsage, stderr);
    return kUserError;
  }
  if (o.help) {
    std::fputs(kUsage, stdout);
    return written();
  }
  if (!o.tokens.empty() && !read_tokens(o.tokens, &o.bench.prompt)) return kUserError;
  LoadReport load;
  moec_model_memory(nullptr, &load.before);
  if (o.drop_cache) load.dropped = moec_forget_cached(o.model.c_str()) == 0;
  load.cached_bytes = o.profile ? moec_cached_bytes(o.model.c_str()) : 0;
  const double begin = seconds();
  const std::unique_ptr<moec_model, void (*)(moec_model*)> model(
      moec_model_open(o.model.c_str(), static_cast<int32_t>(o.threads)), moec_model_close);
  load.seconds = seconds() - begin;
  const std::string error = moec_model_error(model.get());
  if (!error.empty()) {
    fail(o.model + ": " + error);
    return kUserError;
  }
  if (o.memory_mb > 0 &&
      moec_model_limit_memory(model.get(), o.memory_mb * 1'000'000, o.eviction, static_cast<int32_t>(o.readers)) != 0) {
    fail(o.model + ": " + moec_model_error(model.get()));
    return kUserError;
  }
  if (o.cache_aware > 0.0 && moec_model_prefer_resident(model.get(), static_cast<float>(o.cache_aware)) != 0) {
    fail(o.model + ": " + moec_model_error(model.get()));
    return kUserError;
  }
  if (o.memory_mb > 0 && o.no_read_ahead) moec_model_read_nothing_ahead(model.get());
  moec_model_info info = {};
  moec_model_get_info(model.get(), &info);
  if (o.prompt_length > info.context) {
    fail("a prompt of " + std::to_string(o.prompt_length) + " tokens exceeds the model's context of " + std::to_string(info.context));
    return kUserError;
  }
  if (o.prompt_length > 0) o.bench.prompt = spread_tokens(o.prompt_length, info.vocab_size, static_cast<uint64_t>(o.seed));
  if (o.profile) return profile(o, load, model.get());
  BenchResult result;
  const std::string fault = run_bench(model.get(), o.bench, &result);
  if (!fault.empty()) {
    fail(fault);
    return kUserError;
  }
  moec_expert_stats experts = {};
  moec_model_expert_stats(model.get(), &experts);
  report(o, info, load.seconds, result, experts);
  return written();
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& e) {
    fail(e.what());
    return kUserError;
  }
}
