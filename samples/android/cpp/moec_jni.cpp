// MoecModel.kt's native side: the C API of applications (runtime/include/moec.h). Texts are passed as UTF-8 bytes, since
// JNI's strings are in modified UTF-8, which encodes characters beyond 16 bits differently.
#include <jni.h>

#include <cstdint>
#include <string>
#include <vector>

#include "moec.h"

namespace {

// The error of the last call in the JVM's own UTF-8, which has no sequences of four bytes: `?` for such a character.
std::string error_text() {
  std::string found;
  for (const char* at = moec_app_error(); *at; ++at) {
    const auto byte = static_cast<unsigned char>(*at);
    if (byte < 0xF0) {
      found += *at;
      continue;
    }
    found += '?';
    while ((static_cast<unsigned char>(at[1]) & 0xC0) == 0x80) ++at;
  }
  return found;
}

// The number a function gave; where it failed an exception is pending.
template <typename T>
T checked(JNIEnv* env, T given) {
  if (given < 0) env->ThrowNew(env->FindClass("java/lang/IllegalStateException"), error_text().c_str());
  return given;
}

std::string text_of(JNIEnv* env, jbyteArray bytes) {
  std::string text(static_cast<size_t>(env->GetArrayLength(bytes)), '\0');
  env->GetByteArrayRegion(bytes, 0, static_cast<jsize>(text.size()), reinterpret_cast<jbyte*>(text.data()));
  return text;
}

std::vector<std::string> texts_of(JNIEnv* env, jobjectArray given) {
  std::vector<std::string> texts;
  for (jsize i = 0; i < env->GetArrayLength(given); ++i) {
    const auto bytes = static_cast<jbyteArray>(env->GetObjectArrayElement(given, i));
    texts.push_back(text_of(env, bytes));
    env->DeleteLocalRef(bytes);
  }
  return texts;
}

// The ids of a call that writes them; a first call gives their number.
template <typename Call>
jintArray ids_of(JNIEnv* env, Call call) {
  const int64_t count = checked(env, call(nullptr, 0));
  if (count < 0) return nullptr;
  std::vector<int32_t> ids(static_cast<size_t>(count));
  if (checked(env, call(ids.data(), count)) < 0) return nullptr;
  const jintArray out = env->NewIntArray(static_cast<jsize>(count));
  if (out != nullptr) env->SetIntArrayRegion(out, 0, static_cast<jsize>(count), ids.data());
  return out;
}

}  // namespace

extern "C" JNIEXPORT jlong JNICALL Java_dev_moec_MoecModel_open(JNIEnv* env, jclass, jbyteArray folder, jlong memory) {
  const moec_app_open_options options = {sizeof options, /*threads=*/0, memory};  // one thread for each fast core
  return checked(env, moec_app_open(text_of(env, folder).c_str(), &options));
}

extern "C" JNIEXPORT void JNICALL Java_dev_moec_MoecModel_close(JNIEnv*, jclass, jlong id) { moec_app_close(id); }

extern "C" JNIEXPORT jlong JNICALL Java_dev_moec_MoecModel_session(JNIEnv* env, jclass, jlong artifact) {
  return checked(env, moec_app_session(artifact));
}

extern "C" JNIEXPORT jintArray JNICALL Java_dev_moec_MoecModel_tokenize(JNIEnv* env, jclass, jlong artifact, jbyteArray text) {
  const std::string given = text_of(env, text);
  return ids_of(env, [&](int32_t* ids, int64_t capacity) {
    return moec_app_tokenize(artifact, given.data(), static_cast<int64_t>(given.size()), 0, ids, capacity);
  });
}

// texts: of each message its role, its content, and name and arguments of its calls, whose number is in calls. tools: null for none.
extern "C" JNIEXPORT jintArray JNICALL Java_dev_moec_MoecModel_chat(JNIEnv* env, jclass, jlong artifact, jbyteArray tools,
                                                                    jobjectArray texts, jintArray calls) {
  const std::vector<std::string> given = texts_of(env, texts);
  const std::string definitions = tools == nullptr ? "" : text_of(env, tools);
  std::vector<jint> counts(static_cast<size_t>(env->GetArrayLength(calls)));
  env->GetIntArrayRegion(calls, 0, static_cast<jsize>(counts.size()), counts.data());
  std::vector<std::vector<moec_app_call>> called(counts.size());
  std::vector<moec_app_turn> turns;
  for (size_t at = 0; turns.size() < counts.size() && at + 1 < given.size();) {
    const char *role = given[at].c_str(), *content = given[at + 1].c_str();
    std::vector<moec_app_call>& own = called[turns.size()];
    at += 2;
    for (; static_cast<jint>(own.size()) < counts[turns.size()] && at + 1 < given.size(); at += 2)
      own.push_back({given[at].c_str(), given[at + 1].c_str()});
    turns.push_back({sizeof(moec_app_turn), 0, role, content, own.data(), static_cast<int64_t>(own.size())});
  }
  return ids_of(env, [&](int32_t* ids, int64_t capacity) {
    return moec_app_chat_with_tools(artifact, tools == nullptr ? nullptr : definitions.c_str(), turns.data(),
                                    static_cast<int64_t>(turns.size()), ids, capacity);
  });
}

// temperature below 0: what the model recommends. limit -1: to the end of the context. segments: flags of moec.h.
extern "C" JNIEXPORT jlong JNICALL Java_dev_moec_MoecModel_generate(JNIEnv* env, jclass, jlong artifact, jlong session, jintArray prompt,
                                                                    jlong limit, jdouble temperature, jlong seed, jobjectArray stops,
                                                                    jint segments) {
  moec_app_options options = {};
  options.size = sizeof options;
  if (checked(env, moec_app_defaults(artifact, &options)) < 0) return -1;
  if (temperature >= 0) options.temperature = temperature;
  options.seed = static_cast<uint64_t>(seed);
  options.max_new_tokens = limit;
  options.segments = segments;
  const std::vector<std::string> texts = texts_of(env, stops);
  std::vector<const char*> given;
  for (const std::string& text : texts) given.push_back(text.c_str());
  options.stops = given.data();
  options.stop_count = static_cast<int64_t>(given.size());
  std::vector<int32_t> ids(static_cast<size_t>(env->GetArrayLength(prompt)));
  env->GetIntArrayRegion(prompt, 0, static_cast<jsize>(ids.size()), ids.data());
  return checked(env, moec_app_generate(session, ids.data(), static_cast<int64_t>(ids.size()), &options));
}

// The next piece in UTF-8, whole characters; null at the end.
extern "C" JNIEXPORT jbyteArray JNICALL Java_dev_moec_MoecModel_next(JNIEnv* env, jclass, jlong generation) {
  const char* piece = nullptr;
  int64_t bytes = 0;
  if (checked(env, moec_app_next(generation, &piece, &bytes)) != 1) return nullptr;
  const jbyteArray out = env->NewByteArray(static_cast<jsize>(bytes));
  if (out != nullptr) env->SetByteArrayRegion(out, 0, static_cast<jsize>(bytes), reinterpret_cast<const jbyte*>(piece));
  return out;
}

extern "C" JNIEXPORT void JNICALL Java_dev_moec_MoecModel_cancel(JNIEnv*, jclass, jlong generation) { moec_app_cancel(generation); }

extern "C" JNIEXPORT void JNICALL Java_dev_moec_MoecModel_save(JNIEnv* env, jclass, jlong session, jbyteArray path) {
  checked(env, moec_app_save(session, text_of(env, path).c_str()));
}

extern "C" JNIEXPORT void JNICALL Java_dev_moec_MoecModel_restore(JNIEnv* env, jclass, jlong session, jbyteArray path) {
  checked(env, moec_app_restore(session, text_of(env, path).c_str()));
}

extern "C" JNIEXPORT jlong JNICALL Java_dev_moec_MoecModel_splitter(JNIEnv* env, jclass, jlong artifact, jintArray prompt, jint segments) {
  std::vector<int32_t> ids(static_cast<size_t>(env->GetArrayLength(prompt)));
  env->GetIntArrayRegion(prompt, 0, static_cast<jsize>(ids.size()), ids.data());
  return checked(env, moec_app_splitter(artifact, ids.data(), static_cast<int64_t>(ids.size()), segments));
}

// piece null: the answer has ended.
extern "C" JNIEXPORT void JNICALL Java_dev_moec_MoecModel_split(JNIEnv* env, jclass, jlong splitter, jbyteArray piece) {
  const std::string text = piece == nullptr ? "" : text_of(env, piece);
  checked(env, moec_app_split(splitter, piece == nullptr ? nullptr : text.c_str(), static_cast<int64_t>(text.size())));
}

// The next segment as its kind (a byte), and its text or the name and arguments of a call; null where more text is needed.
extern "C" JNIEXPORT jobjectArray JNICALL Java_dev_moec_MoecModel_segment(JNIEnv* env, jclass, jlong splitter) {
  moec_app_segment found = {};
  found.size = sizeof found;
  if (checked(env, moec_app_next_segment(splitter, &found)) != 1) return nullptr;
  const std::string kind(1, static_cast<char>(found.kind));
  std::vector<std::string> parts = {kind, std::string(found.text, static_cast<size_t>(found.bytes))};
  if (found.kind == MOEC_APP_CALL) parts = {kind, found.name, found.arguments};
  const jobjectArray out = env->NewObjectArray(static_cast<jsize>(parts.size()), env->FindClass("[B"), nullptr);
  for (size_t i = 0; out != nullptr && i < parts.size(); ++i) {
    const jbyteArray bytes = env->NewByteArray(static_cast<jsize>(parts[i].size()));
    if (bytes == nullptr) return nullptr;
    env->SetByteArrayRegion(bytes, 0, static_cast<jsize>(parts[i].size()), reinterpret_cast<const jbyte*>(parts[i].data()));
    env->SetObjectArrayElement(out, static_cast<jsize>(i), bytes);
    env->DeleteLocalRef(bytes);
  }
  return out;
}
