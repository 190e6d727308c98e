// Greedy generation from an artifact's model.pte: token ids in, token ids out.
//
//   moec_sample MODEL.pte COUNT ID...      e.g.  moec_sample build/tiny/model.pte 8 12 7 99
//
// It uses the checked runtime, which takes ids; docs/app.md has the interface with texts. A damaged file is an error with a
// reason, where ExecuTorch's Module alone would trust it.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "moec_runtime.h"

namespace {

// One loaded model and how far its cache is filled. One call runs at a time.
class Model {
 public:
  explicit Model(const char* path) : model_(moec_model_open(path, /*threads=*/0)) {
    if (*moec_model_error(model_)) std::fprintf(stderr, "cannot load %s: %s\n", path, moec_model_error(model_));
    moec_model_get_info(model_, &info_);
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;
  ~Model() { moec_model_close(model_); }

  bool loaded() const { return *moec_model_error(model_) == '\0'; }

  // Appends tokens and leaves the logits of the last one in `logits`. Longer prompts go through in chunks.
  bool append(const std::vector<int64_t>& ids, std::vector<float>& logits) {
    if (ids.empty() || static_cast<int64_t>(ids.size()) > info_.context - position_) {
      std::fprintf(stderr, "%zu tokens do not fit: position %lld of %lld\n", ids.size(), static_cast<long long>(position_),
                   static_cast<long long>(info_.context));
      return false;
    }
    logits.resize(static_cast<size_t>(info_.vocab_size));
    for (size_t begin = 0; begin < ids.size(); begin += static_cast<size_t>(info_.max_tokens)) {
      const int64_t count = std::min(static_cast<int64_t>(ids.size() - begin), info_.max_tokens);
      if (moec_model_forward(model_, ids.data() + begin, count, position_, /*all=*/0, logits.data(), info_.vocab_size) != 0) {
        std::fprintf(stderr, "%s\n", moec_model_error(model_));  // an id outside the vocabulary, logits that are no numbers
        return false;
      }
      position_ += count;
    }
    return true;
  }

 private:
  moec_model* model_;
  moec_model_info info_ = {};
  int64_t position_ = 0;
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
  if (!model.loaded()) return 1;
  std::vector<float> logits;
  for (int64_t i = 0; i < count; ++i) {
    if (!model.append(ids, logits)) return 1;
    const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    std::printf("%lld\n", static_cast<long long>(best));
    ids.assign(1, best);
  }
  return 0;
}
