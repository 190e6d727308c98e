// The C API of the moec CPU kernels: what Python reaches through ctypes and what the ExecuTorch registration wraps.
//
// Rules that hold for every function here
// - Returns MOEC_OK (0) or an error code; the message of the last error on the calling thread is moec_last_error().
//   Nothing aborts, throws or prints. Every size, index and buffer length is checked before a byte is touched.
// - A buffer is a pointer and its length in bytes. {NULL, 0} stands for an optional buffer that is absent. Buffers of
//   floats and integers must be aligned to their element, which is checked; packed weights need no alignment (64 bytes is
//   fastest), except that packed f32 is floats.
// - An output may not overlap an input, unless its function says so.
// - Tensors are contiguous and row-major. Sizes are elements unless the name ends in `bytes`.
// - Results do not depend on the number of threads, on how tokens are batched, or on the instruction set: integer and
//   float sums are taken in one fixed order everywhere.
// - Safe to call from several threads at once, except the moec_set_* functions.
//
// Letters: T tokens, K reduction (input features), N output features, E experts, D model width, F expert width,
// S shared expert width, G groups.
#ifndef MOEC_KERNEL_H_
#define MOEC_KERNEL_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define MOEC_API __declspec(dllexport)
#else
#define MOEC_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// ---------------------------------------------------------------------------------------------------------------- errors

enum {
  MOEC_OK = 0,
  MOEC_INVALID_ARGUMENT = 1,  // a size, index, format or pointer that makes no sense
  MOEC_WRONG_SIZE = 2,        // a buffer's length is not the length that the sizes ask for
  MOEC_OUT_OF_MEMORY = 3,     // scratch could not be allocated
  MOEC_UNSUPPORTED = 4,       // an instruction set this machine or this build does not have
  MOEC_UNREADABLE = 5,        // an expert that its moec_expert_source could not read
};

// One line; valid until the next failing call on this thread. Empty when no call has failed.
MOEC_API const char* moec_last_error(void);

// Changes when a signature, a packed layout or the MoE config table changes.
#define MOEC_ABI_VERSION 5
MOEC_API int32_t moec_abi_version(void);

typedef struct moec_in {
  const void* data;
  uint64_t bytes;
} moec_in;

typedef struct moec_out {
  void* data;
  uint64_t bytes;
} moec_out;

// --------------------------------------------------------------------------------------------------------------- formats
//
// int32 format = kind | axis << 4 | int8_activations << 5 | f32_scales << 6 | block_activations << 7 | group_size << 8
//   kind              0 f32 (every other field 0), 1 int4, 2 int8, 3 iq4_nl, 4 fp4, 5 nl3. A weight is its scale times: of
//                     int4 and int8 the code; of the others, whose codes have 4 bits (nl3: 3) and no sign, level[code]:
//                       iq4_nl  -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113   (as in GGUF)
//                       fp4     0 1 2 3 4 6 8 12 0 -1 -2 -3 -4 -6 -8 -12                    (twice the values of E2M1)
//                       nl3     -16 -10 -6 -2 1 4 8 13
//   axis              0: groups along the input  (codes [N, K],   scales [N, K / group_size])
//                     1: groups along the output (codes [K, N],   scales [K, N / group_size])
//   int8_activations  0: fp32 arithmetic on dequantized weights; 1: activations rounded to INT8 (compiler/quant.py)
//   f32_scales        scales are stored as f32 instead of f16
//   block_activations with int8_activations: a scale for each 32 inputs of a token; without it one for the whole token
//   group_size        a positive multiple of 32; it must divide K (axis 0) or N (axis 1)

enum { MOEC_F32 = 0, MOEC_INT4 = 1, MOEC_INT8 = 2, MOEC_IQ4_NL = 3, MOEC_FP4 = 4, MOEC_NL3 = 5 };
enum {
  MOEC_AXIS_OUT = 1 << 4,
  MOEC_INT8_ACTIVATIONS = 1 << 5,
  MOEC_F32_SCALES = 1 << 6,
  MOEC_BLOCK_ACTIVATIONS = 1 << 7,
  MOEC_GROUP_SHIFT = 8,
};

// --------------------------------------------------------------------------------------------------------------- packing
//
// Layout of one packed matrix: codes, then scales; no header.
//   codes   ceil(N/16) blocks of 16 rows; a block holds, for each 8 inputs (K padded to a multiple of 8), 16 rows x 8 codes:
//           int4: 64 bytes, byte 4*row + i = (q[row, 8j+i] + 8) | (q[row, 8j+4+i] + 8) << 4        (i in 0..3)
//           iq4_nl, fp4: 64 bytes, byte 4*row + i = code[row, 8j+i] | code[row, 8j+4+i] << 4         (i in 0..3)
//           nl3: 48 bytes. With b = 4*row + i and h = 0 for code[row, 8j+i], 1 for code[row, 8j+4+i]: the lower two bits of
//                the code are bits 4h + 2*(b/32) and the next of byte b%32, the third is bit 4h + b/16 of byte 32 + b%16
//           int8: 128 bytes, byte 64*h + 4*row + i = q[row, 8j + 4h + i]                             (h in 0..1)
//   scales  axis 0: [ceil(N/16), K/group_size, 16];  axis 1: [N/group_size, K padded to a multiple of 8]
//   f32     [N, K] row-major, no padding.
// A stack of E experts is E such matrices one after the other.

// *bytes = length of ONE packed matrix of N outputs and K inputs. The bits of activations do not matter.
MOEC_API int32_t moec_packed_bytes(int64_t n, int64_t k, int32_t format, uint64_t* bytes);

// Pack `count` stacked matrices. codes: int4 uint8 [count, N, K/2] (axis 0) or [count, K, N/2] (axis 1), element 2i in the
// low nibble, two's complement; iq4_nl, fp4 and nl3 (0 to 7; a fourth bit is ignored) likewise, the nibble being the code;
// int8 int8 [count, N, K] or [count, K, N];
// f32 float [count, N, K] (axis 0) or, with MOEC_AXIS_OUT set *in this call only*, [count, K, N], which is transposed. scales:
// f16 (f32 with MOEC_F32_SCALES) [count, N, K/g] or [count, K, N/g]; absent for f32. packed: exactly
// count * moec_packed_bytes.
MOEC_API int32_t moec_pack(int64_t count, int64_t n, int64_t k, int32_t format, moec_in codes, moec_in scales,
                           moec_out packed);

// The inverse, for tests and inspection: the same arguments, `codes` and `scales` written.
MOEC_API int32_t moec_unpack(int64_t count, int64_t n, int64_t k, int32_t format, moec_in packed, moec_out codes,
                             moec_out scales);

// ------------------------------------------------------------------------------------------------------------- operators

// y [T, N] f32 = x [T, K] f32 @ w^T (+ bias [N] f32, may be absent). w: one packed matrix.
MOEC_API int32_t moec_linear(int64_t t, int64_t n, int64_t k, int32_t format, moec_in x, moec_in w, moec_in bias,
                             moec_out y);

// y [T, F] f32 = activation(gate) * up, where gate and up are the first and the second F columns of x [T, K] f32 @ w^T.
// w: one packed matrix of N = 2F outputs; F is a multiple of 16, and of the group size with groups along the output.
// activation: as MOEC_CONFIG_ACTIVATION counts them (moe_config.h).
MOEC_API int32_t moec_gated_linear(int64_t t, int64_t f, int64_t k, int32_t format, int32_t activation, moec_in x, moec_in w,
                                   moec_out y);

// y [T, H, N] f32: y[t, h] = w_h x[t, h] of x [T, H, K] f32. w: H packed matrices of N outputs and K inputs.
MOEC_API int32_t moec_head_linear(int64_t t, int64_t heads, int64_t n, int64_t k, int32_t format, moec_in x, moec_in w,
                                  moec_out y);

// y [T, K] f32 = row ids[t] (int64 [T], 0 <= id < N) of the packed matrix w, dequantized.
MOEC_API int32_t moec_embedding(int64_t t, int64_t n, int64_t k, int32_t format, moec_in ids, moec_in w, moec_out y);

// One whole mixture-of-experts block. `config` and `params` are the tables of runtime/moe_config.py and moe_config.h.
typedef struct moec_moe_args {
  int64_t tokens;          // T, may be 0
  const int64_t* config;
  uint64_t config_length;  // elements; must be MOEC_MOE_CONFIG_LENGTH
  const double* params;
  uint64_t params_length;  // elements; must be MOEC_MOE_PARAMS_LENGTH, or one less without a threshold
  moec_in x;               // f32 [T, D], what the experts see
  moec_in router_input;    // f32 [T, D], what the router sees (may be the same buffer as x)
  moec_in router_weight;   // f32 [E, D]
  moec_in router_bias;     // f32 [E] or absent; part of the logits
  moec_in selection_bias;  // f32 [E] or absent; shifts the selection only
  moec_in w13;             // E packed matrices: N = 2F (F when not gated), K = D
  moec_in b13;             // f32 [E, N] or absent, in the row order of w13
  moec_in w2;              // E packed matrices: N = D, K = F
  moec_in b2;              // f32 [E, D] or absent
  moec_in shared_w13;      // one packed matrix N = 2S (gate rows first), K = D; absent when S = 0
  moec_in shared_w2;       // one packed matrix N = D, K = S
  moec_in shared_gate;     // f32 [D] or absent: shared output times sigmoid(x . gate)
  moec_out y;              // f32 [T, D]; may not overlap an input
  moec_out indices;        // optional: int32 [T, top_k], highest selection score first
  moec_out weights;        // optional: f32 [T, top_k], as they multiply the experts' output (or input)
} moec_moe_args;

MOEC_API int32_t moec_moe(const moec_moe_args* args);

// The selection of such a block alone: indices as in moec_moe_args, of router_input f32 [T, D] and the router's parts there.
// Of the config, which is checked whole, only what selects counts.
MOEC_API int32_t moec_select_experts(int64_t tokens, const int64_t* config, uint64_t config_length, moec_in router_input,
                                     moec_in router_weight, moec_in router_bias, moec_in selection_bias, moec_out indices);

// ---------------------------------------------------------------------------------------------- experts outside of memory
//
// A source lends the packed matrices of routed experts to moec_moe while it runs. The memory that w13 and w2 of the call
// point to is then never read: the addresses only identify the layer.

typedef struct moec_expert_source {
  void* user;
  // Called once per chunk of tokens, when its routing is known: experts[0 .. count) are needed, each for uses[i] calls of
  // `acquire`. The source may reorder `experts`, which are then computed in that order; no result changes. scratch_bytes:
  // working memory of the call. Returns 1 to lend; 0 if w13 is not of this source, and memory is read; -1 on failure.
  int32_t (*begin)(void* user, const void* w13, int32_t* experts, const int32_t* uses, int64_t count, uint64_t scratch_bytes);
  // Called from any thread, which holds one expert at a time: waits for matrix w13 (which 0) or w2 (which 1) and returns it,
  // or NULL if it cannot be read. Valid until `release` was called once for each successful `acquire`.
  const void* (*acquire)(void* user, int32_t expert, int32_t which);
  void (*release)(void* user, int32_t expert);
  void (*end)(void* user);  // after a `begin` that returned 1
  // NULL, or asked before a call of one token is routed, on the calling thread: which of the layer's `experts` experts the
  // router should prefer, flags[e] 1 or 0, valid until the call ends. Returns how much, from 0 (not at all; flags is not read)
  // to 1: to what a preferred expert is selected by, so many times the difference between the token's largest and its least
  // such value is added. The expert of the largest value is selected in any case. Weights are those of the router.
  float (*preferred)(void* user, const void* w13, int64_t experts, const uint8_t** flags);
  // NULL, or called on the calling thread after a `begin` of few tokens that returned 1, before any expert is acquired: what
  // the router was given, [tokens, d], valid until this returns. The source may read ahead of the layers that follow.
  void (*routed)(void* user, int64_t tokens, int64_t d, const float* router_input);
} moec_expert_source;

// For operators that this thread calls from now on; NULL: none. The source must live as long.
MOEC_API void moec_use_expert_source(const moec_expert_source* source);

// ----------------------------------------------------------------------------------------------------------------- trace

// Called after every moec_moe, on the calling thread, with y already written. Pointers are valid during the call only.
typedef void (*moec_trace_fn)(void* user, int64_t tokens, int64_t d, int64_t top_k, const float* x, const int32_t* indices,
                              const float* weights, const float* y);
MOEC_API void moec_set_trace(moec_trace_fn callback, void* user);  // NULL: off, at no cost

// ----------------------------------------------------------------------------------------------------- instruction set

// Names: those of instruction_sets.cmake. "auto" or NULL: what the environment variable MOEC_ISA names, or without it the best
// that this machine has. A name that this machine cannot serve is MOEC_UNSUPPORTED and changes nothing; as MOEC_ISA it is the
// error of every operator, and moec_get_isa returns "".
MOEC_API int32_t moec_set_isa(const char* name);
MOEC_API const char* moec_get_isa(void);
// Comma-separated names that moec_set_isa would accept here, best first.
MOEC_API const char* moec_available_isas(void);

// ------------------------------------------------------------------------------------------------------ float activations

// on != 0: operators that this thread calls from now on compute as if no format had MOEC_INT8_ACTIVATIONS: fp32 arithmetic on
// the same codes and scales. Rounding makes two right runs of a deep model drift apart; without it a whole run can be
// compared closely. The cache of attention stays as it is.
MOEC_API void moec_set_float_activations(int32_t on);

// --------------------------------------------------------------------------------------------------------------- threads

// Runs task(context, i) once for every i in [0, n), in any order, on any threads, and returns when all are done. n is at
// most the thread count that was announced. Running them one after the other on the caller is correct, too.
typedef void (*moec_task_fn)(void* context, int32_t i);
typedef void (*moec_parallel_fn)(void* user, int32_t n, moec_task_fn task, void* context);

// Replace the thread pool (the ExecuTorch registration does, once, when it is loaded). `threads(user)` is asked at the start
// of each operator. NULL, NULL: back to the library's own pool.
MOEC_API void moec_set_parallel(moec_parallel_fn run, int32_t (*threads)(void* user), void* user);

// Threads of the library's own pool, 1 <= n <= 256 (default 1: everything on the caller). An operator that runs meanwhile is
// waited for; MOEC_OUT_OF_MEMORY, and one thread from then on, where the system allows no more. A child of fork() gets a pool
// of its own with as many threads when it first needs one.
MOEC_API int32_t moec_set_threads(int32_t n);
// Cores worth a thread each: those this process may use, without the slow ones of a processor that has cores of several
// speeds (less than half of the fastest core's capacity, as the system states it). At least 1, at most 256.
MOEC_API int32_t moec_fast_cores(void);
// Threads that the next operator will use, whichever pool serves it.
MOEC_API int32_t moec_get_threads(void);

// Free the scratch memory that operators keep for the calling thread (it grows to what the largest call needed).
MOEC_API void moec_release_scratch(void);

#ifdef __cplusplus
}
#endif

#endif  // MOEC_KERNEL_H_
