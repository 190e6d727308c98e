// The runtime library: see moec_runtime.h. ExecuTorch's Module does the loading; what is added is checking before trust
// (program_file.h, program_check.h, method signatures), lazily backed arenas that methods share, and reasons for failures.
#include "moec_runtime.h"

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/kernel/operator_registry.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "memory.h"
#include "model.h"
#include "moec_kernel.h"
#include "operator_table.h"
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
using moec_runtime::delegated_models;
using moec_runtime::guarded;
using moec_runtime::Method;
using moec_runtime::one_line;
using moec_runtime::pools;
using moec_runtime::text;
using moec_runtime::watch_executorch;
using moec_runtime::Watch;

constexpr int64_t kLargestArena = int64_t{1} << 40;

// While it lives, the kernels of this thread take routed experts from a cache, if there is one.
class UsedExperts {
 public:
  explicit UsedExperts(const ExpertCache* cache) { moec_use_expert_source(cache ? cache->source() : nullptr); }
  UsedExperts(const UsedExperts&) = delete;
  UsedExperts& operator=(const UsedExperts&) = delete;
  ~UsedExperts() { moec_use_expert_source(nullptr); }
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

// Whether none of `count` values is NaN or infinity. -infinity is a logit: of a token that is never chosen.
bool all_numbers(const float* values, int64_t count) {
  bool good = true;
  for (int64_t i = 0; i < count; ++i) good &= values[i] <= std::numeric_limits<float>::max();
  return good;
}

}  // namespace

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
  int64_t appended = 0;
  if (!integer("get_states_appended", false, &appended)) return false;
  info.rewinds = appended == 1 || appended == 2;
  rows_are_positions = appended == 1;
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
  info.max_tokens = planned_tokens = info.max_tokens ? std::min(info.max_tokens, most) : most;
  return true;
}

// One arena per memory id, as large as the largest method needs it, shared by all: the caches (an arena of their own) are
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
  ProcessMemory before, after;
  const bool first = delegated && delegate_bytes == 0;
  if (first) read_process_memory("", &before);
  else if (!count_method()) return false;
  const Error code = module->load_method(name, methods.at(name).memory.get());
  if (first && read_process_memory("", &after)) delegate_bytes = std::max<int64_t>(after.anonymous - before.anonymous, 0);
  if (code == Error::Ok) return true;
  if (!first) late_bytes = 0;  // there is one such method, and it was not loaded: the next call counts it again
  if (code == Error::OperatorMissing) return fail(name + ": the program uses an operator that this build does not have; rebuild it");
  return fail(name.c_str(), code, watch);
}

// Where the states lie, and which bytes of them a position has. A program that says nothing of its states (an older one)
// keeps them all: they are then copied whole, and a session can only go back to position 0.
bool moec_model::find_states() {
  std::vector<StatePart> parts;
  Watch watch;
  const auto meta = module->method_meta("forward");
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // for its pointers, which die with a method: ours stays loaded
  const auto method = module->method("forward");
#pragma GCC diagnostic pop
  if (!meta.ok() || !method.ok()) return fail("method forward is gone");
  std::vector<std::pair<size_t, size_t>> covered;  // begin and end, as if the arenas were contiguous
  std::vector<size_t> begins = {0};
  for (const Arena& arena : arenas) begins.push_back(begins.back() + arena.size());
  for (size_t i = 0; i < meta->num_attributes(); ++i) {
    const auto info_of = meta->attribute_tensor_meta(i);
    if (!info_of.ok()) return fail("a state without a description");
    const auto tensor = (*method)->get_attribute(info_of->name());
    if (!tensor.ok()) return fail(text("state %zu is missing", i));
    const auto* data = static_cast<const uint8_t*>(tensor->const_data_ptr());
    const size_t bytes = tensor->nbytes();
    size_t arena = 0;
    while (arena < arenas.size() && !(data >= arenas[arena].data() && data + bytes <= arenas[arena].data() + arenas[arena].size()))
      ++arena;
    if (arena == arenas.size()) continue;  // a constant that has a name
    if (arena == 0) no_sessions = "the program keeps states among its activations";
    const auto sizes = tensor->sizes();
    const bool rows = rows_are_positions && sizes.size() >= 2 && sizes[0] == 1 && sizes[1] == info.context;
    const size_t offset = static_cast<size_t>(data - arenas[arena].data());
    parts.push_back({arena, offset, bytes, rows ? bytes / static_cast<size_t>(info.context) : 0});
    covered.push_back({begins[arena] + offset, begins[arena] + offset + bytes});
  }
  // memory that methods share and no named state explains is carried as it is
  std::sort(covered.begin(), covered.end());
  size_t end = arenas.empty() ? 0 : begins[1], gap = 0;
  bool overlap = false;  // in a program that somebody forged
  constexpr size_t kAlignment = 256;  // of a plan's tensors, at most
  for (const auto& [from, to] : covered) {
    if (from > end) gap = std::max(gap, from - end);
    overlap |= from < end;
    end = std::max(end, to);
  }
  gap = std::max(gap, begins.back() - std::min(end, begins.back()));
  if (gap >= kAlignment || overlap) {
    parts.clear();
    for (size_t i = 1; i < arenas.size(); ++i) parts.push_back({i, 0, arenas[i].size(), 0});
  }
  seats.set(&arenas, 1, std::move(parts));
  seats.begin(&own);
  return true;
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
  info.exact = file->facts().exact_calls;
  if (!read_constants()) return false;
  for (const std::string& name : names)
    if (!check_method(name.c_str())) return false;
  return set_threads(threads) && reserve_arenas(names) && load_method("forward") && find_states();
}

// One pool does the work, the other has no threads: see ops_executorch.h. Without a delegate ExecuTorch's pool is not even
// asked for, since another user of ExecuTorch in this process may have a program loaded that points to it.
bool moec_model::set_threads(int32_t threads) {
  if (!*moec_get_isa()) return fail(moec_last_error());  // MOEC_ISA names what this machine does not have
  if (threads <= 0) threads = moec_fast_cores();
  if (threads > 256) return fail(text("%d threads: at most 256", threads));
  const bool pool_is_used = delegated_models > 0;
  for (const char* name : {"forward", "forward_all"}) {
    const auto meta = module->method_meta(name);
    if (!delegated && meta.ok() && meta->uses_backend("XnnpackBackend")) delegated.emplace();
  }
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

// What a call of n tokens touches of the arena of activations.
uint64_t moec_model::activation_bytes(int64_t n, bool all) {
  const auto planned = module->method_meta("forward")->memory_planned_buffer_size(0);
  const double share = static_cast<double>(n) / static_cast<double>(planned_tokens);
  const uint64_t logits = all ? static_cast<uint64_t>(n * info.vocab_size) * sizeof(float) : 0;
  return static_cast<uint64_t>(share * static_cast<double>(planned.ok() ? *planned : 0)) + logits;
}

void moec_model::close() {
  experts.reset();
  module.reset();
  delegated.reset();
}

bool moec_model::ready(const int64_t* ids, int64_t n, int64_t start, bool all, int64_t capacity) {
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
  if (file->truncated()) return fail("truncated while it is in use");
  if (!load_method(all ? "forward_all" : "forward")) return false;
  // the logits of all tokens come on top of the budget where it has no room for them
  if (!experts || experts->need(activation_bytes(n, all)) || (all && experts->need(activation_bytes(n, false)))) return true;
  return fail("the memory budget leaves no room for experts beside the activations of so many tokens at once");
}

// A call that is ready.
bool moec_model::forward(Caches* caches, const int64_t* ids, int64_t n, int64_t start, bool all, float* logits, int64_t capacity) {
  const std::string name = all ? "forward_all" : "forward";
  const int64_t wanted = (all ? n : 1) * info.vocab_size;
  if (!seats.seat(caches)) return fail("no address space for the caches of another session");
  if (caches->damaged) return fail("pages of a session's file are missing");
  const SharedUse use(seats, *caches);
  if (!use.held()) return fail("too many sessions use files of saved ones at once");
  seats.write(caches, start);
  caches->reached = std::max(caches->reached, start + n);
  // never written: ExecuTorch's tensors just have no const form
  auto tokens = executorch::extension::from_blob(const_cast<int64_t*>(ids), {1, static_cast<int32_t>(n)}, ScalarType::Long);
  auto position = executorch::extension::from_blob(&start, {1}, ScalarType::Long);
  Watch watch;
  const FloatActivations arithmetic(float_activations);
  const UsedExperts lent(experts.get());
  const auto result = module->execute(name, {EValue(tokens), EValue(position)});
  if ((caches->damaged |= use.lost())) return fail("pages of a session's file are missing");
  if (!result.ok() && experts && !experts->fault().empty()) return fail(experts->fault());
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
      model->close();  // what failed to open is closed: calls report it
      return true;
    });
  }
  return model;
}

void moec_model_close(moec_model* model) {
  if (!model || --model->owners > 0) return;  // the last session of it closes it
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
    return model->use_own() && model->ready(ids, n, start, all != 0, capacity) &&
           model->forward(&model->own, ids, n, start, all != 0, logits, capacity);
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
