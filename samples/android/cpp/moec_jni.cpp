// MoecModel.kt's native side: one ExecuTorch Module per handle.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <jni.h>

#include <memory>
#include <string>
#include <vector>

using executorch::aten::ScalarType;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;

namespace {

jlong fail(JNIEnv* env, const std::string& what) {
  env->ThrowNew(env->FindClass("java/lang/IllegalStateException"), what.c_str());
  return 0;
}

Module* module_of(jlong handle) { return reinterpret_cast<Module*>(handle); }

}  // namespace

extern "C" JNIEXPORT jlong JNICALL Java_dev_moec_MoecModel_open(JNIEnv* env, jclass, jstring path) {
  const char* text = env->GetStringUTFChars(path, nullptr);
  if (text == nullptr) {
    return 0;  // out of memory: the exception is pending
  }
  // mapped: experts that no token selects stay on disk
  auto module = std::make_unique<Module>(text, Module::LoadMode::Mmap);
  env->ReleaseStringUTFChars(path, text);
  const Error error = module->load_method("forward");
  if (error != Error::Ok) {
    return fail(env, "cannot load forward: error " + std::to_string(static_cast<int>(error)));
  }
  return reinterpret_cast<jlong>(module.release());
}

extern "C" JNIEXPORT void JNICALL Java_dev_moec_MoecModel_close(JNIEnv*, jclass, jlong handle) {
  delete module_of(handle);
}

extern "C" JNIEXPORT jlong JNICALL Java_dev_moec_MoecModel_constant(JNIEnv* env, jclass, jlong handle, jstring name) {
  const char* text = env->GetStringUTFChars(name, nullptr);
  if (text == nullptr) {
    return 0;
  }
  const auto result = module_of(handle)->execute(text);
  const std::string asked = text;
  env->ReleaseStringUTFChars(name, text);
  if (!result.ok() || result->empty() || !(*result)[0].isInt()) {
    return fail(env, "the file has no " + asked);
  }
  return (*result)[0].toInt();
}

// The longest chunk of one call: the upper bound of the first input, tokens [1, T].
extern "C" JNIEXPORT jlong JNICALL Java_dev_moec_MoecModel_maxTokens(JNIEnv* env, jclass, jlong handle) {
  const auto meta = module_of(handle)->method_meta("forward");
  if (!meta.ok() || !meta->input_tensor_meta(0).ok() || meta->input_tensor_meta(0)->sizes().size() != 2) {
    return fail(env, "forward does not take tokens [1, T]");
  }
  return meta->input_tensor_meta(0)->sizes()[1];
}

// The logits of the last token, or null with an exception pending.
extern "C" JNIEXPORT jfloatArray JNICALL Java_dev_moec_MoecModel_forward(JNIEnv* env, jclass, jlong handle,
                                                                         jlongArray ids, jlong start) {
  const jsize count = env->GetArrayLength(ids);
  std::vector<int64_t> chunk(static_cast<size_t>(count));
  env->GetLongArrayRegion(ids, 0, count, reinterpret_cast<jlong*>(chunk.data()));
  int64_t position = start;
  auto tokens = from_blob(chunk.data(), {1, static_cast<int>(count)}, ScalarType::Long);
  auto start_pos = from_blob(&position, {1}, ScalarType::Long);
  const auto result = module_of(handle)->forward({EValue(tokens), EValue(start_pos)});
  if (!result.ok() || result->size() != 1 || !(*result)[0].isTensor()) {
    fail(env, "forward failed: error " + std::to_string(static_cast<int>(result.error())));
    return nullptr;
  }
  const auto& output = (*result)[0].toTensor();
  const auto width = static_cast<jsize>(output.size(output.dim() - 1));
  const jfloatArray logits = env->NewFloatArray(width);
  if (logits != nullptr) {
    env->SetFloatArrayRegion(logits, 0, width, output.const_data_ptr<float>() + output.numel() - width);
  }
  return logits;
}
