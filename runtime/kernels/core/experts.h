// `Experts`: the matrices of the routed experts during one call of moec_moe, in memory or lent by the
// moec_expert_source that this thread has set. Protocol: for each chunk of tokens, `begin` names the experts that the
// chunk needs and how often, and `end` closes it. In between each worker holds one expert at a time as a `HeldExpert`:
// `w13` and `w2` wait until the matrix is there (acquire), and its destructor gives both back (release). Without a
// source all of these return at once.
#ifndef MOEC_EXPERTS_H_
#define MOEC_EXPERTS_H_

#include <atomic>
#include <cstdint>

#include "core/moe_run.h"
#include "moec_kernel.h"

namespace moec {

// The source that moec_use_expert_source set on this thread; nullptr: none.
const moec_expert_source* expert_source();

class Experts {
 public:
  explicit Experts(const Moe& moe) : moe_(moe) {}
  Experts(const Experts&) = delete;
  Experts& operator=(const Experts&) = delete;
  ~Experts() { end(); }

  // As moec_expert_source::begin; false for its -1: no expert can be provided, and the call must fail.
  bool begin(int32_t* experts, const int32_t* uses, int64_t count, uint64_t scratch_bytes) {
    const moec_expert_source* const source = expert_source();
    if (!source) return true;
    const int32_t answer = source->begin(source->user, moe_.w13.data, experts, uses, count, scratch_bytes);
    if (answer > 0) source_ = source;
    if (answer < 0) failed_ = true;
    return answer >= 0;
  }
  // As moec_expert_source::routed.
  void routed(int64_t tokens, const float* router_input) {
    if (source_ && source_->routed) source_->routed(source_->user, tokens, moe_.d, router_input);
  }
  void end() {
    if (source_) source_->end(source_->user);
    source_ = nullptr;
  }
  bool lent() const { return source_ != nullptr; }
  bool failed() const { return failed_.load(std::memory_order_relaxed); }

 private:
  friend class HeldExpert;
  const Moe& moe_;
  const moec_expert_source* source_ = nullptr;
  std::atomic<bool> failed_{false};
};

// One expert, held by one worker for the lifetime of this object.
class HeldExpert {
 public:
  HeldExpert(Experts& experts, int64_t e) : experts_(experts), e_(e) {}
  HeldExpert(const HeldExpert&) = delete;
  HeldExpert& operator=(const HeldExpert&) = delete;
  ~HeldExpert() {
    for (; given_ > 0; --given_) experts_.source_->release(experts_.source_->user, int32_t(e_));
  }

  // False: it cannot be read, which `Experts::failed` says from then on.
  bool w13(Matrix* out) {
    *out = experts_.moe_.expert_w13(e_);
    return lent(0, out);
  }
  bool w2(Matrix* out) {
    *out = experts_.moe_.expert_w2(e_);
    return lent(1, out);
  }

 private:
  bool lent(int32_t which, Matrix* out) {
    if (!experts_.source_) return true;
    out->data = static_cast<const uint8_t*>(experts_.source_->acquire(experts_.source_->user, int32_t(e_), which));
    if (out->data) return ++given_ > 0;
    experts_.failed_.store(true, std::memory_order_relaxed);
    return false;
  }

  Experts& experts_;
  int64_t e_;
  int given_ = 0;
};

}  // namespace moec

#endif  // MOEC_EXPERTS_H_
