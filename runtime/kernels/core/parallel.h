// Running tasks on whichever thread pool is installed. An operator forks `workers()` tasks and lets them draw units of work
// from one atomic counter: a worker that never gets a core costs nothing, and nothing waits inside a task. Exported for the
// runtime library, which reads saved sessions with the same threads.
#ifndef MOEC_PARALLEL_H_
#define MOEC_PARALLEL_H_

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "moec_kernel.h"

namespace moec {

// Threads that the installed pool offers, at least 1.
MOEC_API int32_t workers();

// task(context, i) for every i in [0, n); returns when all are done. n == 1 runs on the caller.
MOEC_API void run_parallel(int32_t n, moec_task_fn task, void* context);

// work(worker, unit) for every unit in [0, count), units drawn in ascending order by at most `threads` workers.
// `worker` < threads tells which private scratch to use.
template <typename Work>
void for_each_unit(int32_t threads, int64_t count, Work&& work) {
  if (count <= 0) return;
  if (threads > count) threads = int32_t(count);
  if (threads <= 1) {
    for (int64_t unit = 0; unit < count; ++unit) work(int32_t{0}, unit);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t count = 0;
    std::remove_reference_t<Work>* work = nullptr;
  } shared;
  shared.count = count;
  shared.work = &work;
  run_parallel(
      threads,
      [](void* context, int32_t worker) {
        auto* s = static_cast<Shared*>(context);
        for (;;) {
          const int64_t unit = s->next.fetch_add(1, std::memory_order_relaxed);
          if (unit >= s->count) return;
          (*s->work)(worker, unit);
        }
      },
      &shared);
}

}  // namespace moec

#endif  // MOEC_PARALLEL_H_
