// Greedy generation from an artifact's model.pte: token ids in, token ids out.
//
//   moec_sample MODEL.pte COUNT ID...      e.g.  moec_sample build/tiny/model.pte 8 12 7 99
//
// A tokenizer is the application's own: artifacts carry a Hugging Face tokenizer.json.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

using executorch::aten::ScalarType;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;

namespace {

// One loaded model and how far its cache is filled. Module is not thread-safe: one thread at a time.
class Model {
 public:
  explicit Model(const std::string& path)
      // mapped, not read: the weights of experts that are never selected stay on disk
      : module_(path, Module::LoadMode::Mmap, nullptr, nullptr, nullptr, /*share_memory_arenas=*/true) {}

  bool load() {
    const Error error = module_.load_method("forward");
    if (error != Error::Ok) {
      // 0x14: an operator is missing, which is our kernel library; 0x20: a backend is missing
      std::fprintf(stderr, "cannot load forward: error 0x%x\n", static_cast<unsigned>(error));
      return false;
    }
    // the longest chunk of one call is the upper bound of the first input, tokens [1, T]
    const auto meta = module_.method_meta("forward");
    if (!meta.ok() || !meta->input_tensor_meta(0).ok() || meta->input_tensor_meta(0)->sizes().size() != 2) {
      std::fprintf(stderr, "forward does not take tokens [1, T]\n");
      return false;
    }
    max_tokens_ = meta->input_tensor_meta(0)->sizes()[1];
    return max_tokens_ > 0 && constant("get_vocab_size", vocab_size_) && constant("get_max_context_len", context_);
  }

  // Appends tokens and leaves the logits of the last one in `logits`. Longer prompts go through in chunks.
  bool append(const std::vector<int64_t>& ids, std::vector<float>& logits) {
    if (ids.empty() || position_ + static_cast<int64_t>(ids.size()) > context_) {
      std::fprintf(stderr, "%zu tokens do not fit: position %lld of %lld\n", ids.size(),
                   static_cast<long long>(position_), static_cast<long long>(context_));
      return false;
    }
    for (const int64_t id : ids) {
      if (id < 0 || id >= vocab_size_) {
        std::fprintf(stderr, "token id %lld is not in the vocabulary of %lld\n", static_cast<long long>(id),
                     static_cast<long long>(vocab_size_));
        return false;
      }
    }
    for (size_t begin = 0; begin < ids.size(); begin += static_cast<size_t>(max_tokens_)) {
      const size_t count = std::min(ids.size() - begin, static_cast<size_t>(max_tokens_));
      std::vector<int64_t> chunk(ids.begin() + static_cast<int64_t>(begin),
                                 ids.begin() + static_cast<int64_t>(begin + count));
      int64_t start = position_;
      auto tokens = from_blob(chunk.data(), {1, static_cast<int>(count)}, ScalarType::Long);
      auto start_pos = from_blob(&start, {1}, ScalarType::Long);
      const auto result = module_.forward({EValue(tokens), EValue(start_pos)});
      if (!result.ok() || result->size() != 1 || !(*result)[0].isTensor()) {
        std::fprintf(stderr, "forward failed: error 0x%x\n", static_cast<unsigned>(result.error()));
        return false;
      }
      const auto& output = (*result)[0].toTensor();
      if (output.numel() < vocab_size_ || output.scalar_type() != ScalarType::Float) {
        std::fprintf(stderr, "forward gave %lld values\n", static_cast<long long>(output.numel()));
        return false;
      }
      // [1, V] or [1, 1, V]: the last row
      const float* last = output.const_data_ptr<float>() + output.numel() - vocab_size_;
      logits.assign(last, last + vocab_size_);
      position_ += static_cast<int64_t>(count);
    }
    return true;
  }

 private:
  bool constant(const char* name, int64_t& value) {
    const auto result = module_.execute(name);
    if (!result.ok() || result->empty() || !(*result)[0].isInt()) {
      std::fprintf(stderr, "the file has no %s\n", name);
      return false;
    }
    value = (*result)[0].toInt();
    return value > 0;
  }

  Module module_;
  int64_t position_ = 0;
  int64_t vocab_size_ = 0;
  int64_t context_ = 0;
  int64_t max_tokens_ = 0;
};

bool parse(const char* text, int64_t& value) {
  char* end = nullptr;
  value = std::strtoll(text, &end, 10);
  return end != text && *end == '\0';
}

}  // namespace

int main(int argc, char** argv) {
  int64_t count = 0;
  if (argc < 4 || !parse(argv[2], count) || count < 1) {
    std::fprintf(stderr, "usage: %s MODEL.pte COUNT ID...\n", argv[0]);
    return 2;
  }
  std::vector<int64_t> ids;
  for (int i = 3; i < argc; ++i) {
    int64_t id = 0;
    if (!parse(argv[i], id)) {
      std::fprintf(stderr, "%s is not a token id\n", argv[i]);
      return 2;
    }
    ids.push_back(id);
  }
  Model model(argv[1]);
  if (!model.load()) {
    return 1;
  }
  std::vector<float> logits;
  for (int64_t i = 0; i < count; ++i) {
    if (!model.append(ids, logits)) {
      return 1;
    }
    const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    std::printf("%lld\n", static_cast<long long>(best));
    ids.assign(1, best);
  }
  return 0;
}
