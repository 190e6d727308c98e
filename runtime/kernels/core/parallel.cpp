// The library's own thread pool, and the hook that replaces it.
//
// A job is `n` calls of a task. The caller and the pool's threads claim indices one by one, so the caller never waits for a
// thread that the system has not scheduled: it runs that thread's share itself. Waiting spins for a few microseconds, then
// sleeps, so that a busy machine loses no core to it.
#include "core/parallel.h"

#include <pthread.h>

#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "core/status.h"

namespace moec {
namespace {

constexpr int32_t kMostThreads = 256;
constexpr int kSpins = 4000;  // of a pause each: tens of microseconds, the gap between two operators

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One job's claim word: the generation in the upper half, the next index in the lower. A thread that wakes up late finds
// another generation and claims nothing.
class Pool {
 public:
  ~Pool() { stop(); }

  int32_t size() const { return size_.load(std::memory_order_relaxed); }

  // May be called again to change the size; the caller makes sure that no job runs.
  int32_t resize(int32_t n) {
    std::lock_guard<std::mutex> busy(job_mutex_);
    stop();
    stopping_ = false;
    try {
      for (int32_t i = 1; i < n; ++i) threads_.emplace_back([this] { work(); });
    } catch (const std::exception&) {  // no more threads, or no memory for one
      stop();
      size_ = 1;
      return fail(MOEC_OUT_OF_MEMORY, "the system does not allow %d threads", n);
    }
    size_ = n;
    return MOEC_OK;
  }

  void run(int32_t n, moec_task_fn task, void* context) {
    std::unique_lock<std::mutex> busy(job_mutex_, std::try_to_lock);
    if (!busy.owns_lock() || n <= 1 || size() <= 1) {  // another thread's operator has the pool: do it alone
      for (int32_t i = 0; i < n; ++i) task(context, i);
      return;
    }
    const uint64_t generation = ((claim_.load(std::memory_order_relaxed) >> 32) + 1) & 0xffffffffu;
    task_.store(task, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    total_.store(n, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    claim_.store(generation << 32, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      // the empty section makes a thread that has just found no work either see the new generation or be woken
      { std::lock_guard<std::mutex> lock(sleep_mutex_); }
      wake_.notify_all();
    }
    drain(generation);
    for (int spin = 0; done_.load(std::memory_order_acquire) < n; ++spin) {
      if (spin < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
    claim_.store((generation << 32) | kClosed, std::memory_order_relaxed);
  }

 private:
  static constexpr uint64_t kClosed = 0xffffffffu;

  void drain(uint64_t generation) {
    for (;;) {
      uint64_t word = claim_.load(std::memory_order_acquire);
      if ((word >> 32) != generation) return;
      // read before the claim: after a successful claim the job cannot end before this index is done
      const int32_t total = total_.load(std::memory_order_relaxed);
      const moec_task_fn task = task_.load(std::memory_order_relaxed);
      void* const context = context_.load(std::memory_order_relaxed);
      const uint64_t index = word & 0xffffffffu;
      if (index >= uint64_t(total)) return;
      if (!claim_.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) continue;
      task(context, int32_t(index));
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void work() {
    uint64_t seen = claim_.load(std::memory_order_acquire) >> 32;
    for (;;) {
      int spin = 0;
      for (; spin < kSpins && (claim_.load(std::memory_order_acquire) >> 32) == seen; ++spin) {
        if (stopping_.load(std::memory_order_relaxed)) return;
        pause();
      }
      if (spin == kSpins) {
        std::unique_lock<std::mutex> lock(sleep_mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] {
          return stopping_.load(std::memory_order_relaxed) || (claim_.load(std::memory_order_seq_cst) >> 32) != seen;
        });
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
      }
      if (stopping_.load(std::memory_order_relaxed)) return;
      seen = claim_.load(std::memory_order_acquire) >> 32;
      drain(seen);
    }
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  std::mutex job_mutex_;
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  std::atomic<int32_t> size_{1};
  std::atomic<bool> stopping_{false};
  std::atomic<int32_t> sleepers_{0};
  alignas(64) std::atomic<uint64_t> claim_{kClosed};
  alignas(64) std::atomic<int32_t> done_{0};
  std::atomic<int32_t> total_{0};
  std::atomic<moec_task_fn> task_{nullptr};
  std::atomic<void*> context_{nullptr};
};

// Never destroyed: joining threads while the process unloads its libraries can hang.
std::atomic<Pool*> process_pool{nullptr};
std::atomic<int32_t> inherited{1};  // threads of the pool that a forked child starts

// A child of fork has none of its parent's threads: no work would reach them, joining them is undefined (on some systems it
// waits for ever), and locks that they held stay locked. So the child leaves the parent's pool alone and starts its own when an
// operator first needs one.
void after_fork() {
  if (const Pool* const parents = process_pool.exchange(nullptr)) inherited = parents->size();
}

Pool& pool() {
  if (Pool* const found = process_pool.load(std::memory_order_acquire)) return *found;
  static const int registered = pthread_atfork(nullptr, nullptr, after_fork);
  (void)registered;
  Pool* const made = new Pool;
  Pool* first = nullptr;
  if (!process_pool.compare_exchange_strong(first, made)) {  // another thread was faster
    delete made;
    return *first;
  }
  if (inherited > 1) made->resize(inherited);  // where that fails the pool has one thread
  return *made;
}

std::atomic<moec_parallel_fn> external_run{nullptr};
std::atomic<int32_t (*)(void*)> external_threads{nullptr};
std::atomic<void*> external_user{nullptr};

}  // namespace

int32_t workers() {
  if (external_run.load(std::memory_order_acquire)) {
    int32_t (*const threads)(void*) = external_threads.load(std::memory_order_relaxed);
    const int32_t n = threads ? threads(external_user.load(std::memory_order_relaxed)) : 1;
    return n < 1 ? 1 : n > kMostThreads ? kMostThreads : n;
  }
  return pool().size();
}

void run_parallel(int32_t n, moec_task_fn task, void* context) {
  if (n <= 1) {
    if (n == 1) task(context, 0);
    return;
  }
  if (const moec_parallel_fn run = external_run.load(std::memory_order_acquire)) {
    run(external_user.load(std::memory_order_relaxed), n, task, context);
    return;
  }
  pool().run(n, task, context);
}

}  // namespace moec

void moec_set_parallel(moec_parallel_fn run, int32_t (*threads)(void* user), void* user) {
  using namespace moec;
  external_run.store(nullptr, std::memory_order_release);
  external_user.store(user, std::memory_order_relaxed);
  external_threads.store(threads, std::memory_order_relaxed);
  external_run.store(run, std::memory_order_release);
}

int32_t moec_set_threads(int32_t n) {
  if (n < 1 || n > moec::kMostThreads) {
    return moec::fail(MOEC_INVALID_ARGUMENT, "threads: %d is not in 1..%d", n, moec::kMostThreads);
  }
  return n == moec::pool().size() ? MOEC_OK : moec::pool().resize(n);
}

int32_t moec_get_threads(void) { return moec::workers(); }
