// What goes into an answer and what comes out of it.
import CMoec
import Foundation

/// A turn of a conversation; `role` is "system" (the first one only), "user", "assistant", or "tool" for what a tool
/// answered, after the assistant's turn with its `calls`.
public struct Message: Sendable {
  public var role: String
  public var content: String
  public var calls: [Call]

  public init(role: String, content: String, calls: [Call] = []) {
    self.role = role
    self.content = content
    self.calls = calls
  }
}

/// A call of a tool, with its arguments as the JSON of an object.
public struct Call: Sendable, Equatable {
  public var name: String
  public var arguments: String

  public init(name: String, arguments: String) {
    self.name = name
    self.arguments = arguments
  }
}

/// A part of an answer: what is said, what is thought, or a call of a tool.
public enum Part: Sendable, Equatable {
  case text(String)
  case thinking(String)
  case call(Call)
}

/// How an answer is generated; nil: what the model recommends. docs/assistant.md says what each does.
public struct Settings {
  public var limit: Int?  // tokens; nil: to the end of the context
  public var temperature: Double?  // 0: the likeliest token
  public var topK: Int?  // 0: all
  public var topP: Double?
  public var minP: Double?
  public var repeatPenalty: Double?
  public var presencePenalty: Double?
  public var frequencyPenalty: Double?
  public var biases: [Int32: Double] = [:]  // added to the logits of these tokens; -.infinity rules one out
  public var seed: UInt64 = 0
  public var stops: [String] = []  // texts that end the answer, which are not shown
  public var speculate: Bool?  // whether drafts of several tokens are checked at once; the text is the same
  public var topScores: Int?  // tells in Stats.scores how likely tokens were, and so many of the likeliest; nil: nothing
  public var constraint: MoecConstraint?  // for one answer
  public var onFull = OnFull.stop
  public var keepFirst = 0  // tokens at the beginning that OnFull.dropOldest leaves: those of a system prompt
  public var draft: Conversation?  // over a small model of the same tokenizer, which drafts; the text is the same. Use it for nothing else
  /// Leaves the oldest questions of messages out, each with all up to the next, until they and `limit` fit.
  public var fit = false

  public init() {}
}

/// What happens when the context is full: the answer ends, or goes on without the oldest half of the tokens, until `limit`.
public enum OnFull: Int32, Sendable {
  case stop = 0
  case dropOldest = 1
}

/// What an answer may be: the target MoecSchema has one of a JSON Schema. It is used until the answer has ended.
public protocol MoecConstraint: AnyObject {
  var constraint: moec_app_constraint { get }
}

/// Why an answer ended.
public enum End: Int32, Sendable {
  case running, stopToken, stopString, length, context, cancelled, failed, complete
}

/// The natural logarithm of the probability that the model gave a token, before settings changed it.
public struct Score: Sendable, Equatable {
  public let token: Int32
  public let logProbability: Double
}

/// A token of an answer, with the likeliest ones at its place, best first. textBytes: of the answer's text, certain with it.
public struct TokenScore: Sendable, Equatable {
  public let taken: Score
  public let textBytes: Int
  public fileprivate(set) var likeliest: [Score]
}

public struct Stats: Sendable {
  public let end: End
  public let promptTokens: Int
  public let reusedTokens: Int  // of the prompt, which the conversation held already
  public let newTokens: Int
  public let prefillSeconds: Double
  public let decodeSeconds: Double
  public let draftedTokens: Int
  public let acceptedTokens: Int
  public let droppedTokens: Int  // by OnFull.dropOldest
  public let droppedMessages: Int  // by Settings.fit: the first ones behind the system prompt. Leave them out next time
  public let scores: [TokenScore]  // of each token of the answer where Settings.topScores asks for them

  /// The model ended its answer itself, or its constraint lets nothing follow.
  public var isWhole: Bool { [.stopToken, .stopString, .complete].contains(end) }

  init(of generation: Int64, scored: Bool, droppedMessages: Int64) throws {
    var stats = moec_app_stats()
    stats.size = sizeOf(moec_app_stats.self)
    _ = try checked(moec_app_stats_of(generation, &stats))
    guard let end = End(rawValue: stats.stopped) else { throw MoecError("an answer ended by \(stats.stopped), which is unknown") }
    self.end = end
    promptTokens = Int(stats.prompt_tokens)
    reusedTokens = Int(stats.reused_tokens)
    newTokens = Int(stats.new_tokens)
    prefillSeconds = stats.prefill_seconds
    decodeSeconds = stats.decode_seconds
    draftedTokens = Int(stats.drafted_tokens)
    acceptedTokens = Int(stats.accepted_tokens)
    droppedTokens = Int(stats.dropped_tokens)
    self.droppedMessages = Int(droppedMessages)
    scores = scored ? try Stats.scores(of: generation) : []
  }

  private static func scores(of generation: Int64) throws -> [TokenScore] {
    var found: [TokenScore] = []
    for row in try written(moec_app_score(), { moec_app_scores(generation, 0, $0, $1) }) {
      let score = Score(token: row.token, logProbability: row.log_probability)
      if row.rank == 0 {
        found.append(TokenScore(taken: score, textBytes: Int(row.text_bytes), likeliest: []))
      } else if !found.isEmpty {
        found[found.count - 1].likeliest.append(score)
      }
    }
    return found
  }
}
