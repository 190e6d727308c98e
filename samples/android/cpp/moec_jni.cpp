// MoecModel.kt's native side: one model of the checked runtime per handle.
#include <jni.h>

#include <cstdint>
#include <string>
#include <vector>

#include "moec_runtime.h"

namespace {

void fail(JNIEnv* env, const std::string& what) {
  env->ThrowNew(env->FindClass("java/lang/IllegalStateException"), what.c_str());
}

moec_model* model_of(jlong handle) { return reinterpret_cast<moec_model*>(handle); }

moec_model_info info_of(jlong handle) {
  moec_model_info info = {};
  moec_model_get_info(model_of(handle), &info);
  return info;
}

}  // namespace

extern "C" JNIEXPORT jlong JNICALL Java_dev_moec_MoecModel_open(JNIEnv* env, jclass, jstring path) {
  const char* text = env->GetStringUTFChars(path, nullptr);
  if (text == nullptr) return 0;  // out of memory: the exception is pending
  // mapped: experts that no token selects stay on disk; one thread for each fast core
  moec_model* model = moec_model_open(text, /*threads=*/0);
  env->ReleaseStringUTFChars(path, text);
  const std::string error = moec_model_error(model);
  if (error.empty()) return reinterpret_cast<jlong>(model);
  moec_model_close(model);
  fail(env, "cannot load the model: " + error);
  return 0;
}

extern "C" JNIEXPORT void JNICALL Java_dev_moec_MoecModel_close(JNIEnv*, jclass, jlong handle) {
  moec_model_close(model_of(handle));
}

extern "C" JNIEXPORT jlong JNICALL Java_dev_moec_MoecModel_vocabSize(JNIEnv*, jclass, jlong handle) {
  return info_of(handle).vocab_size;
}

extern "C" JNIEXPORT jlong JNICALL Java_dev_moec_MoecModel_context(JNIEnv*, jclass, jlong handle) {
  return info_of(handle).context;
}

// The longest chunk of one call.
extern "C" JNIEXPORT jlong JNICALL Java_dev_moec_MoecModel_maxTokens(JNIEnv*, jclass, jlong handle) {
  return info_of(handle).max_tokens;
}

// The logits of the last token, or null with an exception pending. NaN among them is an error: of damaged weights.
extern "C" JNIEXPORT jfloatArray JNICALL Java_dev_moec_MoecModel_forward(JNIEnv* env, jclass, jlong handle,
                                                                         jlongArray ids, jlong start) {
  const jsize count = env->GetArrayLength(ids);
  std::vector<int64_t> chunk(static_cast<size_t>(count));
  env->GetLongArrayRegion(ids, 0, count, reinterpret_cast<jlong*>(chunk.data()));
  const int64_t width = info_of(handle).vocab_size;
  std::vector<float> logits(static_cast<size_t>(width));
  if (moec_model_forward(model_of(handle), chunk.data(), count, start, /*all=*/0, logits.data(), width) != 0) {
    fail(env, moec_model_error(model_of(handle)));
    return nullptr;
  }
  const jfloatArray out = env->NewFloatArray(static_cast<jsize>(width));
  if (out != nullptr) env->SetFloatArrayRegion(out, 0, static_cast<jsize>(width), logits.data());
  return out;
}
