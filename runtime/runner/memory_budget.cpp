// How many experts a budget of memory holds. Everything else that the process has, or may come to have while the model runs,
// is taken off first: it is counted as if it were all resident.
#include <algorithm>
#include <cinttypes>

#include "memory.h"
#include "moe_config.h"
#include "model.h"

using namespace moec_runtime;

namespace {

constexpr int64_t kSlack = 4 << 20;         // heap of the runtime and stacks of the readers
constexpr int64_t kLeastScratch = 2 << 20;  // working memory of one token's operators and activations, at least
constexpr int kMostReaders = 64;
constexpr int64_t kMostWidth = int64_t{1} << 31;  // of a layer, and of experts and selections, so that products fit
constexpr uint64_t kLeastExpert = 48;              // bytes of half an expert: one unit of the coarsest codes

constexpr char kNone[] = "a memory budget needs routed experts, and the model has none that can be read one by one";

constexpr char kShared[] =
    "a memory budget needs experts of its own in every layer, and two layers of the model share one half of theirs";

// The blocks of a program; "" or why there are none, or one of them is not as the kernels read it.
std::string blocks_of(const ProgramFile& file, std::vector<ExpertBlock>* blocks) {
  for (const MoeCall& call : file.facts().moe_calls) {
    if (call.config.size() <= MOEC_CONFIG_TOP_K || call.config[MOEC_CONFIG_EXPERTS] < 1) return kNone;
    if (call.config[MOEC_CONFIG_TOP_K] < 1 || call.config[MOEC_CONFIG_TOP_K] > call.config[MOEC_CONFIG_EXPERTS])
      return "damaged: a layer selects more experts than it has, or none";
    const int64_t width = call.config[MOEC_CONFIG_D_MODEL];
    if (width < 1 || width >= kMostWidth || call.config[MOEC_CONFIG_TOP_K] >= kMostWidth / width)
      return "damaged: a layer's width is out of range";
    ExpertBlock block;
    block.experts = call.config[MOEC_CONFIG_EXPERTS];
    block.top_k = call.config[MOEC_CONFIG_TOP_K];
    for (const int half : {0, 1}) {
      const auto experts = static_cast<uint64_t>(block.experts);
      if (call.bytes[half] == 0 || call.bytes[half] % experts != 0) return kNone;
      block.offset[half] = call.offset[half];
      block.bytes[half] = call.bytes[half] / experts;
      if (block.bytes[half] < kLeastExpert) return "damaged: a layer has more experts than its weights hold";
    }
    block.address = file.mapped().data() + call.offset[0];
    const auto named = [&](const ExpertBlock& other) { return other.address == block.address; };
    const auto same = std::find_if(blocks->begin(), blocks->end(), named);
    // equal constants are stored once: layers may share one half of their experts, and a block is named by the first
    const auto second = [&](const ExpertBlock& other) { return other.offset[1] == block.offset[1]; };
    if (std::find_if(blocks->begin(), blocks->end(), second) != same) return kShared;
    if (same == blocks->end()) {
      blocks->push_back(block);
      continue;
    }
    if (same->experts != block.experts || same->bytes[0] != block.bytes[0] || same->bytes[1] != block.bytes[1]) return kShared;
    same->top_k = std::max(same->top_k, block.top_k);
  }
  return blocks->empty() ? kNone : "";
}

// The router of a block, as constants of the program.
struct Router {
  std::vector<int64_t> config;  // empty: it is none of constants
  moec_in parts[MoeCall::kRouterParts] = {};

  bool select(int64_t tokens, int64_t d, const float* router_input, int32_t* experts) const {
    if (config.empty() || config[MOEC_CONFIG_D_MODEL] != d) return false;
    const auto bytes = [&](int64_t columns) { return static_cast<uint64_t>(tokens * columns) * 4; };
    return moec_select_experts(tokens, config.data(), config.size(), {router_input, bytes(d)}, parts[MoeCall::kWeight],
                               parts[MoeCall::kBias], parts[MoeCall::kSelectionBias],
                               {experts, bytes(config[MOEC_CONFIG_TOP_K])}) == MOEC_OK;
  }
};

std::vector<Router> routers_of(const ProgramFile& file, const std::vector<ExpertBlock>& blocks) {
  std::vector<Router> routers(blocks.size());
  for (const MoeCall& call : file.facts().moe_calls) {
    const void* address = file.mapped().data() + call.offset[0];
    const auto same = [&](const ExpertBlock& block) { return block.address == address; };
    const auto block = std::find_if(blocks.begin(), blocks.end(), same);
    Router& router = routers[static_cast<size_t>(block - blocks.begin())];
    // a block that is called with several values of top_k would need as many rooms for its predictions
    if (!call.router_known || call.config[MOEC_CONFIG_TOP_K] != block->top_k) continue;
    router = {};
    router.config = call.config;
    for (int part = 0; part < MoeCall::kRouterParts; ++part)
      if (call.router_bytes[part]) router.parts[part] = {file.mapped().data() + call.router_offset[part], call.router_bytes[part]};
  }
  return routers;
}

// Working memory of a block for one token, by an estimate that is on the safe side: activations of all its experts as they are
// and rounded, and of every worker a unit's outputs and 16 rounded rows (run_narrow and run_wide of moe_run.cpp).
int64_t token_scratch(const MoeCall& call, int64_t threads) {
  const auto of = [&](size_t field) { return std::clamp<int64_t>(call.config[field], 0, kMostWidth / 64); };
  const int64_t d = of(MOEC_CONFIG_D_MODEL), k = of(MOEC_CONFIG_TOP_K), width = of(MOEC_CONFIG_EXPERT_WIDTH);
  const int64_t shared = of(MOEC_CONFIG_SHARED_WIDTH), widest = std::max({d, width, shared});
  const int64_t together = 8 * (k * (d + width) + shared + 2 * d) + 128 * of(MOEC_CONFIG_EXPERTS);
  return together + threads * (4 * k * (d + 16) + 128 * widest + 64 * of(MOEC_CONFIG_EXPERTS) + 4096);
}

int64_t megabytes(int64_t bytes) { return (bytes + 999'999) / 1'000'000; }

}  // namespace

// Tokens of a call whose activations and kernels' working memory take at most `bytes`, by an estimate that is on the safe side.
// Few tokens may be taken anyway: as many as the kernels compute in one sweep over their experts, if `slots` hold these.
int64_t moec_model::most_tokens(int64_t bytes, int64_t slots) {
  constexpr int64_t kTile = 5 << 20;  // of a worker (moe_run.cpp)
  int64_t row = 0, few = info.max_tokens;
  for (const MoeCall& call : file->facts().moe_calls) {
    row = std::max(row, (call.config[MOEC_CONFIG_TOP_K] + 4) * call.config[MOEC_CONFIG_D_MODEL] * static_cast<int64_t>(sizeof(float)));
    few = std::min(few, std::max<int64_t>(std::min(8 * info.threads, slots) / std::max<int64_t>(call.config[MOEC_CONFIG_TOP_K], 1), 1));
  }
  row += static_cast<int64_t>(activation_bytes(planned_tokens, false)) / planned_tokens + 1;
  return std::clamp((bytes - kTile * info.threads) / row, few, info.max_tokens);
}

int64_t moec_model::session_bytes() const {
  int64_t caches = 0;
  for (size_t i = 1; i < arenas.size(); ++i) caches += static_cast<int64_t>(arenas[i].size());
  return caches;
}

// Bytes of so many open sessions and of moec_model_forward's, beyond the caches that the budget subtracted, and of what was
// loaded since.
int64_t moec_model::held_bytes(int64_t open) const {
  return std::max<int64_t>(open + (own_used ? 1 : 0) - 1, 0) * session_bytes() + late_bytes;
}

// Room for this much beside the caches of all sessions, until count_session(0).
bool moec_model::hold_beside(int64_t bytes) {
  return !experts || bytes <= 0 || experts->hold(static_cast<uint64_t>(held_bytes(sessions) + bytes));
}

// moec_model_forward has caches of its own, from its first call on.
bool moec_model::use_own() {
  if (own_used) return true;
  own_used = true;
  if (count_session(0)) return true;
  own_used = false;
  return false;
}

// XNNPACK packs the weights of each method anew: the second takes as much as the first.
bool moec_model::count_method() {
  if (!experts || delegate_bytes == 0) return true;
  late_bytes += delegate_bytes;
  if (experts->hold(static_cast<uint64_t>(held_bytes(sessions)))) return true;
  late_bytes -= delegate_bytes;
  return fail(text("the memory budget of %" PRId64 " MB has no room for the weights that XNNPACK packs for the logits of all tokens, "
                   "%" PRId64 " MB", memory_budget / 1'000'000, megabytes(delegate_bytes)));
}

// One more session, or one less. The caches of the first were subtracted when the budget was set; those of others take slots
// from the expert cache.
bool moec_model::count_session(int64_t change) {
  const int64_t now = sessions + change;
  if (experts && !experts->hold(static_cast<uint64_t>(held_bytes(now))))
    return fail(text("the memory budget of %" PRId64 " MB has no room for the caches of another session, %" PRId64 " MB",
                     memory_budget / 1'000'000, megabytes(session_bytes())));
  sessions = now;
  return true;
}

bool moec_model::limit_memory(int64_t bytes, ExpertPolicy policy, int readers) {
  if (experts) return fail("the memory budget is already set");
  std::vector<ExpertBlock> blocks;
  std::string fault = blocks_of(*file, &blocks);
  if (!fault.empty()) return fail(fault);
  int64_t expert_bytes = 0, count = 0;
  for (const ExpertBlock& block : blocks) {
    expert_bytes += static_cast<int64_t>(block.bytes[0] + block.bytes[1]) * block.experts;
    count += block.experts;
  }
  // another model of the same file has a mapping of its own
  const int64_t besides = resident_besides(path, file->mapped().data(), file->mapped().size());
  if (besides < 0) return fail("this system does not report how much memory a process uses");
  int64_t fixed = besides + static_cast<int64_t>(file->facts().constant_bytes) - expert_bytes + kSlack;
  // of the first arena, which holds activations, a call uses what its tokens need: `forward` announces it
  for (size_t i = 1; i < arenas.size(); ++i)
    fixed += static_cast<int64_t>(arenas[i].size()) - std::max<int64_t>(resident_bytes(arenas[i].data(), arenas[i].size()), 0);

  std::unique_ptr<ExpertStorage> storage = open_expert_file(path, file->mapped().descriptor(), &fault);
  if (!storage) return fail(fault);
  const auto slot_bytes = static_cast<int64_t>(ExpertCache::slot_bytes_of(blocks, storage->alignment()));
  const int64_t least = least_slots(blocks, static_cast<int32_t>(info.threads));
  int64_t scratch = 0;
  for (const MoeCall& call : file->facts().moe_calls) scratch = std::max(scratch, token_scratch(call, info.threads));
  scratch = std::max(scratch + static_cast<int64_t>(activation_bytes(1, false)), kLeastScratch);
  const int64_t least_budget = fixed + scratch + least * slot_bytes;
  if (bytes < least_budget)
    return fail(text("a memory budget of %" PRId64 " MB is less than %" PRId64 " MB: %" PRId64
                     " for all but the routed experts, and the %" PRId64 " experts of one token%s",
                     bytes / 1'000'000, megabytes(least_budget), megabytes(fixed + scratch), least,
                     least == info.threads ? ", or one for each thread" : ""));
  const int64_t slots = std::min((bytes - fixed - scratch) / slot_bytes, count);
  std::vector<Router> routers = routers_of(*file, blocks);
  auto cache = std::make_unique<ExpertCache>(std::move(storage), std::move(blocks), slots, policy, readers);
  cache->read_ahead([routers = std::move(routers)](int64_t block, int64_t tokens, int64_t d, const float* x, int32_t* out) {
    return routers[static_cast<size_t>(block)].select(tokens, d, x, out);
  });
  // where all experts fit, what is left is for calls and other sessions
  cache->reserve(static_cast<uint64_t>(bytes - fixed - slots * slot_bytes), least, static_cast<uint64_t>(scratch));
  experts = std::move(cache);
  memory_budget = bytes;
  // a call of many tokens takes its memory from the experts when it runs, at most half of what is spare
  const int64_t most = info.max_tokens;
  info.max_tokens = most_tokens((bytes - least_budget) / 2, least);
  if (count_session(0)) {  // those that are open already
    // the system may have the file in huge pages, and would map experts with the weights beside them
    for (const MoeCall& call : file->facts().moe_calls)
      for (const int half : {0, 1}) file->mapped().forbid_huge_pages(call.offset[half], call.offset[half] + call.bytes[half]);
    return true;
  }
  experts.reset();
  memory_budget = 0;
  info.max_tokens = most;
  return false;
}

int32_t moec_model_limit_memory(moec_model* model, int64_t bytes, int32_t eviction, int32_t readers) {
  if (!model) return -1;
  std::lock_guard<std::mutex> lock(model->busy);
  model->error.clear();
  const bool ok = guarded(model, [&] {
    if (!model->module) return model->fail("not open");
    if (eviction < MOEC_EVICT_LRU || eviction > MOEC_EVICT_LRFU) return model->fail("there is no such eviction policy");
    if (readers < 1 || readers > kMostReaders) return model->fail(text("%d readers: 1 .. %d", readers, kMostReaders));
    return model->limit_memory(bytes, static_cast<ExpertPolicy>(eviction), readers);
  });
  return ok ? 0 : -1;
}

int32_t moec_model_prefer_resident(moec_model* model, float share) {
  if (!model) return -1;
  std::lock_guard<std::mutex> lock(model->busy);
  model->error.clear();
  const bool ok = guarded(model, [&] {
    if (!(share > 0.0f && share <= 1.0f))
      return model->fail(text("a share of %g: above 0, at most 1", static_cast<double>(share)));
    if (!model->experts) return model->fail("cache-aware selection needs a memory budget");
    model->experts->prefer_resident(share);
    model->info.exact = 0;  // a token alone may select other experts than among others
    return true;
  });
  return ok ? 0 : -1;
}

int32_t moec_model_read_nothing_ahead(moec_model* model) {
  if (!model) return -1;
  std::lock_guard<std::mutex> lock(model->busy);
  model->error.clear();
  const bool ok = guarded(model, [&] {
    if (!model->experts) return model->fail("there is no memory budget");
    model->experts->read_ahead(nullptr);
    return true;
  });
  return ok ? 0 : -1;
}

int32_t moec_model_expert_stats(moec_model* model, moec_expert_stats* stats) {
  if (!model || !stats) return -1;
  *stats = {};
  std::lock_guard<std::mutex> lock(model->busy);
  if (!model->experts) return 0;
  const ExpertCounts counts = model->experts->counts();
  stats->budget = model->memory_budget;
  stats->experts = model->experts->experts();
  stats->slots = model->experts->slots();
  stats->slot_bytes = static_cast<int64_t>(model->experts->slot_bytes());
  stats->hits = counts.hits;
  stats->misses = counts.misses;
  stats->bytes_read = counts.bytes_read;
  stats->stalled_ns = counts.stalled_ns;
  stats->reading_ns = counts.reading_ns;
  stats->preferred = model->experts->preferred_slots();
  stats->waiting_ns = counts.waiting_ns;
  stats->active_ns = counts.active_ns;
  stats->exposed_ns = counts.exposed_ns;
  stats->ahead = counts.ahead;
  stats->ahead_used = counts.ahead_used;
  return 0;
}

int64_t moec_model_expert_layer_stats(moec_model* model, moec_expert_layer_stats* layers, int64_t capacity) {
  if (!model || capacity < 0 || (capacity > 0 && !layers)) return -1;
  std::lock_guard<std::mutex> lock(model->busy);
  if (!model->experts) return 0;
  const auto copy = [&] {
    const std::vector<ExpertCounts> counts = model->experts->counts_by_block();
    for (size_t i = 0; i < counts.size() && static_cast<int64_t>(i) < capacity; ++i) {
      const ExpertCounts& c = counts[i];
      layers[i] = {c.hits,       c.misses,     c.bytes_read, c.stalled_ns,
                   c.reading_ns, c.waiting_ns, c.active_ns,  c.exposed_ns, c.ahead, c.ahead_used};
    }
    capacity = static_cast<int64_t>(counts.size());
    return true;
  };
  return guarded(model, copy) ? capacity : -1;
}
