// A loaded model inside the runtime library: what moec_runtime.h hides from callers. moec_runtime.cpp opens it, reads
// its constants, arenas and states, and runs it; memory_budget.cpp fits it into a budget; session.cpp and caches.cpp hold what is
// carried between calls.
#ifndef MOEC_MODEL_H_
#define MOEC_MODEL_H_

#include <executorch/extension/module/module.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <shared_mutex>
#include <string>
#include <utility>
#include <vector>

#include "caches.h"
#include "expert_cache.h"
#include "moec_runtime.h"
#include "program_file.h"

namespace moec_runtime {

// Inside a call of this library the first error that ExecuTorch logs is kept as the reason (the log's later lines only say
// who passed it on), and an abort of ExecuTorch, its answer to some damaged files, becomes an exception. Outside, other
// users of ExecuTorch in this process see their usual log.
class Watch {
 public:
  Watch();
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;
  const std::string& text() const { return text_; }

 private:
  std::string text_;
  std::string* outer_;
};

// Puts our log and abort in place of ExecuTorch's, once.
void watch_executorch();

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

// One line of text, whatever a damaged file had where a name should be.
std::string one_line(std::string text);

// Models whose program XNNPACK computes in part. XNNPACK keeps a pointer to ExecuTorch's thread pool from when it loads a
// program: while one is open that pool must not be replaced.
extern std::atomic<int> delegated_models;

class DelegatedModel {
 public:
  DelegatedModel() { ++delegated_models; }
  DelegatedModel(const DelegatedModel&) = delete;
  DelegatedModel& operator=(const DelegatedModel&) = delete;
  ~DelegatedModel() { --delegated_models; }
};

struct Method {
  std::vector<executorch::runtime::Span<uint8_t>> buffers;
  std::unique_ptr<executorch::runtime::HierarchicalAllocator> memory;
};

// Thread pools belong to the process: opening a model may resize them, which no running model would survive.
extern std::shared_mutex pools;

}  // namespace moec_runtime

struct moec_model {
  std::atomic<int> owners{1};  // the caller's handle, and every session
  std::mutex busy;
  std::string error;
  std::string path;
  std::vector<Arena> arenas;  // outlive the methods that point into them
  std::map<std::string, moec_runtime::Method> methods;
  ProgramFile* file = nullptr;  // the module's
  std::optional<moec_runtime::DelegatedModel> delegated;  // outlives the module
  std::unique_ptr<executorch::extension::Module> module;
  moec_model_info info = {};
  int64_t planned_tokens = 0;  // of a call, for which the arena of activations is planned; info.max_tokens may become less
  std::vector<int64_t> eos_ids;
  bool float_activations = false;
  std::unique_ptr<ExpertCache> experts;  // where a memory budget was set
  int64_t memory_budget = 0;
  int64_t sessions = 0;                  // that are open
  bool own_used = false;                 // moec_model_forward was called
  int64_t delegate_bytes = 0;            // that XNNPACK packed for one method
  int64_t late_bytes = 0;                // of methods that were loaded when the budget was set already
  bool rows_are_positions = false;  // axis 1 of every state counts positions
  Seats seats;
  Caches own;              // of moec_model_forward
  std::string no_sessions;  // why sessions cannot have caches of their own; empty: they can

  bool fail(std::string what) {
    error = moec_runtime::one_line(std::move(what));
    return false;
  }

  bool fail(const char* doing, executorch::runtime::Error code, const moec_runtime::Watch& watch) {
    const char* why = watch.text().empty() ? executorch::runtime::to_string(code) : watch.text().c_str();
    return fail(std::string(doing) + ": " + why);
  }

  bool open(int32_t threads);
  void close();
  bool read_constants();
  bool check_method(const char* name);
  bool reserve_arenas(const std::vector<std::string>& names);
  bool find_states();
  bool load_method(const std::string& name);
  int64_t most_tokens(int64_t bytes, int64_t slots);
  uint64_t activation_bytes(int64_t n, bool all);
  int64_t session_bytes() const;  // of the caches of one
  int64_t held_bytes(int64_t open) const;
  bool hold_beside(int64_t bytes);
  bool use_own();
  bool count_method();
  bool count_session(int64_t change);
  bool limit_memory(int64_t bytes, ExpertPolicy policy, int readers);
  bool set_threads(int32_t threads);
  bool integer(const char* name, bool required, int64_t* value);
  // Whether the call can be made: arguments, the file, memory. Nothing is computed.
  bool ready(const int64_t* ids, int64_t n, int64_t start, bool all, int64_t capacity);
  bool forward(Caches* caches, const int64_t* ids, int64_t n, int64_t start, bool all, float* logits, int64_t capacity);
};

namespace moec_runtime {

// No C++ exception may cross into C or Python.
template <typename Body>
bool guarded(moec_model* model, Body body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return model->fail("out of memory");
  } catch (const std::exception& e) {
    return model->fail(e.what());
  }
}

}  // namespace moec_runtime

#endif  // MOEC_MODEL_H_
