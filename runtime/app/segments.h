// An answer taken apart as it comes, as assistant/segments.py does it: what is said, what is thought, which tools are called.
// Nothing is lost: what looks like a call and is none, or is cut off, is said as text.
#ifndef MOEC_SEGMENTS_H_
#define MOEC_SEGMENTS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tool_calls.h"

struct Segment {
  enum Kind : int32_t { kText, kThinking, kCall };
  Kind kind = kText;
  std::string text;
  ToolCall call;
};

class Splitter {
 public:
  virtual ~Splitter() = default;
  // Appends what is certain with this piece of the answer; what was held back, once it has ended.
  void push(std::string_view piece, std::vector<Segment>* found) {
    text_ += piece;
    while (step(found)) {
    }
  }
  virtual void finish(std::vector<Segment>* found) = 0;

 protected:
  // Decides up to the next marker; false when more text is needed.
  virtual bool step(std::vector<Segment>* found) = 0;
  std::string text_;  // what has come and is not decided yet
};

// Text with thinking segments, and calls in a format; tools nullptr: none. thinking: it begins inside a thinking segment.
std::unique_ptr<Splitter> make_segments(const ToolFormat* tools, bool thinks, bool thinking);
// GPT-OSS's form: messages with a channel each.
std::unique_ptr<Splitter> make_channels();

#endif  // MOEC_SEGMENTS_H_
