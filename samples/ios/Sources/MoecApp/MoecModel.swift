// One artifact for the CPU (moec compile --target xnnpack): text in, text out. The C header behind it is runtime/include/moec.h.
import CMoec
import Foundation

/// What is known of a model.
public struct Info: Sendable {
  public let hasChat: Bool  // conversations can be rendered
  public let vocabulary: Int
  public let context: Int
  public let threads: Int
  public let rewinds: Bool  // conversations go back to any position; false: to their beginning only
  public let hasCalls: Bool  // the model's way to write calls of tools is known
  public let thinks: Bool
  public let speculates: Bool
  public let hasTools: Bool  // conversations with tools can be rendered
}

/// One artifact for any number of conversations, which share its weights and take turns. All calls are slow for the main thread:
/// make them on one of your own. What fails is a MoecError with the reason.
public final class MoecModel: Sendable {
  /// The artifact's id in the C library.
  public let artifact: Int64
  public let info: Info

  /// What the model recommends, for every setting that is nil in `Settings()`.
  public var recommended: Settings {
    get throws {
      let given = try defaults(of: artifact)
      var found = Settings()
      found.temperature = given.temperature
      found.topK = Int(given.top_k)
      found.topP = given.top_p
      found.minP = given.min_p
      found.repeatPenalty = given.repeat_penalty
      found.presencePenalty = given.presence_penalty
      found.frequencyPenalty = given.frequency_penalty
      found.speculate = given.speculate != 0
      return found
    }
  }

  /// folder: what `moec compile` wrote, in the application's files. memoryBytes: the most memory of the process; 0 for no
  /// budget. threads 0: one for each fast core.
  public init(folder: URL, memoryBytes: Int64 = 0, threads: Int32 = 0) throws {
    var options = moec_app_open_options()
    options.size = sizeOf(moec_app_open_options.self)
    options.threads = threads
    options.memory_bytes = memoryBytes
    artifact = try checked(moec_app_open(try path(folder), &options))
    var info = moec_app_info()
    info.size = sizeOf(moec_app_info.self)
    if moec_app_describe(artifact, &info) < 0 {
      let reason = MoecError.last
      _ = moec_app_close(artifact)  // an object that could not be made has no deinit
      throw reason
    }
    self.info = Info(
      hasChat: info.has_chat != 0, vocabulary: Int(info.vocabulary), context: Int(info.context), threads: Int(info.threads),
      rewinds: info.rewinds != 0, hasCalls: info.has_calls != 0, thinks: info.thinks != 0, speculates: info.speculates != 0,
      hasTools: info.has_tools != 0)
  }

  deinit { _ = moec_app_close(artifact) }

  /// A new conversation.
  public func conversation() throws -> Conversation {
    Conversation(model: self, session: try checked(moec_app_session(artifact)))
  }

  /// Where beginnings of prompts are kept, and found by every answer; nil: nowhere. The folder is created if it is missing.
  public func keepPrefixes(in folder: URL?) throws {
    _ = try checked(folder.map { moec_app_prefix_folder(artifact, try path($0)) } ?? moec_app_prefix_folder(artifact, nil))
  }

  /// Whether there was a prefix of this name.
  public func forgetPrefix(_ name: String) throws -> Bool {
    let texts = Texts()
    let given = try texts.add(name)
    return try withExtendedLifetime(texts) { try checked(moec_app_forget_prefix(artifact, given)) == 1 }
  }

  /// How many tokens the prefix of a name has; 0 if there is none.
  public func prefixTokens(_ name: String) throws -> Int {
    let texts = Texts()
    let given = try texts.add(name)
    return try withExtendedLifetime(texts) { Int(try checked(moec_app_prefix_tokens(artifact, given))) }
  }

  /// Why a prefix was not used, the latest one; empty if all were.
  public var prefixWarning: String {
    get throws {
      let bytes = try written(CChar(0)) { moec_app_prefix_warning(artifact, $0, $1) }
      return String(decoding: bytes.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }
  }

  /// What every conversation with this system prompt and these tools begins with.
  public func systemPrompt(_ system: String?, tools: String? = nil) throws -> [Int32] {
    let texts = Texts()
    let given = try tools.map { try texts.add($0) }
    let said = try system.map { try texts.add($0) }
    return try withExtendedLifetime(texts) { try written(0) { moec_app_system_prompt(artifact, given, said, $0, $1) } }
  }

  /// plain: without the tokens that the tokenizer puts around every text; asText: special tokens in the text are text.
  public func tokenize(_ text: String, plain: Bool = false, asText: Bool = false) throws -> [Int32] {
    let flags = Int32((plain ? MOEC_APP_PLAIN : 0) | (asText ? MOEC_APP_AS_TEXT : 0))
    let bytes = Int64(text.utf8.count)
    return try written(0) { moec_app_tokenize(artifact, text, bytes, flags, $0, $1) }
  }

  /// special: special tokens are written out.
  public func text(of ids: [Int32], special: Bool = false) throws -> String {
    let flags = Int32(special ? MOEC_APP_SPECIAL : 0)
    let bytes = try written(CChar(0)) { moec_app_detokenize(artifact, ids, Int64(ids.count), flags, $0, $1) }
    return String(decoding: bytes.map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }
}

func defaults(of artifact: Int64) throws -> moec_app_options {
  var options = moec_app_options()
  options.size = sizeOf(moec_app_options.self)
  _ = try checked(moec_app_defaults(artifact, &options))
  return options
}
