// moec for applications: text in, text out, from a folder that `moec compile --target xnnpack` wrote. One header and one
// library; no Python, no torch. docs/app.md has an example.
//
// Artifacts, sessions and generations are ids: numbers, none of which is used twice. A closed id, or a number that is no id,
// is an error and not a crash. Functions return -1 where they fail; moec_app_error() then says why, in one line.
// Any function may be called from any thread: calls on one session run one after another, and those of all sessions of an
// artifact share its weights and take turns. A text that is returned by pointer belongs to its generation or splitter until the
// next call for that, so one thread at a time reads an answer. No C++ exception leaves the library; no file and no text makes it
// abort.
#ifndef MOEC_H_
#define MOEC_H_

#include <stddef.h>
#include <stdint.h>

#define MOEC_APP_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// Why the last call of this thread failed; empty if it did not. Valid until the next call of this thread.
MOEC_APP_API const char* moec_app_error(void);

// Structures begin with their size, so that one of another version of this header is an error instead of misread.
typedef struct moec_app_open_options {
  uint32_t size;         // sizeof(moec_app_open_options)
  int32_t threads;       // 0: one per fast core
  int64_t memory_bytes;  // limit for the process, in which routed experts are read as tokens select them; 0: none
} moec_app_open_options;

// Opens an artifact's folder: its program is checked and mapped, its tokenizer tested with the texts and ids in text.moec.
// options NULL: the defaults. Returns the id, above 0, or -1.
MOEC_APP_API int64_t moec_app_open(const char* folder, const moec_app_open_options* options);
// Closes what an id names; 0 or -1. It stays open for what uses it: a session its artifact, a generation its session.
MOEC_APP_API int32_t moec_app_close(int64_t id);

typedef struct moec_app_info {
  uint32_t size;      // sizeof(moec_app_info)
  int32_t has_chat;   // 1: conversations can be rendered
  int64_t vocabulary, context, threads;
  int32_t rewinds;     // 1: sessions go back to any position; 0: to their beginning only
  int32_t has_calls;   // 1: the model's way to write calls of tools is known
  int32_t thinks;      // 1: the model's chat template knows thinking segments
  int32_t speculates;  // 1: a token has the same logits, bit for bit, in a call of several, so that drafts can be checked
  int32_t has_tools;   // 1: conversations with tools can be rendered
  int32_t reserved;
} moec_app_info;
MOEC_APP_API int32_t moec_app_describe(int64_t artifact, moec_app_info* info);
// Writes at most `capacity` of the tokens that end an answer. Returns how many there are.
MOEC_APP_API int64_t moec_app_stop_tokens(int64_t artifact, int32_t* ids, int64_t capacity);

// ---------------------------------------------------------------------------------------------------------------- text

enum {
  MOEC_APP_PLAIN = 1,    // tokenize: without the tokens that the tokenizer puts around every text (BOS)
  MOEC_APP_AS_TEXT = 2,  // tokenize: special tokens that are spelled out in the text are ordinary text
  MOEC_APP_SPECIAL = 4,  // detokenize: special tokens are written out
  MOEC_APP_SEGMENTS = 8,  // generate, splitter: thinking is told from text
  MOEC_APP_TOOLS = 16,    // generate, splitter: so are calls of tools
};

// Writes at most `capacity` of the ids of a text in UTF-8, of `bytes` bytes (-1: up to a zero byte). Returns how many there are.
MOEC_APP_API int64_t moec_app_tokenize(int64_t artifact, const char* text, int64_t bytes, int32_t flags, int32_t* ids,
                                       int64_t capacity);
// Writes at most `capacity` bytes of the text of ids, in UTF-8, without a zero byte at the end. Returns how many bytes the text
// has. Bytes that are not UTF-8 become U+FFFD.
MOEC_APP_API int64_t moec_app_detokenize(int64_t artifact, const int32_t* ids, int64_t count, int32_t flags, char* text,
                                         int64_t capacity);

typedef struct moec_app_message {
  const char* role;     // "system", which comes first, "user" or "assistant"
  const char* content;  // UTF-8
} moec_app_message;

// Ids of a conversation by the model's chat template, up to where the answer begins; returns as moec_app_tokenize. An error if
// the template has no regular form (moec_app_info.has_chat), or renders one of the contents differently.
MOEC_APP_API int64_t moec_app_chat(int64_t artifact, const moec_app_message* messages, int64_t count, int32_t* ids,
                                   int64_t capacity);

typedef struct moec_app_call {
  const char* name;
  const char* arguments;  // JSON of an object, as moec_app_segment has it; NULL or empty: none
} moec_app_call;

// A turn of a conversation with tools. The template decides whether the content of a turn with calls is shown.
typedef struct moec_app_turn {
  uint32_t size;      // sizeof(moec_app_turn)
  int32_t reserved;   // 0
  const char* role;   // "system", which comes first, "user", "assistant", or "tool": what a tool answered, after the turn that
                      // called it, a turn for each call in their order
  const char* content;         // UTF-8; may be NULL where there are calls
  const moec_app_call* calls;  // of a turn of the assistant: at most 1000
  int64_t call_count;
} moec_app_turn;

// As moec_app_chat, with tools that the answer may call: definitions in OpenAI's form as JSON, [{"type": "function", "function":
// {"name": ..., "description": ..., "parameters": {...}}}, ...], at most 1000 and 1 MB. NULL: none, and then no turn calls one. Give
// the same tools with every turn. An error if the template has no regular form with tools (moec_app_info.has_tools): it says why.
MOEC_APP_API int64_t moec_app_chat_with_tools(int64_t artifact, const char* tools, const moec_app_turn* turns, int64_t count,
                                              int32_t* ids, int64_t capacity);

// As moec_app_chat_with_tools, for a conversation that may be longer than the context: until the ids and `room` tokens of an answer
// fit (-1: 64, or a quarter of a context that is shorter than 256), the oldest question is left out with everything up to the next
// one: its answer, calls and what tools said. The system prompt stays, as do the last question and what follows it: if they leave less
// than `room` but something, that is what the answer gets; if nothing, it is an error. `dropped`, which may be NULL, becomes the number
// of turns that were left out, all of them in a row that begins with the first question.
MOEC_APP_API int64_t moec_app_fitting_chat(int64_t artifact, const char* tools, const moec_app_turn* turns, int64_t count,
                                           int64_t room, int32_t* ids, int64_t capacity, int64_t* dropped);

// ------------------------------------------------------------------------------------------------------------ sessions

// A session: tokens with their caches, over the weights of an artifact. Returns as moec_app_open.
MOEC_APP_API int64_t moec_app_session(int64_t artifact);
// Another session with the same tokens.
MOEC_APP_API int64_t moec_app_fork(int64_t session);
// Writes at most `capacity` of the tokens that it holds. Returns how many it holds.
MOEC_APP_API int64_t moec_app_tokens(int64_t session, int32_t* ids, int64_t capacity);
// Forgets the tokens from `position` on.
MOEC_APP_API int32_t moec_app_rewind(int64_t session, int64_t position);
// Writes a session to a file, and reads it back. A damaged file, or one of another artifact, leaves the session as it was. On Linux and
// Android a restored session goes on using the file, as does one that a prefix was found for: it may be removed or replaced, but where
// something writes into it, or cuts it, the session's next use is an error and the session has lost its tokens: generate again.
MOEC_APP_API int32_t moec_app_save(int64_t session, const char* path);
MOEC_APP_API int32_t moec_app_restore(int64_t session, const char* path);

// ------------------------------------------------------------------------------------------------------------ prefixes
//
// Beginnings of prompts that are computed once for an installation: sessions saved in a folder of the application. Where
// moec_app_generate finds one that is longer than what its session holds of the prompt, it restores the session from it, with the same
// bits; moec_app_stats.reused_tokens tells. A file that is damaged, or holds something else than its name says, is removed; one that
// cannot be used for another reason stays. The tokens are then computed, and moec_app_prefix_warning has the reason. Several artifacts
// and processes may share a folder.

// Where the prefixes of an artifact's sessions are, from the next moec_app_generate on; created if it is missing. NULL: nowhere.
MOEC_APP_API int32_t moec_app_prefix_folder(int64_t artifact, const char* folder);
// Keeps the tokens of a session, unless they are kept already. name: 1 to 64 of A-Z, a-z, 0-9, '.', '_', '-'; a name has one prefix,
// and other tokens replace it. NULL: no name; of such prefixes the 64 that were used last stay, while those with names stay until
// they are forgotten. -1 if they cannot be saved.
MOEC_APP_API int32_t moec_app_keep_prefix(int64_t session, const char* name);
// 1, 0 if no prefix has this name, or -1.
MOEC_APP_API int32_t moec_app_forget_prefix(int64_t artifact, const char* name);
// How many tokens the prefix of a name has; 0 if there is none. Which ones is not told: moec_app_generate finds a prefix by its tokens.
MOEC_APP_API int64_t moec_app_prefix_tokens(int64_t artifact, const char* name);
// Writes why a prefix was not used, the latest one; as moec_app_detokenize. Empty if all were.
MOEC_APP_API int64_t moec_app_prefix_warning(int64_t artifact, char* text, int64_t capacity);
// Ids that every conversation with this system prompt and these tools begins with, both as for moec_app_chat_with_tools (NULL: none);
// returns as moec_app_tokenize. To compute them once for an installation, generate for them with max_new_tokens 0, which restores them
// where they are known, and keep the session under a name. 0 ids where conversations have nothing in common.
MOEC_APP_API int64_t moec_app_system_prompt(int64_t artifact, const char* tools, const char* system, int32_t* ids, int64_t capacity);

// ---------------------------------------------------------------------------------------------------------- generation

typedef struct moec_app_bias {
  int32_t token;
  int32_t reserved;
  double bias;  // added to the token's logit, -1e6 to 1e6; -INFINITY rules it out
} moec_app_bias;

// The tokens that may come next: structured output, by a library that computes masks (moec_llguidance.h does with llguidance) or
// by code of the application. The functions are called by the thread that runs the generation, which holds the session: they use
// neither the session nor its generations. `user` stays valid until the generation is over.
typedef struct moec_app_constraint {
  uint32_t size;  // sizeof(moec_app_constraint)
  int32_t reserved;
  void* user;
  // Sets bit t % 32 of mask[t / 32] for every token t that may come next, a stop token where the text may end; all of the `words`
  // numbers are zero before. Returns 0, or -1 where it fails.
  int32_t (*allowed)(void* user, uint32_t* mask, int64_t words);
  // A token was taken, one of those allowed and no stop token. Returns 0; 1 if the text is complete and nothing can follow; -1.
  int32_t (*take)(void* user, int32_t token);
  const char* (*error)(void* user);  // why the last call of one of them failed; may be NULL
} moec_app_constraint;

enum {
  MOEC_APP_STOP = 0,  // a prompt that is longer than the context is an error; an answer ends with MOEC_APP_CONTEXT
  // The first `keep_first` tokens stay, and of the other context - keep_first tokens that fit, the oldest half (rounded up) is dropped.
  // Those that stay are computed anew, with the bits that they have in a new session, and the answer goes on. A prompt that is
  // longer than the context is shortened in the same way, as often as needed. Penalties count dropped tokens, too. Only
  // max_new_tokens, a stop, a constraint or moec_app_cancel ends such an answer.
  MOEC_APP_DROP_OLDEST = 1,
};

// As docs/assistant.md says; the same seed gives the same text as in Python.
typedef struct moec_app_options {
  uint32_t size;  // sizeof(moec_app_options)
  int32_t top_k;  // 0: all
  double temperature, top_p, min_p;  // temperature 0: the likeliest token
  double repeat_penalty, presence_penalty, frequency_penalty;
  uint64_t seed;
  int64_t max_new_tokens;  // -1: to the end of the context
  const char* const* stops;  // texts that end the answer, which are not shown
  int64_t stop_count;        // at most 1000, none of them empty, of 4096 bytes at most
  const moec_app_bias* biases;
  int64_t bias_count;
  int32_t speculate;  // 1: tokens that followed the same three tokens before are drafted and checked in one call, where the model
                      // speculates and while that saves time; the text is the same. 0: a call for each token
  int32_t segments;  // MOEC_APP_SEGMENTS, MOEC_APP_TOOLS: special tokens that mark segments are written out, for moec_app_splitter
  const moec_app_constraint* constraint;  // copied; NULL: every token may come
  int32_t top_scores;  // for moec_app_scores: -1: nothing; 0 to 100: each token's log-probability and those of so many likeliest ones
  int32_t on_full;     // what happens when the context is full: MOEC_APP_STOP, or MOEC_APP_DROP_OLDEST
  int64_t keep_first;  // tokens at the beginning that are never dropped, below the context's length: a system prompt
  int64_t draft;  // a small model of the same tokenizer that drafts instead of the text so far: the id of a session, which this generation
                  // then uses, or of an artifact; 0: none. It needs `speculate`
} moec_app_options;

// What the model recommends (its generation_config.json), else greedy; with speculation, without scores. Set `size` first.
MOEC_APP_API int32_t moec_app_defaults(int64_t artifact, moec_app_options* options);

// Begins the answer to a prompt. The session will hold exactly the prompt and the answer (but what was dropped), whose last token is not
// computed when the answer ends with it; the beginning of the prompt that it holds already is not computed again. options NULL: the model's defaults. A
// session has one generation at a time.
MOEC_APP_API int64_t moec_app_generate(int64_t session, const int32_t* prompt, int64_t count, const moec_app_options* options);

// The next piece of text: 1 and a piece of whole characters (valid until the next call on this generation; it ends with a
// zero byte, which `bytes` does not count); 0 at the end; -1. `piece` and `bytes` may be NULL.
MOEC_APP_API int32_t moec_app_next(int64_t generation, const char** piece, int64_t* bytes);

// Ends a generation, before the next token or the next part of its prompt. From any thread, also during moec_app_next.
MOEC_APP_API int32_t moec_app_cancel(int64_t generation);

// Runs a generation to its end: `each` gets every piece, and ends the generation by a value other than 0, after which it is not
// called again. Returns 0 or -1.
typedef int32_t (*moec_app_piece)(void* user, const char* piece, int64_t bytes);
MOEC_APP_API int32_t moec_app_run(int64_t generation, moec_app_piece each, void* user);

enum {
  MOEC_APP_RUNNING = 0,
  MOEC_APP_STOP_TOKEN = 1,
  MOEC_APP_STOP_STRING = 2,
  MOEC_APP_LENGTH = 3,     // max_new_tokens
  MOEC_APP_CONTEXT = 4,    // the context is full (MOEC_APP_STOP)
  MOEC_APP_CANCELLED = 5,
  MOEC_APP_FAILED = 6,
  MOEC_APP_COMPLETE = 7,   // its constraint lets nothing follow
};

typedef struct moec_app_stats {
  uint32_t size;  // sizeof(moec_app_stats)
  int32_t stopped;
  int64_t prompt_tokens, reused_tokens, new_tokens;
  double prefill_seconds, decode_seconds;
  int64_t drafted_tokens, accepted_tokens;  // tokens that were checked as drafts, and those of them that the model took itself
  int64_t dropped_tokens;  // of prompt and answer, by MOEC_APP_DROP_OLDEST; prompt_tokens counts the whole prompt
} moec_app_stats;
MOEC_APP_API int32_t moec_app_stats_of(int64_t generation, moec_app_stats* stats);

// How likely the model took a token to be: by its logits, before options and constraint change them.
typedef struct moec_app_score {
  int32_t token;
  int32_t rank;  // 0: the token that was taken; 1, 2, ...: the likeliest ones at its place, best first
  double log_probability;  // natural logarithm
  int64_t text_bytes;      // of a token that was taken: bytes of the answer's text that were certain with it; the text behind those of
                           // the token before is what it brought, which may be nothing. 0 for the others
} moec_app_score;

// Scores of the tokens that were taken so far, from number `first` on: for each of them one of rank 0, then those of the likeliest
// (moec_app_options.top_scores, or the whole vocabulary if that is smaller). A token that ended the answer has none. Writes at most
// `capacity`. Returns how many there are.
MOEC_APP_API int64_t moec_app_scores(int64_t generation, int64_t first, moec_app_score* scores, int64_t capacity);

// ------------------------------------------------------------------------------------------------------------ segments

enum { MOEC_APP_TEXT = 0, MOEC_APP_THINKING = 1, MOEC_APP_CALL = 2 };

// A part of an answer. Texts end with a zero byte and are valid until the next call on its splitter.
typedef struct moec_app_segment {
  uint32_t size;  // sizeof(moec_app_segment)
  int32_t kind;
  const char* text;  // of text and thinking; `bytes` long
  int64_t bytes;
  const char* name;       // of a call: the tool
  const char* arguments;  // of a call: JSON of an object, as the model wrote it
} moec_app_segment;

// Takes apart the text of an answer to `prompt` that was generated with the same flags (moec_app_options.segments), in the form of
// the model's family. What looks like a call and is none, or is cut off, is text: nothing is lost. Returns an id, or -1.
MOEC_APP_API int64_t moec_app_splitter(int64_t artifact, const int32_t* prompt, int64_t count, int32_t flags);
// The next piece of the text, in whole characters (bytes -1: up to a zero byte); piece NULL: the answer has ended.
MOEC_APP_API int32_t moec_app_split(int64_t splitter, const char* piece, int64_t bytes);
// The next segment that is certain: 1, 0 where more text is needed, -1.
MOEC_APP_API int32_t moec_app_next_segment(int64_t splitter, moec_app_segment* segment);

#ifdef __cplusplus
}
#endif

#endif  // MOEC_H_
