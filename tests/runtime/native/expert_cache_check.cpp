// Checks the cache of experts on a made-up storage: random blocks, sizes, traces of routing, policies, workers, readers that
// are late, out of order, come short or fail. An argument says how many rounds.
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <list>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "checking.h"
//
#define MOEC_MOST_WEIGHT 1.0625  // scores are rescaled every three tokens
#include "../../../runtime/runner/expert_cache.cpp"  // of the runtime library, which needs ExecuTorch

namespace {

using namespace checking;

constexpr uint64_t kUnit = 256;

uint8_t byte_at(uint64_t offset) { return static_cast<uint8_t>((offset * 2654435761u) >> 13); }

class MadeUp final : public ExpertStorage {
 public:
  explicit MadeUp(uint64_t size) : size_(size) {}
  uint64_t alignment() const override { return kUnit; }
  std::string read(uint64_t offset, uint64_t size, uint64_t needed, void* out) override {
    if (offset % kUnit || size % kUnit || reinterpret_cast<uintptr_t>(out) % kUnit) aligned = false;
    if (needed > size || offset + needed > size_) inside = false;
    ++reads;
    const int64_t wait = late > 0 ? static_cast<int64_t>(offset * 7919 % static_cast<uint64_t>(late)) : 0;
    if (wait > 0) std::this_thread::sleep_for(std::chrono::microseconds(wait));
    if (fails > 0 && --fails >= 0) return "a made-up fault";
    auto* to = static_cast<uint8_t*>(out);
    for (uint64_t i = 0; i < needed; ++i) to[i] = byte_at(offset + i);
    return "";
  }

  std::atomic<bool> aligned{true}, inside{true};
  std::atomic<int> fails{0}, reads{0};
  int64_t late = 0;  // microseconds at most

 private:
  uint64_t size_;
};

struct World {
  std::vector<ExpertBlock> blocks;
  uint64_t bytes = 0;

  explicit World(std::mt19937& random) {
    const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    const int count = pick(1, 5);
    for (int b = 0; b < count; ++b) {
      ExpertBlock block;
      block.experts = pick(1, 24);
      block.top_k = pick(1, static_cast<int>(std::min<int64_t>(block.experts, 5)));
      block.address = reinterpret_cast<const void*>(uintptr_t{0x1000} + static_cast<uintptr_t>(b) * 16);
      for (const int half : {0, 1}) {
        bytes += static_cast<uint64_t>(pick(0, 700));
        block.offset[half] = bytes;
        block.bytes[half] = static_cast<uint64_t>(pick(1, 1500));
        bytes += block.bytes[half] * static_cast<uint64_t>(block.experts);
      }
      blocks.push_back(block);
    }
  }
};

// One call of a block as the kernels make it: units of work are drawn in the order that `begin` gave.
bool call(const ExpertCache& cache, const ExpertBlock& block, std::vector<int32_t> experts, int workers, int units, bool* right,
          uint64_t scratch = 0) {
  const moec_expert_source* source = cache.source();
  const std::vector<int32_t> uses(experts.size(), 2 * units), before = experts;
  if (source->begin(source->user, block.address, experts.data(), uses.data(), static_cast<int64_t>(experts.size()), scratch) != 1)
    return false;
  const float input = 0.0f;
  source->routed(source->user, 1, 1, &input);
  *right &= std::is_permutation(before.begin(), before.end(), experts.begin(), experts.end());
  std::atomic<size_t> next{0};
  std::atomic<bool> given{true}, same{true};
  const auto work = [&] {
    for (size_t unit; (unit = next++) < experts.size() * static_cast<size_t>(units);) {
      const int32_t expert = experts[unit / static_cast<size_t>(units)];
      int held = 0;
      for (const int half : {0, 1}) {
        const auto* data = static_cast<const uint8_t*>(source->acquire(source->user, expert, half));
        if (!data) {
          given = false;
          continue;
        }
        ++held;
        const uint64_t offset = block.offset[half] + block.bytes[half] * static_cast<uint64_t>(expert);
        for (uint64_t i = 0; i < block.bytes[half]; ++i) same = same && data[i] == byte_at(offset + i);
      }
      for (; held > 0; --held) source->release(source->user, expert);
    }
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < workers; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  source->end(source->user);
  *right &= same;
  return given;
}

std::vector<int32_t> chosen(std::mt19937& random, const ExpertBlock& block, int64_t count) {
  std::vector<int32_t> all;
  for (int32_t e = 0; e < block.experts; ++e) all.push_back(e);
  std::shuffle(all.begin(), all.end(), random);
  all.resize(static_cast<size_t>(std::min(count, block.experts)));
  std::sort(all.begin(), all.end());
  return all;
}

// What uses of an expert are worth to a policy, computed from the times of all of them.
class Worth {
 public:
  Worth(ExpertPolicy policy, double blocks) : policy_(policy), blocks_(blocks) {}

  void call(size_t block, const std::vector<int32_t>& experts) {
    ++now_;
    for (const int32_t e : experts) times_[{block, e}].push_back(now_);
  }

  double of(const std::pair<size_t, int32_t>& expert) {
    if (policy_ == ExpertPolicy::kLru) return 0;
    double sum = 0;
    for (const double time : times_[expert]) sum += policy_ == ExpertPolicy::kLfu ? 1 : std::exp2((time - now_) / (32 * blocks_));
    return sum;
  }

 private:
  ExpertPolicy policy_;
  double blocks_, now_ = 0;
  std::map<std::pair<size_t, int32_t>, std::vector<double>> times_;
};

// What a cache of the policy would have missed; a call's own experts stay.
class Model {
 public:
  Model(int64_t slots, ExpertPolicy policy, double blocks) : slots_(static_cast<size_t>(slots)), worth_(policy, blocks) {}
  int64_t misses = 0;

  void call(size_t block, const std::vector<int32_t>& experts) {
    worth_.call(block, experts);
    std::vector<std::pair<size_t, int32_t>> own, absent;
    for (const int32_t e : experts) (held({block, e}) ? own : absent).push_back({block, e});
    misses += static_cast<int64_t>(absent.size());
    for (const auto& expert : absent) {
      if (used_.size() >= slots_) {
        const auto other = [&](const auto& old) {
          return std::find(own.begin(), own.end(), old) == own.end() && std::find(absent.begin(), absent.end(), old) == absent.end();
        };
        auto least = used_.end();  // of equal ones the oldest
        for (auto it = used_.begin(); it != used_.end(); ++it)
          if (other(*it) && (least == used_.end() || worth_.of(*it) < worth_.of(*least) - 1e-9)) least = it;
        if (least != used_.end()) used_.erase(least);
      }
      used_.push_back(expert);
    }
    own.insert(own.end(), absent.begin(), absent.end());  // the order of the work: those that were there come first
    for (const auto& expert : own) used_.remove(expert);
    used_.insert(used_.end(), own.begin(), own.end());
  }

  bool held(std::pair<size_t, int32_t> expert) const { return std::find(used_.begin(), used_.end(), expert) != used_.end(); }

 private:
  size_t slots_;
  Worth worth_;
  std::list<std::pair<size_t, int32_t>> used_;  // the oldest first
};

// The experts that calls of one token leave in a cache of the policy, at most as many as are remembered; each call's in ascending
// order.
class Recent {
 public:
  Recent(int64_t most, ExpertPolicy policy, double blocks) : most_(static_cast<size_t>(most)), worth_(policy, blocks) {}

  void call(size_t block, const std::vector<int32_t>& experts) {
    worth_.call(block, experts);
    for (const int32_t e : experts) {
      used_.remove({block, e});
      used_.push_back({block, e});
    }
    while (used_.size() > most_) {
      auto least = used_.begin();
      for (auto it = used_.begin(); it != used_.end(); ++it) {
        const bool own = it->first == block && std::find(experts.begin(), experts.end(), it->second) != experts.end();
        if (!own && worth_.of(*it) < worth_.of(*least) - 1e-9) least = it;
      }
      used_.erase(least);
    }
  }

  // What the cache says of a block's experts, when a call of one token of it comes next.
  bool same(const ExpertCache& cache, size_t number, const ExpertBlock& block, float share) const {
    const uint8_t* flags = nullptr;
    if (cache.source()->preferred(cache.source()->user, block.address, block.experts, &flags) != share) return false;
    for (int32_t e = 0; e < block.experts; ++e) {
      const std::pair<size_t, int32_t> expert{number, e};
      if ((std::find(used_.begin(), used_.end(), expert) != used_.end()) != (flags[e] == 1)) return false;
    }
    return true;
  }

 private:
  size_t most_;
  Worth worth_;
  std::list<std::pair<size_t, int32_t>> used_;  // the oldest first
};

// The counts of blocks make up those of all, and no more time passed by the clock than `elapsed`.
void counts_agree(const ExpertCache& cache, const std::vector<ExpertBlock>& blocks, bool steady, int64_t elapsed, const std::string& where) {
  const ExpertCounts all = cache.counts();
  const std::vector<ExpertCounts> each = cache.counts_by_block();
  ExpertCounts sum;
  expect(each.size() == blocks.size(), where + ": counts of other blocks");
  for (size_t b = 0; b < each.size(); ++b) {
    const ExpertCounts& c = each[b];
    sum.hits += c.hits;
    sum.misses += c.misses;
    sum.bytes_read += c.bytes_read;
    sum.stalled_ns += c.stalled_ns;
    sum.reading_ns += c.reading_ns;
    sum.calls += c.calls;
    sum.waiting_ns += c.waiting_ns;
    sum.active_ns += c.active_ns;
    sum.exposed_ns += c.exposed_ns;
    expect(c.exposed_ns <= c.waiting_ns && c.exposed_ns <= c.active_ns, where + ": more time exposed than waited or read");
    expect(c.waiting_ns <= c.stalled_ns, where + ": workers waited longer by the clock than all of them together");
    if (steady)
      expect(c.bytes_read == c.misses * static_cast<int64_t>(blocks[b].bytes[0] + blocks[b].bytes[1]), where + ": bytes of other experts");
  }
  expect(sum.hits == all.hits && sum.misses == all.misses && sum.bytes_read == all.bytes_read && sum.calls == all.calls &&
             sum.stalled_ns == all.stalled_ns && sum.reading_ns == all.reading_ns, where + ": blocks do not add up");
  // of several blocks at once the clock shows less than their sum
  expect(all.waiting_ns <= sum.waiting_ns && all.active_ns <= sum.active_ns && all.exposed_ns >= sum.exposed_ns &&
             all.exposed_ns <= all.active_ns && all.exposed_ns <= all.waiting_ns, where + ": time by the clock does not add up");
  expect(all.waiting_ns <= elapsed && all.active_ns <= elapsed, where + ": more time than passed");
  expect((all.bytes_read > 0) == (all.active_ns > 0), where + ": bytes without time");
}

// By counts, an expert that the running call is done with may be the one to go for another of the same call, if its read was as
// fast. The model keeps them all: a few misses may differ, and what is compared is their number over many rounds.
int64_t compared = 0, strayed = 0;

void round_of(uint32_t seed) {
  const int64_t started = now_ns();
  std::mt19937 random(seed);
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  const World world(random);
  const bool steady = seed % 4 == 0;  // tokens alone, one worker, nothing that goes wrong: compared with the model
  const int workers = steady ? 1 : pick(1, 4), units = pick(1, 3);
  const int64_t least = least_slots(world.blocks, workers);
  const int64_t slots = least + pick(0, 20);
  auto owned = std::make_unique<MadeUp>(world.bytes);
  MadeUp* storage = owned.get();
  storage->late = pick(0, 2) ? 0 : 300;
  const auto policy = static_cast<ExpertPolicy>(pick(0, 2));
  ExpertCache cache(std::move(owned), world.blocks, slots, policy, pick(1, 4));
  const int idle = pick(0, 2);  // slots that a holder leaves for a call
  cache.reserve(0, least, static_cast<uint64_t>(idle) * cache.slot_bytes());
  const std::string where = "seed " + std::to_string(seed);
  Model model(std::min(slots, cache.experts()), policy, static_cast<double>(world.blocks.size()));
  const bool aware = pick(0, 1) == 1;  // calls of one token say so first
  if (aware) cache.prefer_resident(0.25f);
  Recent recent(cache.preferred_slots(), policy, static_cast<double>(world.blocks.size()));
  // what the next block is expected to need: what it will, or anything
  std::vector<std::vector<int32_t>> coming(world.blocks.size());
  std::mt19937 guesses(seed);
  const bool foresight = !steady && pick(0, 1);
  const int misled = pick(0, 3);  // of three expectations
  if (foresight) {
    cache.read_ahead([&](int64_t b, int64_t tokens, int64_t d, const float*, int32_t* experts) {
      const ExpertBlock& block = world.blocks[static_cast<size_t>(b)];
      std::vector<int32_t> found = coming[static_cast<size_t>(b)];
      if (static_cast<int64_t>(found.size()) != block.top_k || std::uniform_int_distribution<int>(1, 3)(guesses) <= misled)
        found = chosen(guesses, block, block.top_k);
      std::copy(found.begin(), found.end(), experts);
      return tokens == 1 && d == 1;
    });
  }
  expect(cache.preferred_slots() % static_cast<int64_t>(world.blocks.size()) == 0, where + ": not whole layers");
  int64_t asked = 0;
  bool right = true;
  for (int token = 0; token < 12; ++token) {
    const bool prompt = !steady && pick(0, 5) == 0;  // many experts at once, more than there are slots perhaps
    for (size_t b = 0; b < world.blocks.size(); ++b)
      coming[b] = chosen(random, world.blocks[b], prompt ? pick(1, 24) : world.blocks[b].top_k);
    for (size_t b = 0; b < world.blocks.size(); ++b) {
      const ExpertBlock& block = world.blocks[b];
      const std::vector<int32_t>& experts = coming[b];
      asked += static_cast<int64_t>(experts.size());
      const int reads = storage->reads;
      if (aware && !prompt) {
        expect(recent.same(cache, b, block, 0.25f), where + ": other experts are preferred");
        recent.call(b, experts);
      }
      expect(call(cache, block, experts, workers, units, &right), where + ": an expert was not given");
      // an expert of several units may be given up between them only where there is hardly a slot for each worker
      if (cache.slots() > workers && !foresight)
        expect(storage->reads - reads <= 2 * static_cast<int>(experts.size()), where + ": an expert was read twice in a call");
      if (steady) model.call(b, experts);
    }
    if (!steady && pick(0, 6) == 0) {
      storage->fails = pick(1, 3);
      const ExpertBlock& block = world.blocks[static_cast<size_t>(pick(0, static_cast<int>(world.blocks.size()) - 1))];
      const int64_t misses = cache.counts().misses;
      const bool given = call(cache, block, chosen(random, block, block.top_k), workers, units, &right);
      const bool read = cache.counts().misses > misses;
      expect(given || read, where + ": a fault without a read");
      expect(given || cache.fault() == "a made-up fault", where + ": the fault is not said");
      storage->fails = 0;
      asked += std::min(block.top_k, block.experts);
    }
    if (!steady && pick(0, 9) == 0) {
      const int64_t slots_before = cache.slots();
      const bool room = cache.need(static_cast<uint64_t>(pick(1, 9)) * cache.slot_bytes());
      expect(room || cache.slots() == slots_before, where + ": a need that was refused takes slots");
      expect(cache.slots() >= least, where + ": fewer slots than the least");
    }
    if (!steady && pick(0, 9) == 0) {
      const ExpertBlock& block = world.blocks[0];
      const int64_t slots_before = cache.slots();
      expect(!call(cache, block, {0}, workers, units, &right, (uint64_t{1} << 30) * cache.slot_bytes()), where + ": too few slots and no refusal");
      expect(cache.slots() == slots_before, where + ": a call that was refused takes slots");
    }
  }
  const int64_t now = cache.slots();
  if (now >= least) {
    const bool room = cache.hold((pick(0, 1) ? 1 : 1000) * cache.slot_bytes());
    expect(room ? cache.slots() < now || now == 0 : cache.slots() == now, where + ": another holder, other slots");
    const bool call_too = !room || cache.need(static_cast<uint64_t>(idle) * cache.slot_bytes());
    expect(call_too, where + ": another holder leaves no room for a call");
    expect(cache.hold(0) && cache.slots() >= (room ? now - idle : now) && cache.slots() <= now, where + ": slots do not come back");
  }
  const ExpertCounts counts = cache.counts();
  expect(right, where + ": other bytes than were stored");
  expect(storage->aligned && storage->inside, where + ": a read that is not aligned, or beyond the end");
  expect(counts.hits + counts.misses == asked, where + ": hits and misses are not what was asked for");
  expect(counts.ahead_used <= counts.ahead && (foresight || counts.ahead == 0), where + ": reads ahead are not counted right");
  const std::string misses = std::to_string(counts.misses) + " misses, the model has " + std::to_string(model.misses);
  if (steady && policy == ExpertPolicy::kLru) expect(counts.misses == model.misses, where + ": " + misses);
  if (steady && policy != ExpertPolicy::kLru) {
    ++compared;
    strayed += std::abs(counts.misses - model.misses);
  }
  cache.hold(0);  // no read is under way after it
  counts_agree(cache, world.blocks, steady, now_ns() - started, where);
  int32_t one = 0;
  const moec_expert_source* source = cache.source();
  expect(source->begin(source->user, &one, &one, &one, 1, 0) == 0, where + ": an unknown block is taken");
  const uint8_t* flags = nullptr;
  expect(source->preferred(source->user, &one, 1, &flags) == 0.0f, where + ": an unknown block is preferred");
  // a program may call a layer with more experts than the one that was seen when it was opened
  const ExpertBlock& block = world.blocks.back();
  for (int32_t outside : {static_cast<int32_t>(block.experts), INT32_MAX, -1}) {
    one = 1;
    expect(source->begin(source->user, block.address, &outside, &one, 1, 0) == -1, where + ": an expert that is not there is taken");
    expect(!cache.fault().empty(), where + ": an expert that is not there, without a word");
  }
  expect(source->preferred(source->user, block.address, block.experts + 1, &flags) == 0.0f, where + ": flags of too few experts");
}

// The system gives fewer threads than are asked for: an exception, and those that began end. Not on aarch64, where these checks
// run in an emulator, which keeps no limit of address space.
void threads_that_the_system_refuses() {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(__aarch64__) && \
    defined(__linux__)  // sanitizers reserve address space
  std::mt19937 random(1);
  const World world(random);
  struct rlimit limit = {};
  long pages = 0;
  FILE* const statm = fopen("/proc/self/statm", "r");
  expect(statm && fscanf(statm, "%ld", &pages) == 1 && getrlimit(RLIMIT_AS, &limit) == 0, "no limits to set");
  if (statm) fclose(statm);
  const struct rlimit little = {static_cast<rlim_t>(pages) * 4096 + (rlim_t{64} << 20), limit.rlim_max};
  setrlimit(RLIMIT_AS, &little);
  bool refused = false;
  try {
    const ExpertCache cache(std::make_unique<MadeUp>(world.bytes), world.blocks, 1000, ExpertPolicy::kLru, 64);
  } catch (const std::exception&) {
    refused = true;
  }
  setrlimit(RLIMIT_AS, &limit);
  expect(refused, "64 threads in an address space for a few");
#endif
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 20;
  for (int i = 0; i < rounds; ++i) round_of(static_cast<uint32_t>(i));
  for (int i = 0; i < 2 * rounds; ++i) round_of(static_cast<uint32_t>(4 * i));  // steady ones
  expect(compared < 8 || strayed * 4 <= compared, std::to_string(strayed) + " misses differ from the model's in " +
                                                      std::to_string(compared) + " rounds of policies that count");
  threads_that_the_system_refuses();
  printf("expert cache: %d rounds, %d failures\n", rounds, failures);
  return failures == 0 ? 0 : 1;
}
