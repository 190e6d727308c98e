// The C API of moec.h: beginnings of prompts that are kept in a folder.
#include <string>

#include "api.h"
#include "prefixes.h"

namespace {

std::shared_ptr<PrefixFolder> folder_of(const OpenArtifact& artifact) {
  const auto found = artifact.prefixes();
  if (!found) throw Fault("the artifact has no folder for prefixes: moec_app_prefix_folder gives it one");
  return found;
}

std::string name_of(const char* name) {
  const std::string found = text_of(name, -1, "name");
  PrefixFolder::check_name(found);
  return found;
}

}  // namespace

int32_t moec_app_prefix_folder(int64_t artifact, const char* folder) {
  return guarded<int32_t>([&] {
    const auto found = artifact_of(artifact);
    found->set_prefixes(folder ? std::make_shared<PrefixFolder>(text_of(folder, -1, "folder"), found->identity()) : nullptr);
    return 0;
  });
}

int32_t moec_app_keep_prefix(int64_t session, const char* name) {
  return guarded<int32_t>([&] {
    const auto found = session_of(session);
    const std::string given = name ? name_of(name) : "";
    const std::lock_guard<std::mutex> lock(found->busy);
    folder_of(found->artifact())->keep(found.get(), given);
    return 0;
  });
}

int32_t moec_app_forget_prefix(int64_t artifact, const char* name) {
  return guarded<int32_t>([&] { return folder_of(*artifact_of(artifact))->forget(name_of(name)) ? 1 : 0; });
}

int64_t moec_app_prefix_tokens(int64_t artifact, const char* name) {
  return guarded<int64_t>([&] { return folder_of(*artifact_of(artifact))->tokens_of(name_of(name)); });
}

int64_t moec_app_prefix_warning(int64_t artifact, char* text, int64_t capacity) {
  return guarded<int64_t>([&] { return written(folder_of(*artifact_of(artifact))->told(), text, capacity); });
}

int64_t moec_app_system_prompt(int64_t artifact, const char* tools, const char* system, int32_t* ids, int64_t capacity) {
  return guarded<int64_t>([&] {
    const auto found = artifact_of(artifact);
    const std::string definitions = tools ? text_of(tools, -1, "tools") : "", prompt = system ? text_of(system, -1, "system") : "";
    if (tools && definitions.empty()) throw Fault("tools: is not JSON, at byte 0");
    if (valid_utf8(prompt) != prompt.size()) throw Fault("system: is not UTF-8");
    return written(found->system_prompt(definitions, prompt), ids, capacity);
  });
}
