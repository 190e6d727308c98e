// Native.kt's functions: the C API of applications (runtime/include/moec.h). Texts are passed as UTF-8 bytes, since JNI's strings
// are in modified UTF-8, which encodes characters beyond 16 bits differently.
#include <jni.h>

#include <cstdint>
#include <exception>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "moec.h"

namespace {

// Leaves what runs: a Java exception is pending.
struct Pending {};

// Makes an exception pending, unless one is: a constraint's own says more than that a call failed.
void pend(JNIEnv* env, const char* name, const char* reason) {
  if (env->ExceptionCheck()) return;
  const jclass found = env->FindClass(name);
  if (found != nullptr) env->ThrowNew(found, reason);  // else one about the class is pending
}

[[noreturn]] void refuse(JNIEnv* env, const char* reason) {
  pend(env, "java/lang/IllegalArgumentException", reason);
  throw Pending();
}

// `given` if it is not null: a call that gives null leaves an exception, and an argument that is null gets one here.
template <typename T>
T there(JNIEnv* env, T given) {
  if (given != nullptr) return given;
  pend(env, "java/lang/NullPointerException", "an argument is null");
  throw Pending();
}

jbyteArray bytes_of(JNIEnv* env, const char* begin, int64_t count) {
  if (count < 0 || count > INT32_MAX) refuse(env, "a text has more than 2 GiB");
  const jbyteArray out = there(env, env->NewByteArray(static_cast<jsize>(count)));
  env->SetByteArrayRegion(out, 0, static_cast<jsize>(count), reinterpret_cast<const jbyte*>(begin));
  return out;
}

// Runs what a function does; no C++ exception goes through the virtual machine.
template <typename Body>
auto guarded(JNIEnv* env, Body body) -> decltype(body()) {
  try {
    return body();
  } catch (const Pending&) {
  } catch (const std::bad_alloc&) {
    pend(env, "java/lang/OutOfMemoryError", "no memory for a call of moec");
  } catch (const std::exception&) {
    pend(env, "java/lang/IllegalStateException", "a call of moec failed");
  }
  return decltype(body())();
}

// The number that a function gave; a MoecException with the reason where it failed.
template <typename T>
T checked(JNIEnv* env, T given) {
  if (given >= 0) return given;
  if (!env->ExceptionCheck()) {
    const std::string reason = moec_app_error();
    const jclass type = there(env, env->FindClass("dev/moec/MoecException"));
    const jmethodID make = there(env, env->GetMethodID(type, "<init>", "([B)V"));
    const jobject made = env->NewObject(type, make, bytes_of(env, reason.data(), static_cast<int64_t>(reason.size())));
    env->Throw(static_cast<jthrowable>(there(env, made)));
  }
  throw Pending();
}

std::string text_of(JNIEnv* env, jbyteArray bytes) {
  std::string text(static_cast<size_t>(env->GetArrayLength(there(env, bytes))), '\0');
  env->GetByteArrayRegion(bytes, 0, static_cast<jsize>(text.size()), reinterpret_cast<jbyte*>(text.data()));
  return text;
}

// A text that C ends at a zero byte: one inside would cut it off.
std::string whole_text_of(JNIEnv* env, jbyteArray bytes) {
  std::string text = text_of(env, bytes);
  if (text.find('\0') != std::string::npos) refuse(env, "a text holds a zero byte; leave it out");
  return text;
}

std::vector<std::string> texts_of(JNIEnv* env, jobjectArray given) {
  std::vector<std::string> texts;
  const jsize count = env->GetArrayLength(there(env, given));
  for (jsize i = 0; i < count; ++i) {
    const auto bytes = static_cast<jbyteArray>(env->GetObjectArrayElement(given, i));
    texts.push_back(whole_text_of(env, bytes));
    env->DeleteLocalRef(bytes);
  }
  return texts;
}

std::vector<int32_t> ids_of(JNIEnv* env, jintArray given) {
  std::vector<int32_t> ids(static_cast<size_t>(env->GetArrayLength(there(env, given))));
  env->GetIntArrayRegion(given, 0, static_cast<jsize>(ids.size()), ids.data());
  return ids;
}

std::vector<double> numbers_of(JNIEnv* env, jdoubleArray given) {
  std::vector<double> numbers(static_cast<size_t>(env->GetArrayLength(there(env, given))));
  env->GetDoubleArrayRegion(given, 0, static_cast<jsize>(numbers.size()), numbers.data());
  return numbers;
}

jdoubleArray doubles(JNIEnv* env, const std::vector<double>& numbers) {
  const jdoubleArray out = there(env, env->NewDoubleArray(static_cast<jsize>(numbers.size())));
  env->SetDoubleArrayRegion(out, 0, static_cast<jsize>(numbers.size()), numbers.data());
  return out;
}

// The elements that a call writes, whose number a first call gives; there may be more or fewer by the second one.
template <typename T, typename Call>
std::vector<T> written(JNIEnv* env, Call call) {
  std::vector<T> found;
  for (int64_t count = checked(env, call(nullptr, 0)); count > static_cast<int64_t>(found.size());) {
    if (count > INT32_MAX) refuse(env, "more than 2^31 ids or bytes");
    found.resize(static_cast<size_t>(count));
    count = checked(env, call(found.data(), count));
    if (count < static_cast<int64_t>(found.size())) found.resize(static_cast<size_t>(count));
  }
  return found;
}

jintArray ints(JNIEnv* env, const std::vector<int32_t>& ids) {
  const jintArray out = there(env, env->NewIntArray(static_cast<jsize>(ids.size())));
  env->SetIntArrayRegion(out, 0, static_cast<jsize>(ids.size()), ids.data());
  return out;
}

// A constraint of the application for one generation. Its functions run on the thread that is in Native.next.
class Constraint {
 public:
  Constraint(JNIEnv* env, jobject given) {
    env->GetJavaVM(&machine_);
    const jclass type = there(env, env->GetObjectClass(given));
    allowed_ = there(env, env->GetMethodID(type, "allowed", "([I)V"));
    take_ = there(env, env->GetMethodID(type, "take", "(I)Z"));
    object_ = there(env, env->NewGlobalRef(given));
  }
  Constraint(const Constraint&) = delete;
  Constraint& operator=(const Constraint&) = delete;
  ~Constraint() {
    if (JNIEnv* env = here()) env->DeleteGlobalRef(object_);
  }

  moec_app_constraint functions() {
    moec_app_constraint made = {};
    made.size = sizeof made;
    made.user = this;
    made.allowed = [](void* user, uint32_t* mask, int64_t words) { return static_cast<Constraint*>(user)->allowed(mask, words); };
    made.take = [](void* user, int32_t token) { return static_cast<Constraint*>(user)->take(token); };
    return made;
  }

 private:
  JNIEnv* here() const {
    void* env = nullptr;
    return machine_->GetEnv(&env, JNI_VERSION_1_6) == JNI_OK ? static_cast<JNIEnv*>(env) : nullptr;
  }

  // An exception of the application stays pending and comes out of Native.next.
  int32_t allowed(uint32_t* mask, int64_t words) const {
    JNIEnv* env = here();
    if (env == nullptr || words > INT32_MAX) return -1;
    const auto count = static_cast<jsize>(words);
    const jintArray bits = env->NewIntArray(count);
    if (bits == nullptr) return -1;
    env->CallVoidMethod(object_, allowed_, bits);
    if (env->ExceptionCheck()) return -1;
    env->GetIntArrayRegion(bits, 0, count, reinterpret_cast<jint*>(mask));
    env->DeleteLocalRef(bits);
    return 0;
  }

  int32_t take(int32_t token) const {
    JNIEnv* env = here();
    if (env == nullptr) return -1;
    const jboolean complete = env->CallBooleanMethod(object_, take_, token);
    if (env->ExceptionCheck()) return -1;
    return complete == JNI_TRUE ? 1 : 0;
  }

  JavaVM* machine_ = nullptr;
  jobject object_ = nullptr;
  jmethodID allowed_ = nullptr, take_ = nullptr;
};

// Those of the generations that are open. A call holds its own, so that another thread may close the generation meanwhile.
std::mutex constraints_lock;
std::map<int64_t, std::shared_ptr<Constraint>> constraints;

std::shared_ptr<Constraint> constraint_of(int64_t generation) {
  const std::lock_guard<std::mutex> lock(constraints_lock);
  const auto found = constraints.find(generation);
  return found == constraints.end() ? nullptr : found->second;
}

}  // namespace

#define MOEC_NATIVE(result, name, ...) \
  extern "C" JNIEXPORT result JNICALL Java_dev_moec_Native_##name(JNIEnv* env, jclass, __VA_ARGS__)

MOEC_NATIVE(jlong, open, jbyteArray folder, jlong memory_bytes, jint threads) {
  return guarded(env, [&]() -> jlong {
    const moec_app_open_options options = {sizeof options, threads, memory_bytes};
    return checked(env, moec_app_open(whole_text_of(env, folder).c_str(), &options));
  });
}

MOEC_NATIVE(void, close, jlong id) {
  guarded(env, [&] {
    moec_app_close(id);
    std::shared_ptr<Constraint> last;  // released after the lock
    const std::lock_guard<std::mutex> lock(constraints_lock);
    const auto found = constraints.find(id);
    if (found == constraints.end()) return;
    last.swap(found->second);
    constraints.erase(found);
  });
}

MOEC_NATIVE(jlongArray, describe, jlong artifact) {
  return guarded(env, [&] {
    moec_app_info info = {};
    info.size = sizeof info;
    checked(env, moec_app_describe(artifact, &info));
    const jlong found[] = {info.has_chat, info.vocabulary, info.context,    info.threads,  info.rewinds,
                           info.has_calls, info.thinks,    info.speculates, info.has_tools};
    const jsize count = sizeof found / sizeof *found;
    const jlongArray out = there(env, env->NewLongArray(count));
    env->SetLongArrayRegion(out, 0, count, found);
    return out;
  });
}

MOEC_NATIVE(jdoubleArray, defaults, jlong artifact) {
  return guarded(env, [&] {
    moec_app_options o = {};
    o.size = sizeof o;
    checked(env, moec_app_defaults(artifact, &o));
    return doubles(env, {o.temperature, o.top_p, o.min_p, o.repeat_penalty, o.presence_penalty, o.frequency_penalty,
                         static_cast<double>(o.top_k), static_cast<double>(o.speculate)});
  });
}

MOEC_NATIVE(jintArray, tokenize, jlong artifact, jbyteArray text, jint flags) {
  return guarded(env, [&] {
    const std::string given = text_of(env, text);
    return ints(env, written<int32_t>(env, [&](int32_t* ids, int64_t capacity) {
      return moec_app_tokenize(artifact, given.data(), static_cast<int64_t>(given.size()), flags, ids, capacity);
    }));
  });
}

MOEC_NATIVE(jbyteArray, detokenize, jlong artifact, jintArray given, jint flags) {
  return guarded(env, [&] {
    const std::vector<int32_t> ids = ids_of(env, given);
    const std::vector<char> text = written<char>(env, [&](char* bytes, int64_t capacity) {
      return moec_app_detokenize(artifact, ids.data(), static_cast<int64_t>(ids.size()), flags, bytes, capacity);
    });
    return bytes_of(env, text.data(), static_cast<int64_t>(text.size()));
  });
}

// texts: of each message its role, its content, and name and arguments of its calls, whose number is in calls. tools: null for none.
// dropped: null, or one number, which becomes that of the messages that were left out so that the others and `room` tokens fit.
MOEC_NATIVE(jintArray, chat, jlong artifact, jbyteArray tools, jobjectArray texts, jintArray calls, jlong room, jlongArray dropped) {
  return guarded(env, [&] {
    const std::vector<std::string> given = texts_of(env, texts);
    const std::string definitions = tools == nullptr ? "" : whole_text_of(env, tools);
    const std::vector<int32_t> counts = ids_of(env, calls);
    std::vector<std::vector<moec_app_call>> called(counts.size());
    std::vector<moec_app_turn> turns;
    size_t at = 0;
    for (size_t i = 0; i < counts.size(); ++i) {
      const size_t left = given.size() - at;
      if (counts[i] < 0 || left < 2 || static_cast<size_t>(counts[i]) > (left - 2) / 2) refuse(env, "texts and calls do not fit");
      const char *role = given[at].c_str(), *content = given[at + 1].c_str();
      at += 2;
      for (int32_t call = 0; call < counts[i]; ++call, at += 2) called[i].push_back({given[at].c_str(), given[at + 1].c_str()});
      turns.push_back({sizeof(moec_app_turn), 0, role, content, called[i].data(), counts[i]});
    }
    if (at != given.size()) refuse(env, "texts and calls do not fit");
    if (dropped != nullptr && env->GetArrayLength(dropped) != 1) refuse(env, "dropped has one number");
    const char* known = tools == nullptr ? nullptr : definitions.c_str();
    const auto turn_count = static_cast<int64_t>(turns.size());
    int64_t left_out = 0;
    const std::vector<int32_t> found = written<int32_t>(env, [&](int32_t* ids, int64_t capacity) {
      return dropped == nullptr ? moec_app_chat_with_tools(artifact, known, turns.data(), turn_count, ids, capacity)
                                : moec_app_fitting_chat(artifact, known, turns.data(), turn_count, room, ids, capacity, &left_out);
    });
    const jlong told = left_out;
    if (dropped != nullptr) env->SetLongArrayRegion(dropped, 0, 1, &told);
    return ints(env, found);
  });
}

MOEC_NATIVE(jlong, session, jlong artifact) {
  return guarded(env, [&]() -> jlong { return checked(env, moec_app_session(artifact)); });
}

MOEC_NATIVE(jlong, fork, jlong session) {
  return guarded(env, [&]() -> jlong { return checked(env, moec_app_fork(session)); });
}

MOEC_NATIVE(jintArray, tokens, jlong session) {
  return guarded(env, [&] {
    return ints(env, written<int32_t>(
                         env, [&](int32_t* ids, int64_t capacity) { return moec_app_tokens(session, ids, capacity); }));
  });
}

MOEC_NATIVE(void, rewind, jlong session, jlong position) {
  guarded(env, [&] { checked(env, moec_app_rewind(session, position)); });
}

MOEC_NATIVE(void, save, jlong session, jbyteArray path) {
  guarded(env, [&] { checked(env, moec_app_save(session, whole_text_of(env, path).c_str())); });
}

MOEC_NATIVE(void, restore, jlong session, jbyteArray path) {
  guarded(env, [&] { checked(env, moec_app_restore(session, whole_text_of(env, path).c_str())); });
}

// folder: null for none.
MOEC_NATIVE(void, prefixFolder, jlong artifact, jbyteArray folder) {
  guarded(env, [&] {
    const std::string given = folder == nullptr ? "" : whole_text_of(env, folder);
    checked(env, moec_app_prefix_folder(artifact, folder == nullptr ? nullptr : given.c_str()));
  });
}

// name: null for none.
MOEC_NATIVE(void, keepPrefix, jlong session, jbyteArray name) {
  guarded(env, [&] {
    const std::string given = name == nullptr ? "" : whole_text_of(env, name);
    checked(env, moec_app_keep_prefix(session, name == nullptr ? nullptr : given.c_str()));
  });
}

MOEC_NATIVE(jboolean, forgetPrefix, jlong artifact, jbyteArray name) {
  return guarded(env, [&]() -> jboolean {
    return checked(env, moec_app_forget_prefix(artifact, whole_text_of(env, name).c_str())) == 1 ? JNI_TRUE : JNI_FALSE;
  });
}

MOEC_NATIVE(jlong, prefixTokens, jlong artifact, jbyteArray name) {
  return guarded(env, [&]() -> jlong { return checked(env, moec_app_prefix_tokens(artifact, whole_text_of(env, name).c_str())); });
}

MOEC_NATIVE(jbyteArray, prefixWarning, jlong artifact) {
  return guarded(env, [&] {
    const std::vector<char> text = written<char>(
        env, [&](char* bytes, int64_t capacity) { return moec_app_prefix_warning(artifact, bytes, capacity); });
    return bytes_of(env, text.data(), static_cast<int64_t>(text.size()));
  });
}

// tools, system: null for none.
MOEC_NATIVE(jintArray, systemPrompt, jlong artifact, jbyteArray tools, jbyteArray system) {
  return guarded(env, [&] {
    const std::string definitions = tools == nullptr ? "" : whole_text_of(env, tools);
    const std::string text = system == nullptr ? "" : whole_text_of(env, system);
    const char *known = tools == nullptr ? nullptr : definitions.c_str(), *said = system == nullptr ? nullptr : text.c_str();
    return ints(env, written<int32_t>(env, [&](int32_t* ids, int64_t capacity) {
      return moec_app_system_prompt(artifact, known, said, ids, capacity);
    }));
  });
}

// numbers: temperature, top_p, min_p, and the penalties for repetition, presence and frequency. segments: flags of moec.h.
MOEC_NATIVE(jlong, generate, jlong artifact, jlong session, jintArray prompt, jdoubleArray numbers, jint top_k, jboolean speculate,
            jlong seed, jlong limit, jobjectArray stops, jintArray biased, jdoubleArray biases, jint segments, jint top_scores,
            jint on_full, jlong keep_first, jlong draft, jobject constraint) {
  return guarded(env, [&]() -> jlong {
    moec_app_options options = {};
    options.size = sizeof options;
    checked(env, moec_app_defaults(artifact, &options));
    const std::vector<double> given = numbers_of(env, numbers);
    if (given.size() != 6) refuse(env, "numbers has 6 values");
    options.temperature = given[0];
    options.top_p = given[1];
    options.min_p = given[2];
    options.repeat_penalty = given[3];
    options.presence_penalty = given[4];
    options.frequency_penalty = given[5];
    options.top_k = top_k;
    options.speculate = speculate == JNI_TRUE ? 1 : 0;
    options.seed = static_cast<uint64_t>(seed);
    options.max_new_tokens = limit;
    options.segments = segments;
    options.top_scores = top_scores;
    options.on_full = on_full;
    options.keep_first = keep_first;
    options.draft = draft;
    const std::vector<std::string> texts = texts_of(env, stops);
    std::vector<const char*> ends;
    for (const std::string& text : texts) ends.push_back(text.c_str());
    options.stops = ends.data();
    options.stop_count = static_cast<int64_t>(ends.size());
    const std::vector<int32_t> tokens = ids_of(env, biased);
    const std::vector<double> added = numbers_of(env, biases);
    if (tokens.size() != added.size()) refuse(env, "as many biases as tokens");
    std::vector<moec_app_bias> rows;
    for (size_t i = 0; i < tokens.size(); ++i) rows.push_back({tokens[i], 0, added[i]});
    options.biases = rows.data();
    options.bias_count = static_cast<int64_t>(rows.size());
    const auto kept = constraint == nullptr ? nullptr : std::make_shared<Constraint>(env, constraint);
    const moec_app_constraint functions = kept ? kept->functions() : moec_app_constraint();
    if (kept) options.constraint = &functions;
    const std::vector<int32_t> ids = ids_of(env, prompt);
    const int64_t made = checked(env, moec_app_generate(session, ids.data(), static_cast<int64_t>(ids.size()), &options));
    if (kept) {
      const std::lock_guard<std::mutex> lock(constraints_lock);
      constraints[made] = kept;
    }
    return made;
  });
}

// The next piece in UTF-8, whole characters; null at the end.
MOEC_NATIVE(jbyteArray, next, jlong generation) {
  return guarded(env, [&]() -> jbyteArray {
    const std::shared_ptr<Constraint> used = constraint_of(generation);
    const char* piece = nullptr;
    int64_t bytes = 0;
    if (checked(env, moec_app_next(generation, &piece, &bytes)) != 1) return nullptr;
    return bytes_of(env, piece, bytes);
  });
}

// Of a generation that has ended meanwhile nothing is left to cancel.
MOEC_NATIVE(void, cancel, jlong generation) {
  guarded(env, [&] { moec_app_cancel(generation); });
}

MOEC_NATIVE(jdoubleArray, stats, jlong generation) {
  return guarded(env, [&] {
    moec_app_stats s = {};
    s.size = sizeof s;
    checked(env, moec_app_stats_of(generation, &s));
    const auto count = [](int64_t given) { return static_cast<double>(given); };
    return doubles(env, {static_cast<double>(s.stopped), count(s.prompt_tokens), count(s.reused_tokens), count(s.new_tokens),
                         s.prefill_seconds, s.decode_seconds, count(s.drafted_tokens), count(s.accepted_tokens),
                         count(s.dropped_tokens)});
  });
}

MOEC_NATIVE(jdoubleArray, scores, jlong generation) {
  return guarded(env, [&] {
    const std::vector<moec_app_score> found = written<moec_app_score>(env, [&](moec_app_score* scores, int64_t capacity) {
      return moec_app_scores(generation, 0, scores, capacity);
    });
    if (found.size() > INT32_MAX / 4) refuse(env, "more scores than an array holds");
    std::vector<double> rows;
    for (const moec_app_score& one : found) {
      const double row[] = {static_cast<double>(one.token), static_cast<double>(one.rank), one.log_probability,
                            static_cast<double>(one.text_bytes)};
      rows.insert(rows.end(), std::begin(row), std::end(row));
    }
    return doubles(env, rows);
  });
}

MOEC_NATIVE(jlong, splitter, jlong artifact, jintArray prompt, jint segments) {
  return guarded(env, [&]() -> jlong {
    const std::vector<int32_t> ids = ids_of(env, prompt);
    return checked(env, moec_app_splitter(artifact, ids.data(), static_cast<int64_t>(ids.size()), segments));
  });
}

// piece null: the answer has ended.
MOEC_NATIVE(void, split, jlong splitter, jbyteArray piece) {
  guarded(env, [&] {
    const std::string text = piece == nullptr ? "" : text_of(env, piece);
    checked(env, moec_app_split(splitter, piece == nullptr ? nullptr : text.c_str(), static_cast<int64_t>(text.size())));
  });
}

// The next segment as its kind (a byte), and its text or the name and arguments of a call; null where more text is needed.
MOEC_NATIVE(jobjectArray, segment, jlong splitter) {
  return guarded(env, [&]() -> jobjectArray {
    moec_app_segment found = {};
    found.size = sizeof found;
    if (checked(env, moec_app_next_segment(splitter, &found)) != 1) return nullptr;
    const std::string kind(1, static_cast<char>(found.kind));
    std::vector<std::string> parts = {kind};
    if (found.kind == MOEC_APP_CALL)
      parts.insert(parts.end(), {found.name, found.arguments});
    else
      parts.emplace_back(found.text, static_cast<size_t>(found.bytes));
    const jclass type = there(env, env->FindClass("[B"));
    const jobjectArray out = there(env, env->NewObjectArray(static_cast<jsize>(parts.size()), type, nullptr));
    for (size_t i = 0; i < parts.size(); ++i) {
      const jbyteArray bytes = bytes_of(env, parts[i].data(), static_cast<int64_t>(parts[i].size()));
      env->SetObjectArrayElement(out, static_cast<jsize>(i), bytes);
      env->DeleteLocalRef(bytes);
    }
    return out;
  });
}
