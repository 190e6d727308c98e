// Routed experts that are not all in memory: a cache of whole experts, filled by explicit reads while the kernels compute.
//
// A block is one mixture-of-experts layer. A slot holds one expert: its gate/up and its down matrix, which become ready one
// after the other. The slot to be given up is chosen first among experts that the running call needs no more.
//
// Reading ahead: while a layer of few tokens is computed, and attention after it, the storage would stand still once the
// layer's own experts are there. The experts that the next layer is expected to select are read then (`read_ahead`). Reads
// that somebody waits for come first, and nothing is read ahead while expectations are mostly wrong.
#ifndef MOEC_EXPERT_CACHE_H_
#define MOEC_EXPERT_CACHE_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "moec_kernel.h"

// Where experts are read from.
class ExpertStorage {
 public:
  virtual ~ExpertStorage() = default;
  // Reads are made of, and into, multiples of this.
  virtual uint64_t alignment() const = 0;
  // Bytes [offset, offset + size) to `out`, all three aligned; only the first `needed` must exist. From any thread. "" or
  // what is wrong.
  virtual std::string read(uint64_t offset, uint64_t size, uint64_t needed, void* out) = 0;
};

// A file, past the page cache where its file system allows that. nullptr and the reason if it is not the file that
// `descriptor` has open.
std::unique_ptr<ExpertStorage> open_expert_file(const std::string& path, int descriptor, std::string* fault);

struct ExpertBlock {
  int64_t experts = 0, top_k = 0;
  const void* address = nullptr;   // of w13, which names the block
  uint64_t offset[2] = {0, 0};     // of w13 and w2 in the storage
  uint64_t bytes[2] = {0, 0};      // of one expert
};

// Which expert is given up: the one used longest ago; least often; least often of late (LRFU, Lee et al. 2001), where a use counts
// half after 32 tokens. Uses of experts that are not in memory count, too; of equal ones the one used longest ago is given up.
enum class ExpertPolicy : int32_t { kLru = 0, kLfu = 1, kLrfu = 2 };

// How often each expert was used, as a policy counts it.
class ExpertUses {
 public:
  ExpertUses(ExpertPolicy policy, size_t experts, size_t blocks);
  // A call of a block begins; every expert of it is then counted. True if all scores were rescaled.
  bool step();
  void count(int64_t expert) { score_[static_cast<size_t>(expert)] += weight_; }
  double of(int64_t expert) const { return by_count_ ? score_[static_cast<size_t>(expert)] : 0.0; }

 private:
  bool by_count_;
  double weight_ = 1.0, growth_;  // later uses weigh more instead of earlier ones less
  std::vector<double> score_;
};

struct ExpertCounts {
  int64_t hits = 0, misses = 0;     // experts that a call found, in memory or being read ahead, and that it had to ask for
  int64_t ahead = 0, ahead_used = 0;  // experts read ahead, and those of them that the next call of their layer needed
  int64_t bytes_read = 0;
  int64_t stalled_ns = 0;           // workers' time spent waiting for reads
  int64_t reading_ns = 0;           // readers' time spent reading
  int64_t calls = 0;                // of blocks
  // time by the clock, however many did it at once
  int64_t waiting_ns = 0;           // at least one worker waited
  int64_t active_ns = 0;            // at least one reader read
  int64_t exposed_ns = 0;           // both: reading that nothing hid from at least one worker
};

class ExpertCache {
 public:
  // `slots`: at most so many experts are held. At least `least_slots(blocks, threads)`.
  ExpertCache(std::unique_ptr<ExpertStorage> storage, std::vector<ExpertBlock> blocks, int64_t slots, ExpertPolicy policy,
              int readers);
  ~ExpertCache();
  ExpertCache(const ExpertCache&) = delete;
  ExpertCache& operator=(const ExpertCache&) = delete;

  // Cache-aware selection (Skliar et al. 2024, arXiv 2412.00099): from here on the router of a call of one token prefers the
  // experts that are in memory by `share` of the range of its selection values (moec_kernel.h). In memory are, for this, those
  // that a cache of as many slots as there are now, in whole layers, and of the same policy would hold had it seen nothing but
  // calls of one token: what is preferred then depends on these calls alone, not on how reads and threads fall out or how
  // prompts were cut. One thread at a time may compute. To be called before the first call.
  void prefer_resident(float share);
  int64_t preferred_slots() const { return remembered_; }

  // The experts that `block` will select, as far as what the router of the block before it was given can tell: writes the
  // top_k numbers of each of `tokens` rows of `router_input` [tokens, d]. False: cannot tell.
  using Predictor = std::function<bool(int64_t block, int64_t tokens, int64_t d, const float* router_input, int32_t* experts)>;
  // From here on the cache reads ahead. To be called before the first call.
  void read_ahead(Predictor predictor);

  const moec_expert_source* source() const { return &source_; }
  int64_t slots() const;
  // `reserved` bytes besides the slots are part of the budget already. Memory in use beyond them takes slots away; with fewer
  // than `least` slots left a call is refused. `hold` leaves `idle` bytes for a call, too.
  void reserve(uint64_t reserved, int64_t least, uint64_t idle = 0);
  // Bytes that a call needs besides the kernels' scratch, which `begin` announces; the largest number so far counts. False, and
  // nothing changed, if it leaves less than `least` slots.
  bool need(uint64_t bytes);
  // Bytes that others hold now. False, and nothing changed, if they leave less than `least` slots.
  bool hold(uint64_t bytes);
  uint64_t slot_bytes() const { return slot_bytes_; }
  static uint64_t slot_bytes_of(const std::vector<ExpertBlock>& blocks, uint64_t alignment);
  int64_t experts() const { return static_cast<int64_t>(experts_.size()); }
  // Of all blocks; the time by the clock is that of all together. And of each block, in their order.
  ExpertCounts counts() const;
  std::vector<ExpertCounts> counts_by_block() const;
  // Why the last expert could not be given; "" if none failed since.
  std::string fault() const;

 private:
  enum class State : uint8_t { kEmpty, kLoading, kReady, kFailed };
  struct Slot {
    int64_t expert = -1;  // of experts_; -1: none
    State state[2] = {State::kEmpty, State::kEmpty};
    int32_t pins = 0;     // of workers
    uint64_t stamp = 0;   // of the last use
    double score = 0.0;   // of its expert, by the policy; below all others if it was read ahead in vain
    bool is(State wanted) const { return state[0] == wanted || state[1] == wanted; }
  };
  struct Expert {
    int64_t slot = -1;
    int32_t block = 0, number = 0;
    int32_t uses = 0;     // acquires that the running call has left
    int32_t waiting = 0;  // workers that wait for it
    bool expected = false;  // by the last prediction
    bool absent = false;    // it was not in memory then
    bool ahead = false;     // and its slot is from then
  };
  struct Job {
    int64_t slot;
    int half;
    bool ahead = false;  // nobody waited for it when it began
  };
  // Counts, and who reads and waits now.
  struct Meter {
    ExpertCounts counts;
    int32_t reading = 0, waiting = 0;
    int64_t since = 0;
    void change(int64_t now, int32_t more_reading, int32_t more_waiting);
  };

  float preferred(const void* w13, int64_t experts, const uint8_t** flags);
  void remember(const int32_t* experts, int64_t count);
  int32_t begin(const void* w13, int32_t* experts, const int32_t* uses, int64_t count, uint64_t scratch_bytes);
  const void* acquire(int32_t expert, int which);
  void release(int32_t expert);
  void end();

  void change(int64_t block, int32_t more_reading, int32_t more_waiting);
  ExpertCounts& counts_of(int64_t block) { return meters_[static_cast<size_t>(block)].counts; }
  void routed(int64_t tokens, int64_t d, const float* router_input);

  void stop();
  void read_on();
  bool next(Job* job);
  void read(const Job& job, std::unique_lock<std::mutex>& lock);
  void judge(int64_t block);
  int64_t allowed(uint64_t more) const;
  void settle();
  bool raise(uint64_t* part, uint64_t bytes, uint64_t more = 0);
  void resize(int64_t slots);
  bool claim();
  bool claim_ahead();
  void give(int64_t index, int64_t slot, std::vector<Job>* jobs);
  // What experts are given up last for: one that the running call needs, one that the next is expected to need.
  enum Hold { kFree, kExpected, kNeeded };
  int64_t victim(Hold most) const;
  void forget(Slot& slot);
  Slot* slot_of(const Expert& expert);
  uint8_t* half_of(int64_t slot, int half) const;
  uint64_t place_of(const Expert& expert, int half) const;

  std::unique_ptr<ExpertStorage> storage_;
  std::vector<ExpertBlock> blocks_;
  uint64_t alignment_, room_[2] = {0, 0}, slot_bytes_ = 0;
  uint8_t* memory_ = nullptr;
  uint64_t mapped_ = 0;
  uint64_t reserved_ = 0, idle_ = 0, held_ = 0, needed_ = 0, scratch_ = 0;  // bytes; see reserve, hold, need, begin

  mutable std::mutex mutex_;
  std::condition_variable work_, ready_;
  std::mutex call_;                                    // one call at a time
  std::vector<Slot> slots_;
  int64_t usable_ = 0;                                 // of slots_
  std::vector<Expert> experts_;                        // of all blocks
  ExpertUses uses_;                                    // of experts_
  std::vector<int64_t> first_;                         // of each block, in experts_
  int64_t most_experts_ = 0;                           // of a block
  // Queues that allocate nothing once the cache is made: readers and workers could not say that memory has run out.
  std::vector<int64_t> pending_;                       // experts of the running call that no slot was claimed for yet
  std::vector<Job> jobs_;
  std::vector<int64_t> expected_;                      // by the last prediction, of experts_
  std::vector<int64_t> ahead_;                         // of these, those that no slot was claimed for yet
  std::vector<Job> ahead_jobs_;                        // the halves of one expert at most; nobody waits for them
  int ahead_running_ = 0, most_ahead_ = 0;             // of ahead_jobs_, being read
  Predictor predictor_;
  std::vector<int32_t> predicted_;                     // its room
  uint32_t passed_ = 0;                                // calls that were not predicted, since that was of no use of late
  std::string ahead_fault_;                            // of the last read that failed before anybody waited for it
  double worth_ = 1.0;                                 // share of absent experts that were needed as expected, of late
  int64_t block_ = -1;                                 // of the running call
  int64_t least_ = 0;                                  // slots without which a call is refused
  uint64_t clock_ = 0;
  bool stop_ = false;
  std::string fault_;
  std::vector<Meter> meters_;                          // of each block, and of all: this one for time by the clock alone
  float share_ = 0.0f;                                 // see prefer_resident
  int64_t remembered_ = 0;
  std::vector<int64_t> recent_;                        // of experts_, at most `remembered_`, the one used last behind
  std::vector<uint8_t> near_;                          // of each expert: 1 if it is in recent_
  ExpertUses alone_uses_;                              // in calls of one token
  int64_t alone_ = -1;                                 // the block whose call of one token is about to begin
  moec_expert_source source_ = {};
  std::vector<std::thread> readers_;
};

// As many as one token needs in all layers, since a smaller cache would never hit, and at least one for each worker.
int64_t least_slots(const std::vector<ExpertBlock>& blocks, int32_t threads);

#endif  // MOEC_EXPERT_CACHE_H_
