// Structured output for moec.h by the library llguidance, 1.x (https://github.com/guidance-ai/llguidance): JSON Schema, regular
// expressions, grammars. The application links llguidance (its crate builds a C library) and includes its header first:
//
//   #include "llguidance.h"
//   #include "moec.h"
//   #include "moec_llguidance.h"
//
//   LlgTokenizer* tokens = moec_llguidance_tokenizer(model, tokenizer_json, error, sizeof error);   // once per artifact
//   LlgMatcher* matcher = moec_llguidance_matcher(tokens, "json_schema", schema, error, sizeof error);  // once per answer
//   moec_app_constraint constraint = moec_llguidance_constraint(matcher);
//   options.constraint = &constraint;
//   ... generate ...; llg_free_matcher(matcher); llg_free_tokenizer(tokens);
#ifndef MOEC_LLGUIDANCE_H_
#define MOEC_LLGUIDANCE_H_

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moec.h"

#ifdef __cplusplus
extern "C" {
#endif

static size_t moec_llguidance_tokenize(const void* artifact, const uint8_t* bytes, size_t count, uint32_t* ids, size_t capacity) {
  const int64_t found = moec_app_tokenize((int64_t)(intptr_t)artifact, (const char*)bytes, (int64_t)count,
                                          MOEC_APP_PLAIN | MOEC_APP_AS_TEXT, (int32_t*)ids, (int64_t)capacity);
  return found < 0 ? 0 : (size_t)found;
}

// The vocabulary of an artifact. tokenizer_json: the content of the tokenizer.json in its folder. NULL and the reason in `error`, of
// `size` bytes. The artifact stays open until llg_free_tokenizer.
static inline struct LlgTokenizer* moec_llguidance_tokenizer(int64_t artifact, const char* tokenizer_json, char* error, size_t size) {
  moec_app_info info;
  int32_t stops[64];
  struct LlgTokenizerInitV2 init;
  memset(&info, 0, sizeof info);
  info.size = sizeof info;
  const int64_t count = moec_app_stop_tokens(artifact, stops, 64);
  if (count < 0 || moec_app_describe(artifact, &info) != 0) {
    snprintf(error, size, "%s", moec_app_error());
    return NULL;
  }
  if (count < 1 || count > 64) {
    snprintf(error, size, "the model has no stop tokens, or more than 64");
    return NULL;
  }
  memset(&init, 0, sizeof init);
  init.struct_size = sizeof init;
  init.vocab_size = (uint32_t)info.vocabulary;
  init.tok_eos = (uint32_t)stops[0];
  init.tok_eos_extra = (const uint32_t*)stops + 1;
  init.tok_eos_extra_count = (uint32_t)(count - 1);
  init.tokenizer_json = tokenizer_json;
  init.tokenize_assumes_string = true;  // its function gets UTF-8 only
  init.tokenize_fn = moec_llguidance_tokenize;
  init.tokenize_user_data = (const void*)(intptr_t)artifact;
  return llg_new_tokenizer_v2(&init, error, size);
}

// What one answer may be. kind: "json_schema", "regex" or "lark". JSON is written on one line, with a space after `:` and `,`, unless
// the schema has its own "x-guidance": a small model that may choose its white space can go on writing it without end. NULL and the
// reason in `error`; free it with llg_free_matcher.
static inline struct LlgMatcher* moec_llguidance_matcher(const struct LlgTokenizer* tokenizer, const char* kind, const char* text,
                                                         char* error, size_t size) {
  static const char spacing[] = "{\"x-guidance\": {\"whitespace_flexible\": false, \"item_separator\": \", \", \"key_separator\": \": \"}";
  struct LlgConstraintInit init;
  char* whole = NULL;
  if (!tokenizer || !kind || !text) {
    snprintf(error, size, "no tokenizer, kind or text");
    return NULL;
  }
  llg_constraint_init_set_defaults(&init, tokenizer);
  init.log_stderr_level = 0;
  if (strcmp(kind, "json_schema") == 0) {
    const char* rest = text + strspn(text, " \t\r\n");
    if (*rest == '{') {  // the options of llguidance are a key of the schema; of two, the later one counts
      ++rest;
      const char* comma = rest[strspn(rest, " \t\r\n")] == '}' ? "" : ", ";
      const size_t bytes = sizeof spacing + strlen(comma) + strlen(rest);
      whole = (char*)malloc(bytes);
      if (!whole) {
        snprintf(error, size, "out of memory");
        return NULL;
      }
      snprintf(whole, bytes, "%s%s%s", spacing, comma, rest);
    }
  }
  struct LlgMatcher* matcher = llg_new_matcher(&init, kind, whole ? whole : text);
  // A warning says what cannot be enforced: an answer that only seems to follow its schema is no use.
  char warning[512] = "";
  const char* fault = llg_matcher_get_error(matcher);
  if (!fault && llg_validate_grammar(&init, kind, whole ? whole : text, warning, sizeof warning) != 0) fault = warning;
  free(whole);
  if (!fault) return matcher;
  snprintf(error, size, "%s", fault);
  llg_free_matcher(matcher);
  return NULL;
}

static int32_t moec_llguidance_allowed(void* matcher, uint32_t* mask, int64_t words) {
  return llg_matcher_compute_mask_into((struct LlgMatcher*)matcher, mask, (size_t)words * sizeof *mask);
}

static int32_t moec_llguidance_take(void* user, int32_t token) {
  struct LlgMatcher* matcher = (struct LlgMatcher*)user;
  if (llg_matcher_consume_token(matcher, (uint32_t)token) != 0) return -1;
  return llg_matcher_is_stopped(matcher) && llg_matcher_is_accepting(matcher) ? 1 : 0;
}

static const char* moec_llguidance_error(void* matcher) { return llg_matcher_get_error((struct LlgMatcher*)matcher); }

// For moec_app_options.constraint of one generation.
static inline moec_app_constraint moec_llguidance_constraint(struct LlgMatcher* matcher) {
  moec_app_constraint found;
  memset(&found, 0, sizeof found);
  found.size = sizeof found;
  found.user = matcher;
  found.allowed = moec_llguidance_allowed;
  found.take = moec_llguidance_take;
  found.error = moec_llguidance_error;
  return found;
}

#ifdef __cplusplus
}
#endif

#endif  // MOEC_LLGUIDANCE_H_
