// The runtime library: see moec_runtime.h. ExecuTorch's Module does the loading; what is added is checking before trust
// (program_file.h, program_check.h, method signatures), lazily backed arenas that methods share, and reasons for failures.
#include "moec_runtime.h"

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/log.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "memory.h"
#include "moec_kernel.h"
#include "operator_table.h"
#include "program_file.h"
#include "registration/ops_executorch.h"

// The wheel ships this class without its header.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t new_thread_count);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

using executorch::aten::ScalarType;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::HierarchicalAllocator;
using executorch::runtime::Span;

constexpr int64_t kLargestArena = int64_t{1} << 40;

// ------------------------------------------------------------------------------------------- ExecuTorch's log and aborts
//
// Inside a call of this library the first error logged is kept as the reason (the log's later lines only say who passed it
// on), and an abort of ExecuTorch, its answer to some damaged files, becomes an exception. Outside, other users of
// ExecuTorch in this process see their usual log.

thread_local std::string* reason = nullptr;
pal_emit_log_message_method usual_log = nullptr;
pal_abort_method usual_abort = nullptr;

struct Aborted : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void on_log(et_timestamp_t time, et_pal_log_level_t level, const char* file, const char* function, size_t line,
            const char* message, size_t length) {
  static const bool verbose = std::getenv("MOEC_LOG") != nullptr;
  if (reason && reason->empty() && (level == kError || level == kFatal)) reason->assign(message, length);
  if ((!reason || verbose) && usual_log) usual_log(time, level, file, function, line, message, length);
}

void on_abort() {
  if (reason) throw Aborted(reason->empty() ? "ExecuTorch gave up" : *reason);
  usual_abort();
  std::abort();
}

void watch_executorch() {
  static std::once_flag once;
  std::call_once(once, [] {
    executorch::runtime::runtime_init();
    usual_log = executorch::runtime::get_pal_impl()->emit_log_message;
    usual_abort = executorch::runtime::get_pal_impl()->abort;
    executorch::runtime::PalImpl impl = executorch::runtime::PalImpl::create(on_log, __FILE__);
    impl.abort = on_abort;
    executorch::runtime::register_pal(impl);
  });
}

class Watch {
 public:
  Watch() : outer_(reason) {
    watch_executorch();
    reason = &text_;
  }
  ~Watch() { reason = outer_; }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
  std::string* outer_;
};

// ----------------------------------------------------------------------------------------------------------------- arenas

// Anonymous pages that cost nothing until they are touched: an unused part of a context, or the logits of forward_all in a
// session that never asks for them, takes no memory.
class Arena {
 public:
  explicit Arena(size_t size) : size_(size) {
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    data_ = data == MAP_FAILED ? nullptr : static_cast<uint8_t*>(data);
  }
  Arena(Arena&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  Arena& operator=(Arena&&) = delete;
  ~Arena() {
    if (data_) munmap(data_, size_);
  }
  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_;
  size_t size_;
};

// While it lives, operators of this thread compute without rounding activations, if `on`.
class FloatActivations {
 public:
  explicit FloatActivations(bool on) : on_(on) {
    if (on_) moec_set_float_activations(1);
  }
  FloatActivations(const FloatActivations&) = delete;
  FloatActivations& operator=(const FloatActivations&) = delete;
  ~FloatActivations() {
    if (on_) moec_set_float_activations(0);
  }

 private:
  bool on_;
};

// Whether none of `count` values is NaN. -infinity is a logit: of a token that is never chosen.
bool all_numbers(const float* values, int64_t count) {
  bool nan = false;
  for (int64_t i = 0; i < count; ++i) nan |= values[i] != values[i];
  return !nan;
}

// Models whose program XNNPACK computes in part. XNNPACK keeps a pointer to ExecuTorch's thread pool from when it loads a
// program: while one is open that pool must not be replaced.
std::atomic<int> delegated_models{0};

class DelegatedModel {
 public:
  DelegatedModel() { ++delegated_models; }
  DelegatedModel(const DelegatedModel&) = delete;
  DelegatedModel& operator=(const DelegatedModel&) = delete;
  ~DelegatedModel() { --delegated_models; }
};

struct Method {
  std::vector<Span<uint8_t>> buffers;
  std::unique_ptr<HierarchicalAllocator> memory;
};

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char line[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  return line;
}

// One line of text, whatever a damaged file had where a name should be.
std::string one_line(std::string text) {
  for (char& c : text) {
    if (c == '\n' || c == '\t') c = ' ';
    if (c < ' ' || c > '~') c = '?';
  }
  return text;
}

}  // namespace

struct moec_model {
  std::mutex busy;
  std::string error;
  std::string path;
  std::vector<Arena> arenas;  // outlive the methods that point into them
  std::map<std::string, Method> methods;
  ProgramFile* file = nullptr;  // the module's
  std::optional<DelegatedModel> delegated;  // outlives the module
  std::unique_ptr<Module> module;
  moec_model_info info = {};
  std::vector<int64_t> eos_ids;
  bool float_activations = false;

  bool fail(std::string what) {
    error = one_line(std::move(what));
    return false;
  }

  bool fail(const char* doing, Error code, const Watch& watch) {
    const char* why = watch.text().empty() ? executorch::runtime::to_string(code) : watch.text().c_str();
    return fail(std::string(doing) + ": " + why);
  }

  bool open(int32_t threads);
  void close();
  bool read_constants();
  bool check_method(const char* name);
  bool reserve_arenas(const std::vector<std::string>& names);
  bool load_method(const std::string& name);
  bool set_threads(int32_t threads);
  bool integer(const char* name, bool required, int64_t* value);
  bool forward(const int64_t* ids, int64_t n, int64_t start, bool all, float* logits, int64_t capacity);
};

bool moec_model::integer(const char* name, bool required, int64_t* value) {
  Watch watch;
  const auto result = module->execute(name);
  if (!result.ok()) return required ? fail(text("method %s is missing", name)) : true;
  if (result->size() != 1 || !(*result)[0].isInt()) return fail(text("method %s does not give an integer", name));
  *value = (*result)[0].toInt();
  return true;
}

bool moec_model::read_constants() {
  if (!integer("get_vocab_size", true, &info.vocab_size)) return false;
  if (!integer("get_max_context_len", false, &info.context)) return false;
  if (info.context == 0 && !integer("get_max_seq_len", true, &info.context)) return false;
  info.bos_id = -1;
  if (!integer("get_bos_id", false, &info.bos_id)) return false;
  if (info.vocab_size < 1 || info.vocab_size > INT32_MAX || info.context < 1 || info.context > INT32_MAX)
    return fail(text("impossible vocabulary (%" PRId64 ") or context (%" PRId64 ")", info.vocab_size, info.context));
  Watch watch;
  const auto stops = module->execute("get_eos_ids");
  if (!stops.ok()) return true;
  for (const EValue& value : *stops) {
    if (value.isInt()) eos_ids.push_back(value.toInt());
    if (value.isIntList())
      for (const int64_t id : value.toIntList()) eos_ids.push_back(id);
  }
  return true;
}

bool moec_model::check_method(const char* name) {
  Watch watch;
  const auto meta = module->method_meta(name);
  if (!meta.ok()) return fail(name, meta.error(), watch);
  if (meta->num_inputs() != 2 || meta->num_outputs() != 1)
    return fail(text("method %s has %zu inputs and %zu outputs, not 2 and 1", name, meta->num_inputs(), meta->num_outputs()));
  const auto tokens = meta->input_tensor_meta(0), start = meta->input_tensor_meta(1), logits = meta->output_tensor_meta(0);
  if (!tokens.ok() || !start.ok() || !logits.ok()) return fail(text("method %s: an input or output is not a tensor", name));
  if (tokens->scalar_type() != ScalarType::Long || start->scalar_type() != ScalarType::Long ||
      logits->scalar_type() != ScalarType::Float)
    return fail(text("method %s: tokens and start_pos must be int64, logits float32", name));
  const auto token_sizes = tokens->sizes(), start_sizes = start->sizes(), logit_sizes = logits->sizes();
  if (token_sizes.size() != 2 || token_sizes[0] != 1 || token_sizes[1] < 1 || start_sizes.size() != 1 || start_sizes[0] != 1)
    return fail(text("method %s does not take tokens [1, T] and start_pos [1]", name));
  if (logit_sizes.size() < 2 || logit_sizes[logit_sizes.size() - 1] != info.vocab_size)
    return fail(text("method %s does not give logits of %" PRId64 " entries", name, info.vocab_size));
  const int64_t most = token_sizes[1];
  info.max_tokens = info.max_tokens ? std::min(info.max_tokens, most) : most;
  return true;
}

// One arena per memory id, as large as the largest method wants it, shared by all: the caches (an arena of their own) are
// the same for every method, and activations never live longer than a call.
bool moec_model::reserve_arenas(const std::vector<std::string>& names) {
  std::vector<size_t> sizes;
  for (const std::string& name : names) {
    const auto meta = module->method_meta(name);
    if (!meta.ok()) return fail(name + ": no memory plan");
    for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
      const auto size = meta->memory_planned_buffer_size(i);
      if (!size.ok() || *size < 0 || *size > kLargestArena) return fail(name + ": an impossible memory plan");
      if (sizes.size() <= i) sizes.resize(i + 1, 0);
      sizes[i] = std::max(sizes[i], static_cast<size_t>(*size));
    }
  }
  for (const size_t size : sizes) {
    arenas.emplace_back(std::max<size_t>(size, 1));
    if (!arenas.back().data()) return fail(text("no address space for %zu bytes of activations and caches", size));
    info.arena_bytes += static_cast<int64_t>(size);
  }
  for (const std::string& name : names) {
    Method& method = methods[name];
    const size_t count = module->method_meta(name)->num_memory_planned_buffers();
    for (size_t i = 0; i < count; ++i) method.buffers.push_back({arenas[i].data(), sizes[i]});
    method.memory = std::make_unique<HierarchicalAllocator>(Span<Span<uint8_t>>(method.buffers.data(), method.buffers.size()));
  }
  return true;
}

bool moec_model::load_method(const std::string& name) {
  if (module->is_method_loaded(name)) return true;
  Watch watch;
  const Error code = module->load_method(name, methods.at(name).memory.get());
  if (code == Error::Ok) return true;
  if (code == Error::OperatorMissing) return fail(name + ": the program uses an operator that this build has not; rebuild it");
  return fail(name.c_str(), code, watch);
}

bool moec_model::open(int32_t threads) {
  std::string fault;
  std::unique_ptr<ProgramFile> opened = ProgramFile::open(path, &fault);
  if (!opened) return fail(fault);
  file = opened.get();
  info.file_bytes = static_cast<int64_t>(file->bytes());
  module = std::make_unique<Module>(std::move(opened));
  Watch watch;
  const Error code = module->load(executorch::runtime::Program::Verification::InternalConsistency);
  // check_file has opened it and knows its length: what fails is the mapping, for want of address space
  if (code == Error::AccessFailed || code == Error::MemoryAllocationFailed) return fail("no address space to map the file", code, watch);
  if (code != Error::Ok) return fail("damaged, or written by another version of ExecuTorch", code, watch);
  fault = file->check();
  if (!fault.empty()) return fail("damaged: " + fault);
  const auto present = module->method_names();
  if (!present.ok()) return fail("no list of methods", present.error(), watch);
  if (!present->count("forward")) return fail("there is no method named forward");
  std::vector<std::string> names = {"forward"};
  if (present->count("forward_all")) names.push_back("forward_all");
  info.has_all = names.size() == 2;
  if (!read_constants()) return false;
  for (const std::string& name : names)
    if (!check_method(name.c_str())) return false;
  return set_threads(threads) && reserve_arenas(names) && load_method("forward");
}

// One pool does the work, the other has no threads: see ops_executorch.h. Without a delegate ExecuTorch's pool is not even
// asked for, since another user of ExecuTorch in this process may have a program loaded that points to it.
bool moec_model::set_threads(int32_t threads) {
  if (!*moec_get_isa()) return fail(moec_last_error());  // MOEC_ISA names what this machine does not have
  if (threads <= 0) threads = moec_fast_cores();
  if (threads > 256) return fail(text("%d threads: at most 256", threads));
  const bool pool_is_used = delegated_models > 0;
  if (module->method_meta("forward")->uses_backend("XnnpackBackend")) delegated.emplace();
  if (!delegated && !pool_is_used) {
    if (moec_set_threads(threads) != MOEC_OK) return fail(moec_last_error());
    moec_set_parallel(nullptr, nullptr, nullptr);
    info.threads = threads;
    return true;
  }
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (!pool) return fail("ExecuTorch has no thread pool");
  if (!pool_is_used && pool->get_thread_count() != static_cast<size_t>(threads) &&
      !pool->_unsafe_reset_threadpool(static_cast<uint32_t>(threads)))
    return fail(text("the system does not allow %d threads", threads));
  if (moec_set_threads(1) != MOEC_OK) return fail(moec_last_error());
  moec_use_executorch_threads();
  info.threads = static_cast<int64_t>(pool->get_thread_count());
  return true;
}

void moec_model::close() {
  module.reset();
  delegated.reset();
}

bool moec_model::forward(const int64_t* ids, int64_t n, int64_t start, bool all, float* logits, int64_t capacity) {
  if (n < 1 || n > info.max_tokens) return fail(text("%" PRId64 " tokens in one call; 1 .. %" PRId64, n, info.max_tokens));
  if (start < 0 || start > info.context - n)
    return fail(text("%" PRId64 " tokens at position %" PRId64 " do not fit a context of %" PRId64, n, start, info.context));
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] < 0 || ids[i] >= info.vocab_size)
      return fail(text("token %" PRId64 " is not in 0 .. %" PRId64, ids[i], info.vocab_size - 1));
  const int64_t wanted = (all ? n : 1) * info.vocab_size;
  if (capacity != 0 && capacity < wanted)
    return fail(text("room for %" PRId64 " logits, %" PRId64 " are needed", capacity, wanted));
  if (all && !info.has_all) return fail("the program has no method forward_all");
  const std::string name = all ? "forward_all" : "forward";
  if (file->truncated()) return fail("truncated while it is in use");
  if (!load_method(name)) return false;
  // never written: ExecuTorch's tensors just have no const form
  auto tokens = executorch::extension::from_blob(const_cast<int64_t*>(ids), {1, static_cast<int32_t>(n)}, ScalarType::Long);
  auto position = executorch::extension::from_blob(&start, {1}, ScalarType::Long);
  Watch watch;
  const FloatActivations arithmetic(float_activations);
  const auto result = module->execute(name, {EValue(tokens), EValue(position)});
  if (!result.ok()) return fail(name.c_str(), result.error(), watch);
  const auto& output = (*result)[0].toTensor();
  if (output.numel() != wanted)
    return fail(text("%s gave %zd logits instead of %" PRId64, name.c_str(), static_cast<ssize_t>(output.numel()), wanted));
  if (file->truncated()) return fail("truncated while it is in use");
  if (capacity == 0) return true;
  std::memcpy(logits, output.const_data_ptr<float>(), static_cast<size_t>(wanted) * sizeof(float));
  return all_numbers(logits, wanted) ? true : fail("the logits are not numbers: the weights are damaged, or too large");
}

// ------------------------------------------------------------------------------------------------------------------ C API

// Thread pools belong to the process: opening a model may resize them, which no running model would survive.
static std::shared_mutex pools;

// No C++ exception may cross into C or Python.
template <typename Body>
static bool guarded(moec_model* model, Body body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return model->fail("out of memory");
  } catch (const std::exception& e) {
    return model->fail(e.what());
  }
}

moec_model* moec_model_open(const char* path, int32_t threads) {
  moec_model* model = new (std::nothrow) moec_model;
  if (!model) return nullptr;
  std::unique_lock<std::shared_mutex> alone(pools);
  guarded(model, [&] {
    Watch watch;
    model->path = path ? path : "";
    return model->open(threads);
  });
  if (!model->error.empty()) {
    guarded(model, [&] {
      Watch watch;
      model->close();  // half open is closed: a call says so
      return true;
    });
  }
  return model;
}

void moec_model_close(moec_model* model) {
  if (!model) return;
  {
    std::lock_guard<std::mutex> lock(model->busy);  // a call that runs ends first
    guarded(model, [&] {
      Watch watch;
      model->close();
      return true;
    });
  }
  delete model;
}

const char* moec_model_error(const moec_model* model) { return model ? model->error.c_str() : "out of memory"; }

int32_t moec_model_get_info(const moec_model* model, moec_model_info* info) {
  if (!model || !info) return -1;
  *info = model->info;
  return 0;
}

int64_t moec_model_eos_ids(const moec_model* model, int64_t* ids, int64_t capacity) {
  if (!model) return 0;
  const int64_t count = static_cast<int64_t>(model->eos_ids.size());
  for (int64_t i = 0; ids && i < std::min(count, capacity); ++i) ids[i] = model->eos_ids[static_cast<size_t>(i)];
  return count;
}

int32_t moec_model_forward(moec_model* model, const int64_t* ids, int64_t n, int64_t start, int32_t all, float* logits,
                           int64_t capacity) {
  if (!model) return -1;
  std::lock_guard<std::mutex> lock(model->busy);
  std::shared_lock<std::shared_mutex> keep(pools);
  model->error.clear();
  const bool ok = guarded(model, [&] {
    if (!model->module || !ids || (capacity != 0 && !logits)) return model->fail("not open, or no buffer");
    Watch watch;
    return model->forward(ids, n, start, all != 0, logits, capacity);
  });
  return ok ? 0 : -1;
}

void moec_model_trace(moec_model_trace_fn callback, void* user) { moec_set_trace(callback, user); }

int32_t moec_model_set_isa(const char* name) { return moec_set_isa(name) == MOEC_OK ? 0 : -1; }

const char* moec_model_isa(void) { return moec_get_isa(); }

void moec_model_float_activations(moec_model* model, int32_t on) {
  if (!model) return;
  std::lock_guard<std::mutex> lock(model->busy);
  model->float_activations = on != 0;
}

int64_t moec_peak_rss(void) { return peak_resident(); }

int64_t moec_anonymous_rss(void) {
  ProcessMemory process;
  return read_process_memory("", &process) ? process.anonymous : 0;
}

int32_t moec_model_memory(moec_model* model, moec_memory* memory) {
  if (!memory) return -1;
  *memory = {};
  ProcessMemory process;
  try {
    if (!read_process_memory(model ? model->path : "", &process)) return -1;
    memory->resident = process.resident;
    memory->weights = process.file_mapped;
    memory->anonymous = process.anonymous;
    memory->libraries = process.other_files;
    if (!model) return 0;
    memory->file_cached = std::max<int64_t>(cached_bytes(model->path), 0);
    // memory planning puts activations into the first arena and what methods share, the caches, into those behind it
    for (size_t i = 0; i < model->arenas.size(); ++i)
      (i == 0 ? memory->activations : memory->caches) +=
          std::max<int64_t>(resident_bytes(model->arenas[i].data(), model->arenas[i].size()), 0);
    return 0;
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

int32_t moec_check_program(const char* path, char* reason, size_t capacity) {
  std::string fault;
  try {
    const std::unique_ptr<ProgramFile> file = ProgramFile::open(path ? path : "", &fault);
    if (file) fault = file->check();
  } catch (const std::exception& e) {
    fault = e.what();
  }
  if (reason && capacity > 0) std::snprintf(reason, capacity, "%s", one_line(fault).c_str());
  return fault.empty() ? 0 : -1;
}

int32_t moec_has_operator(const char* name) {
  watch_executorch();
  return name && find_operator(name) && executorch::ET_RUNTIME_NAMESPACE::registry_has_op_function(name);
}

int64_t moec_cached_bytes(const char* path) {
  try {
    return path ? cached_bytes(path) : -1;
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

int32_t moec_forget_cached(const char* path) { return path && forget_cached(path) ? 0 : -1; }
