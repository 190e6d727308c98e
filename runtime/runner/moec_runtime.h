// C API of a loaded model: a `.pte` that was checked and is then run by ExecuTorch's Module, its weights mapped (pages are
// faulted in when first touched). The file may come from anyone: a damaged one is an error, and so is one that is cut while
// it is in use, or whose weights give logits that are NaN.
// Python reaches it through ctypes, the runner binary links it; neither needs torch.
//
// A model has the method forward(tokens int64 [1, T], start_pos int64 [1]) -> float32 [1, V] or [1, 1, V], the logits of the
// last token, and forward_all -> float32 [1, T, V]; both share weights and the KV cache. One call runs at a time per model.
// Functions return 0, or -1 with the reason in moec_model_error(): one line, valid until the next call on that handle.
#ifndef MOEC_RUNTIME_H_
#define MOEC_RUNTIME_H_

#include <stddef.h>
#include <stdint.h>

#define MOEC_RUNTIME_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moec_model moec_model;

typedef struct moec_model_info {
  int64_t vocab_size;
  int64_t context;     // positions of the KV cache
  int64_t max_tokens;  // most tokens of one call
  int64_t bos_id;      // -1: none
  int64_t has_all;     // 1 if forward_all exists
  int64_t file_bytes;
  int64_t arena_bytes;  // activations and caches, reserved; pages count once they are touched
  int64_t threads;
  int64_t rewinds;  // 1 if a sequence can go back to any position: the program says that its states are appended
  int64_t exact;    // 1 if a token's logits are the same bit for bit alone and among others of a call
} moec_model_info;

// NULL only when memory is out; the model is open if moec_model_error() of the handle is empty. threads <= 0: one per fast
// core (moec_fast_cores of moec_kernel.h). The number of threads belongs to the process, not to the model: the latest call
// decides, except that the number stays while a model is open of which XNNPACK computes a part, since XNNPACK keeps the threads
// that it was loaded with. moec_model_info.threads says how many a model got. Opening a model that uses XNNPACK replaces
// ExecuTorch's thread pool if that has another number of threads: the application must not have programs of its own open
// through XNNPACK then.
MOEC_RUNTIME_API moec_model* moec_model_open(const char* path, int32_t threads);
MOEC_RUNTIME_API void moec_model_close(moec_model* model);
MOEC_RUNTIME_API const char* moec_model_error(const moec_model* model);

MOEC_RUNTIME_API int32_t moec_model_get_info(const moec_model* model, moec_model_info* info);
// Number of stop tokens; copies at most `capacity` of them.
MOEC_RUNTIME_API int64_t moec_model_eos_ids(const moec_model* model, int64_t* ids, int64_t capacity);

// Runs tokens ids[0..n) at positions start .. start+n-1; writes the logits of the last one (V floats), or with all != 0 of
// every one (n * V floats). logits may be NULL when `capacity` is 0: the tokens only enter the cache. `start` is not compared with
// what ran before, so that a bench can begin anywhere: where moec_model_info.rewinds is 0, states go on from where they are for
// every `start` but 0. Sessions refuse such a start.
MOEC_RUNTIME_API int32_t moec_model_forward(moec_model* model, const int64_t* ids, int64_t n, int64_t start, int32_t all,
                                            float* logits, int64_t capacity);

// ------------------------------------------------------------------------------------------------------------- sessions
//
// A sequence of tokens with caches of its own, over the weights and activations of its model. Any number of them may be open;
// calls of one model run one after another, whichever threads make them. The caches of the running session are where the
// program reads them: where the system can move pages (Linux since 5.7) switching sessions costs microseconds, elsewhere
// a copy of both. A session keeps its model open. When a call fails the session is as it was, except that a
// moec_session_forward that fails while it computes keeps only the tokens before `start`, and none where
// moec_model_info.rewinds is 0: states that cannot go back may have gone on; and that a session has none whose file was changed
// (moec_session_restore).
typedef struct moec_session moec_session;

// Never NULL, except when memory is out; open if moec_session_error() is empty. Calls of one that is not open fail.
MOEC_RUNTIME_API moec_session* moec_session_open(moec_model* model);
MOEC_RUNTIME_API void moec_session_close(moec_session* session);
MOEC_RUNTIME_API const char* moec_session_error(const moec_session* session);

// Tokens in the session; copies the first of them, at most `capacity`. Waits for a call that runs: not for a trace's callback.
MOEC_RUNTIME_API int64_t moec_session_tokens(const moec_session* session, int64_t* ids, int64_t capacity);

// As moec_model_forward, from any position up to the session's length: tokens from `start` on are replaced. A start before
// the end is an error unless moec_model_info.rewinds is 1 or start is 0.
MOEC_RUNTIME_API int32_t moec_session_forward(moec_session* session, const int64_t* ids, int64_t n, int64_t start, int32_t all,
                                              float* logits, int64_t capacity);
// Forgets the tokens from `position` on.
MOEC_RUNTIME_API int32_t moec_session_rewind(moec_session* session, int64_t position);
// Another session with the same tokens; as moec_session_open. Where the system can (Linux since 5.14), both use the same pages of
// their caches until one of them writes there; elsewhere, for short sessions and within a memory budget, they are copied.
MOEC_RUNTIME_API moec_session* moec_session_fork(moec_session* session);

// Writes tokens and caches to a file under a temporary name, then renames it; only a session file is replaced. `artifact`:
// identifies the model, at most 64 bytes; restoring compares it. The reason of a failure is about the file, without its name.
MOEC_RUNTIME_API int32_t moec_session_save(moec_session* session, const char* path, const char* artifact);
// Replaces tokens and caches by those of a file. The file is not trusted: sizes, ids and digests are checked before
// the session changes. Where the system can, the session then uses the pages of the file until it writes them: the file may be
// removed or replaced, but if it is written or cut in place, the session's next forward, fork or save fails, and it holds no tokens any
// more.
MOEC_RUNTIME_API int32_t moec_session_restore(moec_session* session, const char* path, const char* artifact);

// As moec_set_trace of moec_kernel.h, for callers that only loaded this library.
typedef void (*moec_model_trace_fn)(void* user, int64_t tokens, int64_t d, int64_t top_k, const float* x,
                                    const int32_t* indices, const float* weights, const float* y);
MOEC_RUNTIME_API void moec_model_trace(moec_model_trace_fn callback, void* user);

// The instruction set of the kernels, as moec_set_isa: 0, or -1 if this machine lacks it.
MOEC_RUNTIME_API int32_t moec_model_set_isa(const char* name);
MOEC_RUNTIME_API const char* moec_model_isa(void);

// on != 0: the calls of this model compute as moec_set_float_activations says. It has no effect on delegates.
MOEC_RUNTIME_API void moec_model_float_activations(moec_model* model, int32_t on);

// ------------------------------------------------------------------------------------------------------ a budget of memory
//
// Routed experts are read when tokens select them, into a cache that fills what `bytes` leaves after everything else in this
// process: libraries, the other weights, caches for the whole context, activations. Results are the same bit for bit.

typedef struct moec_expert_stats {
  int64_t budget;       // bytes; 0: no budget, and nothing below
  int64_t experts;      // routed experts of all layers
  int64_t slots;        // of them that may be in memory
  int64_t slot_bytes;
  int64_t hits;         // experts that a layer found in memory or being read ahead, and that it had to ask for
  int64_t misses;
  int64_t bytes_read;
  int64_t stalled_ns;   // sum over threads that waited for a read
  int64_t reading_ns;   // sum over threads that read
  int64_t preferred;    // experts that cache-aware selection takes to be in memory, at most; 0: it is off
  // time by the clock, however many did it at once
  int64_t waiting_ns;   // at least one thread waited for a read
  int64_t active_ns;    // at least one thread read; 1 - exposed_ns / active_ns is the share of it that computing hid
  int64_t exposed_ns;   // both at once
  int64_t ahead;        // experts that were read before their layer was routed, and those of them that it then selected
  int64_t ahead_used;
} moec_expert_stats;

// The same of one layer with routed experts. The time by the clock of two layers may be the same time.
typedef struct moec_expert_layer_stats {
  int64_t hits;
  int64_t misses;
  int64_t bytes_read;
  int64_t stalled_ns;
  int64_t reading_ns;
  int64_t waiting_ns;
  int64_t active_ns;
  int64_t exposed_ns;
  int64_t ahead;
  int64_t ahead_used;
} moec_expert_layer_stats;

// The expert is given up that was used longest ago; least often; least often of late (a use counts half after 32 tokens), which
// finds most on the routing of trained models (docs/memory-budget.md).
enum { MOEC_EVICT_LRU = 0, MOEC_EVICT_LFU = 1, MOEC_EVICT_LRFU = 2 };

// To be called before the first forward of a model. -1 if it has no routed experts, or if `bytes` is less than one token
// needs; the reason gives the least. readers: threads that read, 1 .. 64.
MOEC_RUNTIME_API int32_t moec_model_limit_memory(moec_model* model, int64_t bytes, int32_t eviction, int32_t readers);
// Cache-aware selection: where tokens are run one at a time, the router prefers experts that are in memory to others whose
// selection values are at most `share` (above 0, at most 1) times the token's range of them larger. The best expert is selected
// in any case, and weights stay those of the router. THE RESULTS OF SUCH CALLS THEN DEPEND ON THE CALLS BEFORE THEM, of all
// sessions of the model; they are the same on any number of threads as long as moec_expert_stats.preferred is. Calls of several
// tokens select as ever. After moec_model_limit_memory, before the first forward; moec_model_info.exact
// becomes 0. 0, or -1.
MOEC_RUNTIME_API int32_t moec_model_prefer_resident(moec_model* model, float share);
// While a layer of few tokens is computed, what the router of the layer behind it would select for the same input is read
// ahead, as long as nobody waits for the storage and most of it is then needed. Results do not depend on it. After
// moec_model_limit_memory, before the first forward, this switches it off. 0, or -1.
MOEC_RUNTIME_API int32_t moec_model_read_nothing_ahead(moec_model* model);
MOEC_RUNTIME_API int32_t moec_model_expert_stats(moec_model* model, moec_expert_stats* stats);
MOEC_RUNTIME_API int32_t moec_session_expert_stats(moec_session* session, moec_expert_stats* stats);  // of its model
// Number of layers with routed experts, in the order in which the program runs them (layers whose experts are equal count as
// one), or 0 without a budget; copies the counts of the first of them, at most `capacity`. -1 if `capacity` is negative, or above
// 0 with no `layers`.
MOEC_RUNTIME_API int64_t moec_model_expert_layer_stats(moec_model* model, moec_expert_layer_stats* layers, int64_t capacity);
MOEC_RUNTIME_API int64_t moec_session_expert_layer_stats(moec_session* session, moec_expert_layer_stats* layers, int64_t capacity);

// Largest resident set of the process so far, bytes; anonymous memory now, bytes (0 where the system does not tell).
MOEC_RUNTIME_API int64_t moec_peak_rss(void);
MOEC_RUNTIME_API int64_t moec_anonymous_rss(void);

// What is resident now, bytes; all zero where the system does not tell (it does on Linux and Android).
typedef struct moec_memory {
  int64_t resident;     // the whole process: anonymous + weights + libraries
  int64_t weights;      // pages of the model's file that this process has touched
  int64_t anonymous;    // heap, stacks and arenas
  int64_t libraries;    // pages of all other files
  int64_t caches;       // of `anonymous`: the arenas that keep their contents between calls (KV cache); pages of them that a
                        // session shares with a fork or a saved file are of `libraries`
  int64_t activations;  // of `anonymous`: the arena of activations
  int64_t file_cached;  // pages of the model's file in the system's page cache: what was touched, and what was read ahead
} moec_memory;

// model NULL: the process alone. 0, or -1 where the system does not tell.
MOEC_RUNTIME_API int32_t moec_model_memory(moec_model* model, moec_memory* memory);

// Whether this runtime would open the file, without loading anything of it: 0, or -1 and the reason, one line of at most
// `capacity` bytes with its end. Its operators are looked up, its numbers are not computed.
MOEC_RUNTIME_API int32_t moec_check_program(const char* path, char* reason, size_t capacity);
// 1 if this runtime has the operator, "aten::add.out".
MOEC_RUNTIME_API int32_t moec_has_operator(const char* name);

// Pages of a file in the page cache, bytes (-1: unknown); asks the system to forget them (0, or -1 if it did not agree; it
// keeps pages that a process has mapped).
MOEC_RUNTIME_API int64_t moec_cached_bytes(const char* path);
MOEC_RUNTIME_API int32_t moec_forget_cached(const char* path);

#ifdef __cplusplus
}
#endif

#endif  // MOEC_RUNTIME_H_
