// One mutex guards everything but the bytes themselves: readers and workers meet a few times per expert, whose bytes take
// hundreds of microseconds to read. A slot whose bytes are being read, that a worker holds, or that a worker waits for, is
// never given up. Experts that the running call still needs are given up only to a worker that waits.
#include "expert_cache.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <new>
#include <stdexcept>

namespace {

constexpr double kHalfLife = 32.0;  // tokens after which a use counts half (docs/memory-budget.md has the choice)
#ifndef MOEC_MOST_WEIGHT  // the check of the cache makes it small
#define MOEC_MOST_WEIGHT 0x1p512
#endif
constexpr double kMostWeight = MOEC_MOST_WEIGHT;

// Few tokens: calls of more have enough experts of their own to read.
constexpr int64_t kMostAheadTokens = 4;
// Below this share of right expectations nothing is read ahead. A right one saves its read, a wrong one costs as much at most.
constexpr double kLeastWorth = 0.5;
constexpr double kVain = -1.0;  // below any score
constexpr uint32_t kJudgeEvery = 8;
constexpr double kLately = 1.0 / 64;  // weight of the latest expectation in that share

uint64_t rounded_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

// Bytes of a matrix that begins anywhere in an aligned unit, as whole units.
uint64_t room_for(uint64_t bytes, uint64_t alignment) { return rounded_up(bytes, alignment) + alignment; }

size_t count_of(const std::vector<ExpertBlock>& blocks) {
  int64_t count = 0;
  for (const ExpertBlock& block : blocks) count += block.experts;
  return static_cast<size_t>(count);
}

int64_t now_ns() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

}  // namespace

int64_t least_slots(const std::vector<ExpertBlock>& blocks, int32_t threads) {
  int64_t of_a_token = 0, all = 0;
  for (const ExpertBlock& block : blocks) {
    of_a_token += std::min(block.top_k, block.experts);
    all += block.experts;
  }
  return std::min(std::max<int64_t>(of_a_token, threads), all);
}

ExpertUses::ExpertUses(ExpertPolicy policy, size_t experts, size_t blocks)
    : by_count_(policy != ExpertPolicy::kLru),
      growth_(policy == ExpertPolicy::kLrfu ? std::exp2(1.0 / (kHalfLife * static_cast<double>(blocks))) : 1.0),
      score_(experts) {}

bool ExpertUses::step() {
  weight_ *= growth_;
  if (weight_ < kMostWeight) return false;
  weight_ /= kMostWeight;
  for (double& score : score_) score /= kMostWeight;
  return true;
}

uint64_t ExpertCache::slot_bytes_of(const std::vector<ExpertBlock>& blocks, uint64_t alignment) {
  uint64_t most[2] = {0, 0};
  for (const ExpertBlock& block : blocks)
    for (const int half : {0, 1}) most[half] = std::max(most[half], room_for(block.bytes[half], alignment));
  return most[0] + most[1];
}

ExpertCache::ExpertCache(std::unique_ptr<ExpertStorage> storage, std::vector<ExpertBlock> blocks, int64_t slots,
                         ExpertPolicy policy, int readers)
    : storage_(std::move(storage)), blocks_(std::move(blocks)), alignment_(storage_->alignment()),
      uses_(policy, count_of(blocks_), blocks_.size()), most_ahead_(std::max(readers / 2, 1)),
      alone_uses_(policy, count_of(blocks_), blocks_.size()) {
  for (size_t b = 0; b < blocks_.size(); ++b) {
    const ExpertBlock& block = blocks_[b];
    for (const int half : {0, 1}) room_[half] = std::max(room_[half], room_for(block.bytes[half], alignment_));
    first_.push_back(static_cast<int64_t>(experts_.size()));
    most_experts_ = std::max(most_experts_, block.experts);
    for (int64_t e = 0; e < block.experts; ++e) {
      experts_.emplace_back();
      experts_.back().block = static_cast<int32_t>(b);
      experts_.back().number = static_cast<int32_t>(e);
    }
  }
  meters_.resize(blocks_.size() + 1);
  slot_bytes_ = room_[0] + room_[1];
  usable_ = std::min(slots, static_cast<int64_t>(experts_.size()));
  slots_.resize(static_cast<size_t>(usable_));
  jobs_.reserve(2 * slots_.size());
  ahead_jobs_.reserve(2);
  for (std::vector<int64_t>* queue : {&pending_, &ahead_, &expected_}) queue->reserve(static_cast<size_t>(most_experts_));
  mapped_ = slot_bytes_ * static_cast<uint64_t>(usable_);
  void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<uint8_t*>(memory);
#ifdef MADV_HUGEPAGE
  // Shorter page walks for kernels and direct reads. Of other page sizes huge ones are as large as many experts.
  if (sysconf(_SC_PAGESIZE) == 4096) madvise(memory_, mapped_, MADV_HUGEPAGE);
#endif
  source_.user = this;
  source_.begin = [](void* user, const void* w13, int32_t* experts, const int32_t* uses, int64_t count, uint64_t scratch) {
    return static_cast<ExpertCache*>(user)->begin(w13, experts, uses, count, scratch);
  };
  source_.acquire = [](void* user, int32_t expert, int32_t which) {
    return static_cast<ExpertCache*>(user)->acquire(expert, which);
  };
  source_.release = [](void* user, int32_t expert) { static_cast<ExpertCache*>(user)->release(expert); };
  source_.preferred = [](void* user, const void* w13, int64_t experts, const uint8_t** flags) {
    return static_cast<ExpertCache*>(user)->preferred(w13, experts, flags);
  };
  source_.routed = [](void* user, int64_t tokens, int64_t d, const float* router_input) {
    static_cast<ExpertCache*>(user)->routed(tokens, d, router_input);
  };
  source_.end = [](void* user) { static_cast<ExpertCache*>(user)->end(); };
  try {
    for (int i = 0; i < readers; ++i) readers_.emplace_back([this] { read_on(); });
  } catch (const std::exception&) {  // those that began must end: a thread that nobody joins ends the process
    stop();
    throw std::runtime_error("the system does not allow " + std::to_string(readers) + " threads that read experts");
  }
}

ExpertCache::~ExpertCache() { stop(); }

void ExpertCache::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  for (std::thread& reader : readers_) reader.join();
  munmap(memory_, mapped_);
}

int64_t ExpertCache::slots() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return usable_;
}

ExpertCounts ExpertCache::counts() const {
  std::lock_guard<std::mutex> lock(mutex_);
  ExpertCounts all = meters_.back().counts;
  for (size_t b = 0; b < blocks_.size(); ++b) {
    const ExpertCounts& counts = meters_[b].counts;
    all.hits += counts.hits;
    all.ahead += counts.ahead;
    all.ahead_used += counts.ahead_used;
    all.misses += counts.misses;
    all.bytes_read += counts.bytes_read;
    all.stalled_ns += counts.stalled_ns;
    all.reading_ns += counts.reading_ns;
    all.calls += counts.calls;
  }
  return all;
}

std::vector<ExpertCounts> ExpertCache::counts_by_block() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<ExpertCounts> found;
  for (size_t b = 0; b < blocks_.size(); ++b) found.push_back(meters_[b].counts);
  return found;
}

void ExpertCache::Meter::change(int64_t now, int32_t more_reading, int32_t more_waiting) {
  if (waiting > 0) counts.waiting_ns += now - since;
  if (reading > 0) counts.active_ns += now - since;
  if (waiting > 0 && reading > 0) counts.exposed_ns += now - since;
  reading += more_reading;
  waiting += more_waiting;
  since = now;
}

// More, or fewer, that read experts of the block or wait for them.
void ExpertCache::change(int64_t block, int32_t more_reading, int32_t more_waiting) {
  const int64_t now = now_ns();
  meters_[static_cast<size_t>(block)].change(now, more_reading, more_waiting);
  meters_.back().change(now, more_reading, more_waiting);
}

std::string ExpertCache::fault() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return fault_;
}

ExpertCache::Slot* ExpertCache::slot_of(const Expert& expert) {
  return expert.slot < 0 ? nullptr : &slots_[static_cast<size_t>(expert.slot)];
}

uint8_t* ExpertCache::half_of(int64_t slot, int half) const {
  return memory_ + static_cast<uint64_t>(slot) * slot_bytes_ + (half ? room_[0] : 0);
}

uint64_t ExpertCache::place_of(const Expert& expert, int half) const {
  const ExpertBlock& block = blocks_[static_cast<size_t>(expert.block)];
  return block.offset[half] + static_cast<uint64_t>(expert.number) * block.bytes[half];
}

void ExpertCache::forget(Slot& slot) {
  if (slot.expert >= 0) experts_[static_cast<size_t>(slot.expert)].slot = -1;
  slot.expert = -1;
  slot.state[0] = slot.state[1] = State::kEmpty;
}

void ExpertCache::reserve(uint64_t reserved, int64_t least, uint64_t idle) {
  std::lock_guard<std::mutex> call(call_);
  reserved_ = reserved;
  least_ = least;
  idle_ = idle;
}

bool ExpertCache::need(uint64_t bytes) {
  std::lock_guard<std::mutex> call(call_);
  return raise(&needed_, bytes);
}

bool ExpertCache::hold(uint64_t bytes) {
  std::lock_guard<std::mutex> call(call_);
  if (bytes > held_) return raise(&held_, bytes, idle_ - std::min(idle_, needed_ + scratch_));
  held_ = bytes;
  settle();
  return true;
}

// Raises one of the numbers of bytes in use. False, and no expert is given up, if too few slots would be left. No call may run.
// more: bytes that must find room besides.
bool ExpertCache::raise(uint64_t* part, uint64_t bytes, uint64_t more) {
  if (bytes <= *part) return true;
  const uint64_t before = *part;
  *part = bytes;
  if (allowed(more) < least_) {
    *part = before;
    return false;
  }
  settle();
  return true;
}

// Slots that the memory in use leaves, and so many bytes more.
int64_t ExpertCache::allowed(uint64_t more) const {
  const uint64_t used = held_ + needed_ + scratch_ + more, beyond = used > reserved_ ? used - reserved_ : 0;
  const int64_t all = static_cast<int64_t>(slots_.size());
  return all - std::min(all, static_cast<int64_t>((beyond + slot_bytes_ - 1) / slot_bytes_));
}

// Leaves as many slots as that. No call may run.
void ExpertCache::settle() { resize(allowed(0)); }

void ExpertCache::resize(int64_t slots) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto loading = [](const Slot& slot) { return slot.is(State::kLoading); };
  ready_.wait(lock, [&] { return std::none_of(slots_.begin(), slots_.end(), loading); });
  if (slots < usable_) {
    for (int64_t i = slots; i < usable_; ++i) forget(slots_[static_cast<size_t>(i)]);
    // in whole pages, which may be larger than what slots are aligned to
    const uint64_t kept = rounded_up(static_cast<uint64_t>(slots) * slot_bytes_, static_cast<uint64_t>(sysconf(_SC_PAGESIZE)));
    const uint64_t used = static_cast<uint64_t>(usable_) * slot_bytes_;
    if (kept < used) madvise(memory_ + kept, used - kept, MADV_DONTNEED);
  }
  usable_ = slots;
}

// The slot to give up, or -1: an empty one, else one of the experts that are held least, up to `most`.
int64_t ExpertCache::victim(Hold most) const {
  int64_t best = -1;
  Hold best_hold = most;
  for (int64_t i = 0; i < usable_; ++i) {
    const Slot& slot = slots_[static_cast<size_t>(i)];
    if (slot.expert < 0) return i;
    if (slot.pins > 0 || slot.is(State::kLoading)) continue;
    bool sooner = best < 0;
    if (!sooner) {
      const Slot& other = slots_[static_cast<size_t>(best)];
      sooner = slot.score != other.score ? slot.score < other.score : slot.stamp < other.stamp;
    }
    // most slots are neither held nor the next to go: their experts need not be looked at
    if (!sooner && best_hold == kFree) continue;
    const Expert& expert = experts_[static_cast<size_t>(slot.expert)];
    const Hold hold = expert.uses > 0 ? kNeeded : expert.expected ? kExpected : kFree;
    if (expert.waiting > 0 || hold > best_hold || (hold == best_hold && !sooner)) continue;
    best = i;
    best_hold = hold;
  }
  return best;
}

// `slot` becomes that of the expert, whose two reads become jobs.
void ExpertCache::give(int64_t index, int64_t slot, std::vector<Job>* jobs) {
  Slot& given = slots_[static_cast<size_t>(slot)];
  forget(given);
  given.expert = index;
  given.state[0] = given.state[1] = State::kLoading;
  given.stamp = ++clock_;
  given.score = uses_.of(index);
  experts_[static_cast<size_t>(index)].slot = slot;
  jobs->push_back({slot, 0});
  jobs->push_back({slot, 1});
}

// Gives the first pending expert a slot.
bool ExpertCache::claim() {
  if (pending_.empty()) return false;
  const int64_t index = pending_.front();
  const int64_t slot = victim(experts_[static_cast<size_t>(index)].waiting > 0 ? kNeeded : kExpected);
  if (slot < 0) return false;
  pending_.erase(pending_.begin());
  give(index, slot, &jobs_);
  return true;
}

// Gives the first expert that is to be read ahead a slot.
bool ExpertCache::claim_ahead() {
  if (ahead_.empty()) return false;
  const int64_t index = ahead_.front(), slot = victim(kFree);
  if (slot < 0) return false;
  ahead_.erase(ahead_.begin());
  give(index, slot, &ahead_jobs_);
  experts_[static_cast<size_t>(index)].ahead = true;
  return true;
}

// The read to be made next, if there is one.
bool ExpertCache::next(Job* job) {
  if (!jobs_.empty() || claim()) {
    *job = jobs_.front();
    jobs_.erase(jobs_.begin());
    return true;
  }
  // where no slot can be given up, one that is read ahead by halves may be next
  if (ahead_running_ >= most_ahead_ || (ahead_jobs_.empty() && (!pending_.empty() || !claim_ahead()))) return false;
  *job = ahead_jobs_.front();
  ahead_jobs_.erase(ahead_jobs_.begin());
  job->ahead = true;
  if (job->half == 0) ++counts_of(experts_[static_cast<size_t>(slots_[static_cast<size_t>(job->slot)].expert)].block).ahead;
  return true;
}

void ExpertCache::read(const Job& job, std::unique_lock<std::mutex>& lock) {
  Slot& slot = slots_[static_cast<size_t>(job.slot)];
  const Expert& expert = experts_[static_cast<size_t>(slot.expert)];
  const uint64_t bytes = blocks_[static_cast<size_t>(expert.block)].bytes[job.half], begin = place_of(expert, job.half);
  const uint64_t head = begin % alignment_, needed = head + bytes;
  const int32_t block = expert.block;
  change(block, 1, 0);
  lock.unlock();
  const int64_t started = now_ns();
  std::string fault = storage_->read(begin - head, rounded_up(needed, alignment_), needed, half_of(job.slot, job.half));
  const int64_t took = now_ns() - started;
  lock.lock();
  change(block, -1, 0);
  counts_of(block).reading_ns += took;
  counts_of(block).bytes_read += static_cast<int64_t>(bytes);
  slot.state[job.half] = fault.empty() ? State::kReady : State::kFailed;
  if (!fault.empty()) (job.ahead ? ahead_fault_ : fault_) = std::move(fault);
}

void ExpertCache::read_on() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    Job job;
    work_.wait(lock, [&] { return stop_ || next(&job); });
    if (stop_) return;
    if (!jobs_.empty() || !pending_.empty() || !ahead_jobs_.empty() || !ahead_.empty()) work_.notify_one();
    if (job.ahead) ++ahead_running_;
    read(job, lock);
    if (job.ahead) --ahead_running_;
    ready_.notify_all();
    if (!pending_.empty() || !ahead_.empty() || !ahead_jobs_.empty()) work_.notify_one();  // the slot may be given up now
  }
}

void ExpertCache::read_ahead(Predictor predictor) {
  std::lock_guard<std::mutex> call(call_);
  int64_t most = 0;
  for (const ExpertBlock& block : blocks_) most = std::max(most, block.top_k);
  predicted_.resize(static_cast<size_t>(most * kMostAheadTokens));
  predictor_ = std::move(predictor);
}

// The running call's routing is known: what does the next block need?
void ExpertCache::routed(int64_t tokens, int64_t d, const float* router_input) {
  const int64_t block = block_ + 1;
  if (!predictor_ || tokens > kMostAheadTokens || block >= static_cast<int64_t>(blocks_.size())) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto first = experts_.begin() + first_[static_cast<size_t>(block)];
    const auto absent = [](const Expert& expert) { return expert.slot < 0; };
    if (std::none_of(first, first + blocks_[static_cast<size_t>(block)].experts, absent)) return;
    // where nothing is read ahead, expectations are still judged now and then
    if (worth_ < kLeastWorth && ++passed_ % kJudgeEvery != 0) return;
  }
  if (!predictor_(block, tokens, d, router_input, predicted_.data())) return;
  std::unique_lock<std::mutex> lock(mutex_);
  const int64_t count = tokens * blocks_[static_cast<size_t>(block)].top_k;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = first_[static_cast<size_t>(block)] + predicted_[static_cast<size_t>(i)];
    Expert& expert = experts_[static_cast<size_t>(index)];
    if (expert.expected) continue;
    expert.expected = true;
    expert.absent = expert.slot < 0;
    expected_.push_back(index);
    if (expert.absent && worth_ >= kLeastWorth) ahead_.push_back(index);
  }
  const bool reads = !ahead_.empty();
  lock.unlock();
  if (reads) work_.notify_all();
}

// A call of `block` begins, whose uses are set: what was expected of it is judged, and what was in vain is dropped.
void ExpertCache::judge(int64_t block) {
  ahead_.clear();
  // The half that follows one which was read ahead, or is being read: first of all if it is needed, else when nobody waits.
  if (!ahead_jobs_.empty()) {
    const Slot& slot = slots_[static_cast<size_t>(ahead_jobs_.front().slot)];
    if (experts_[static_cast<size_t>(slot.expert)].uses > 0) {
      jobs_.push_back(ahead_jobs_.front());
      ahead_jobs_.clear();
    }
  }
  for (const int64_t index : expected_) {
    Expert& expert = experts_[static_cast<size_t>(index)];
    const bool right = expert.block == block && expert.uses > 0;
    if (expert.absent && expert.block == block) worth_ += (right - worth_) * kLately;
    const bool there = expert.ahead && expert.slot >= 0;
    if (there && right) ++counts_of(block).ahead_used;
    if (there && !right) slot_of(expert)->score = kVain;
    expert.expected = expert.absent = expert.ahead = false;
  }
  expected_.clear();
}

void ExpertCache::prefer_resident(float share) {
  std::lock_guard<std::mutex> call(call_);
  const auto blocks = static_cast<int64_t>(blocks_.size());
  share_ = share;
  remembered_ = slots() / blocks * blocks;
  recent_.reserve(static_cast<size_t>(remembered_ + most_experts_));
  near_.assign(experts_.size(), 0);
}

// Of the block of w13, whose call of one token comes next.
float ExpertCache::preferred(const void* w13, int64_t experts, const uint8_t** flags) {
  if (share_ <= 0.0f) return 0.0f;
  std::lock_guard<std::mutex> call(call_);
  const auto same = [&](const ExpertBlock& block) { return block.address == w13; };
  const auto block = std::find_if(blocks_.begin(), blocks_.end(), same);
  if (block == blocks_.end() || block->experts != experts) return 0.0f;
  alone_ = block - blocks_.begin();
  *flags = near_.data() + first_[static_cast<size_t>(alone_)];
  return share_;
}

void ExpertCache::remember(const int32_t* experts, int64_t count) {
  alone_uses_.step();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = first_[static_cast<size_t>(block_)] + experts[i];
    alone_uses_.count(index);
    if (near_[static_cast<size_t>(index)]) recent_.erase(std::find(recent_.begin(), recent_.end(), index));
    recent_.push_back(index);
    near_[static_cast<size_t>(index)] = 1;
  }
  const auto fewer = [&](int64_t a, int64_t b) { return alone_uses_.of(a) < alone_uses_.of(b); };
  while (static_cast<int64_t>(recent_.size()) > remembered_) {
    const auto last = std::min_element(recent_.begin(), recent_.end() - count, fewer);  // the call's own stay
    near_[static_cast<size_t>(*last)] = 0;
    recent_.erase(last);
  }
}

int32_t ExpertCache::begin(const void* w13, int32_t* experts, const int32_t* uses, int64_t count, uint64_t scratch_bytes) {
  const auto same = [&](const ExpertBlock& block) { return block.address == w13; };
  const auto found = std::find_if(blocks_.begin(), blocks_.end(), same);
  if (found == blocks_.end()) return 0;
  const int64_t block = found - blocks_.begin();
  std::unique_lock<std::mutex> call(call_);
  const bool alone = alone_ == block;
  alone_ = -1;
  const auto valid = [&](int32_t expert) { return expert >= 0 && expert < found->experts; };
  const bool known = std::all_of(experts, experts + count, valid), room = known && raise(&scratch_, scratch_bytes);
  std::unique_lock<std::mutex> lock(mutex_);
  if (!room) {
    fault_ = known ? "the memory budget leaves no room for experts beside the working memory of so many tokens at once"
                   : "damaged: a layer has other experts than when the model was opened";
    return -1;
  }
  fault_.clear();
  block_ = block;
  ++counts_of(block_).calls;
  if (uses_.step()) {
    for (Slot& slot : slots_)
      if (slot.expert >= 0 && slot.score != kVain) slot.score = uses_.of(slot.expert);
  }
  if (alone) remember(experts, count);
  const auto of = [&](int32_t expert) -> Expert& {
    return experts_[static_cast<size_t>(first_[static_cast<size_t>(block_)] + expert)];
  };
  for (int64_t i = 0; i < count; ++i) {
    Expert& expert = of(experts[i]);
    expert.uses = uses[i];
    const int64_t index = &expert - experts_.data();
    uses_.count(index);
    if (Slot* const slot = slot_of(expert); slot && slot->score != kVain) slot->score = uses_.of(index);
  }
  judge(block_);
  for (int64_t i = 0; i < count; ++i) {
    Expert& expert = of(experts[i]);
    Slot* const slot = slot_of(expert);
    if (!slot) continue;
    ready_.wait(lock, [&] { return !slot->is(State::kLoading) || !slot->is(State::kFailed); });
    if (slot->is(State::kFailed)) forget(*slot);  // it is read again
  }
  // experts in memory come first, then those that are being read: computing hides the reads of the others
  const auto there = [&](int32_t expert) { return of(expert).slot >= 0; };
  const auto whole = [&](int32_t expert) { return there(expert) && !slot_of(of(expert))->is(State::kLoading); };
  std::stable_partition(experts, experts + count, there);
  std::stable_partition(experts, experts + count, whole);
  for (int64_t i = 0; i < count; ++i) {
    Expert& expert = of(experts[i]);
    ++(expert.slot >= 0 ? counts_of(block_).hits : counts_of(block_).misses);
    if (expert.slot < 0) pending_.push_back(&expert - experts_.data());
  }
  const bool reads = !pending_.empty() || !jobs_.empty();
  lock.unlock();
  if (reads) work_.notify_all();
  call.release();  // until `end`
  return 1;
}

const void* ExpertCache::acquire(int32_t number, int which) {
  std::unique_lock<std::mutex> lock(mutex_);
  const int64_t index = first_[static_cast<size_t>(block_)] + number;
  Expert& expert = experts_[static_cast<size_t>(index)];
  const auto settled = [&] { return expert.slot >= 0 && slot_of(expert)->state[which] != State::kLoading; };
  if (!settled()) {
    const int64_t started = now_ns();
    change(block_, 0, 1);
    ++expert.waiting;
    while (!settled()) {
      if (expert.slot < 0) {  // it has no slot yet, or lost it to another worker that waited: it is next
        const auto queued = std::find(pending_.begin(), pending_.end(), index);
        if (queued != pending_.end()) pending_.erase(queued);
        pending_.insert(pending_.begin(), index);
      }
      work_.notify_all();
      ready_.wait(lock);
    }
    --expert.waiting;
    change(block_, 0, -1);
    counts_of(block_).stalled_ns += now_ns() - started;
  }
  Slot& slot = *slot_of(expert);
  if (slot.state[which] != State::kReady) {
    if (fault_.empty()) fault_ = ahead_fault_;
    return nullptr;
  }
  ++slot.pins;
  return half_of(expert.slot, which) + place_of(expert, which) % alignment_;
}

void ExpertCache::release(int32_t number) {
  std::unique_lock<std::mutex> lock(mutex_);
  Expert& expert = experts_[static_cast<size_t>(first_[static_cast<size_t>(block_)] + number)];
  Slot& slot = *slot_of(expert);
  slot.stamp = ++clock_;
  if (slot.score == kVain) slot.score = uses_.of(&expert - experts_.data());
  expert.uses = std::max(expert.uses - 1, 0);
  const bool free = --slot.pins == 0 && (!pending_.empty() || !ahead_.empty());
  lock.unlock();
  if (free) work_.notify_one();
}

void ExpertCache::end() {
  bool more = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const ExpertBlock& block = blocks_[static_cast<size_t>(block_)];
    for (int64_t e = 0; e < block.experts; ++e) experts_[static_cast<size_t>(first_[static_cast<size_t>(block_)] + e)].uses = 0;
    pending_.clear();
    block_ = -1;
    more = !ahead_.empty();
  }
  if (more) work_.notify_one();  // the call's own experts may be given up now
  call_.unlock();
}
