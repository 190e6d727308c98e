// llama_routing MODEL TOKENS: how often each expert of each MoE layer is selected by TOKENS random tokens in llama.cpp, as
// JSON, [layer][expert]. Of the graph's nodes it reads ffn_moe_topk-LAYER, int32 [k, tokens].
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"

namespace {

const char kNode[] = "ffn_moe_topk-";

using Counts = std::map<int, std::vector<long>>;  // by layer

bool look(ggml_tensor* node, bool ask, void* counts) {
  const bool wanted = !std::strncmp(node->name, kNode, sizeof kNode - 1);
  if (ask || !wanted) return wanted || !ask;
  std::vector<long>& found = (*static_cast<Counts*>(counts))[std::atoi(node->name + sizeof kNode - 1)];
  for (int64_t token = 0; token < node->ne[1]; ++token) {
    for (int64_t i = 0; i < node->ne[0]; ++i) {
      int32_t expert = 0;
      ggml_backend_tensor_get(node, &expert, token * node->nb[1] + i * node->nb[0], sizeof expert);
      if (found.size() <= static_cast<size_t>(expert)) found.resize(expert + 1);
      ++found[expert];
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: llama_routing MODEL TOKENS\n"), 2;
  const int tokens = std::atoi(argv[2]);
  llama_log_set([](ggml_log_level level, const char* text, void*) {
    if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
  }, nullptr);
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
  if (!model) return std::fprintf(stderr, "cannot read %s\n", argv[1]), 1;
  Counts counts;
  llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = params.n_ubatch = tokens;
  params.cb_eval = look;
  params.cb_eval_user_data = &counts;
  llama_context* context = llama_init_from_model(model, params);
  if (!context) return 1;
  std::mt19937 random(1);
  std::vector<llama_token> ids(tokens);
  for (llama_token& id : ids) id = random() % llama_vocab_n_tokens(llama_model_get_vocab(model));
  if (llama_decode(context, llama_batch_get_one(ids.data(), tokens))) return 1;
  const char* layer = "[";
  for (const auto& [index, found] : counts) {
    const char* next = "[";
    std::fputs(layer, stdout);
    for (const long count : found) std::printf("%s%ld", next, count), next = ", ";
    std::puts("]");
    layer = ", ";
  }
  std::puts(counts.empty() ? "[]" : "]");
  llama_free(context);
  llama_model_free(model);
  return 0;
}
