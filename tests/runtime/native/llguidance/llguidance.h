// The part of llguidance's C interface that runtime/include/moec_llguidance.h uses, as its version 1.x has it: the test has the
// library from a Python wheel, which brings no header.
#ifndef LLGUIDANCE_H
#define LLGUIDANCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct LlgMatcher LlgMatcher;
typedef struct LlgTokenizer LlgTokenizer;
typedef size_t (*LlgTokenizeFn)(const void*, const uint8_t*, size_t, uint32_t*, size_t);

typedef struct LlgParserLimits {
  size_t max_items_in_row;
  uint64_t initial_lexer_fuel, step_lexer_fuel;
  size_t step_max_items, max_lexer_states, max_grammar_size;
  bool precompute_large_lexemes, verbose_errors;
} LlgParserLimits;

typedef struct LlgConstraintInit {
  const struct LlgTokenizer* tokenizer;
  uint32_t log_buffer_level, log_stderr_level;
  bool ff_tokens_ok, backtrack_ok;
  struct LlgParserLimits limits;
} LlgConstraintInit;

typedef struct LlgTokenizerInitV2 {
  size_t struct_size;
  uint32_t vocab_size, tok_eos;
  const uint32_t* token_lens;
  const uint8_t* token_bytes;
  const char* tokenizer_json;
  bool tokenize_assumes_string;
  LlgTokenizeFn tokenize_fn;
  bool use_approximate_greedy_tokenize_fn;
  const void* tokenize_user_data;
  const char* const* slices;
  const uint32_t* tok_eos_extra;
  uint32_t tok_eos_extra_count;
} LlgTokenizerInitV2;

void llg_constraint_init_set_defaults(struct LlgConstraintInit* init, const struct LlgTokenizer* tokenizer);
struct LlgTokenizer* llg_new_tokenizer_v2(const struct LlgTokenizerInitV2* init, char* error, size_t size);
void llg_free_tokenizer(struct LlgTokenizer* tokenizer);
struct LlgMatcher* llg_new_matcher(const struct LlgConstraintInit* init, const char* kind, const char* data);
int32_t llg_validate_grammar(const struct LlgConstraintInit* init, const char* kind, const char* data, char* message, size_t size);
int32_t llg_matcher_compute_mask_into(struct LlgMatcher* matcher, uint32_t* mask, size_t bytes);
int32_t llg_matcher_consume_token(struct LlgMatcher* matcher, uint32_t token);
const char* llg_matcher_get_error(struct LlgMatcher* matcher);
bool llg_matcher_is_accepting(struct LlgMatcher* matcher);
bool llg_matcher_is_stopped(const struct LlgMatcher* matcher);
void llg_free_matcher(struct LlgMatcher* matcher);

#ifdef __cplusplus
}
#endif

#endif  // LLGUIDANCE_H
