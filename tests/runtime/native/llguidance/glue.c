// runtime/include/moec_llguidance.h as an application compiles it; functions that a test calls from Python.
#include "llguidance.h"
#include "moec.h"
#include "moec_llguidance.h"

void* glue_tokenizer(int64_t artifact, const char* json, char* error, size_t size) {
  return moec_llguidance_tokenizer(artifact, json, error, size);
}
void* glue_matcher(void* tokenizer, const char* kind, const char* text, char* error, size_t size) {
  return moec_llguidance_matcher((struct LlgTokenizer*)tokenizer, kind, text, error, size);
}
moec_app_constraint glue_constraint(void* matcher) { return moec_llguidance_constraint((struct LlgMatcher*)matcher); }
void glue_free(void* matcher, void* tokenizer) {
  llg_free_matcher((struct LlgMatcher*)matcher);
  llg_free_tokenizer((struct LlgTokenizer*)tokenizer);
}
