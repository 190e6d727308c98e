// One artifact for the CPU (moec compile --target xnnpack) with a conversation: text in, text out. The C header behind it
// is runtime/include/moec.h.
import CMoec
import Foundation

/// Why a call failed, in one line.
public struct MoecError: LocalizedError, CustomStringConvertible {
  public let description: String
  public var errorDescription: String? { description }

  init(_ description: String) { self.description = description }

  /// The reason of the last call of this thread.
  static var last: MoecError { MoecError(String(cString: moec_app_error())) }
}

/// A turn of a conversation; `role` is "system" (the first one only), "user", "assistant", or "tool" for what a tool
/// answered, after the assistant's turn with its `calls`.
public struct Message {
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
public struct Call {
  public var name: String
  public var arguments: String

  public init(name: String, arguments: String) {
    self.name = name
    self.arguments = arguments
  }
}

/// A part of an answer: what is said, what is thought, or a call of a tool.
public enum Part {
  case text(String)
  case thinking(String)
  case call(Call)
}

/// How an answer is generated; nil: what the model recommends.
public struct Settings {
  public var limit: Int?  // tokens; nil: to the end of the context
  public var temperature: Double?
  public var topP: Double?
  public var topK: Int?
  public var seed: UInt64 = 0
  public var stops: [String] = []  // texts that end the answer, which are not shown
  public var constraint: MoecConstraint?  // for one answer

  public init() {}
}

/// What an answer may be: the target MoecSchema has one of a JSON Schema. It is used until the answer has ended.
public protocol MoecConstraint: AnyObject {
  var constraint: moec_app_constraint { get }
}

public struct Stats {
  public let promptTokens: Int
  public let reusedTokens: Int  // of the prompt, which the session held already
  public let newTokens: Int
  public let prefillSeconds: Double
  public let decodeSeconds: Double
  public let isWhole: Bool  // the model ended its answer itself, or its constraint lets nothing follow
}

/// Slow for the main thread: call it from one of your own. `stop` may be called from any thread.
public final class MoecModel: @unchecked Sendable {
  /// The artifact's id in the C library.
  public let artifact: Int64
  private let session: Int64
  private let lock = NSLock()
  private var running: Int64 = 0  // the generation, 0 for none; under the lock

  /// folder: what `moec compile` wrote, in the application's files. memoryBytes: the most memory of the process; 0 for no
  /// budget. threads 0: one for each fast core.
  public init(folder: URL, memoryBytes: Int64 = 0, threads: Int32 = 0) throws {
    var options = moec_app_open_options()
    options.size = sizeOf(moec_app_open_options.self)
    options.threads = threads
    options.memory_bytes = memoryBytes
    let artifact = try checked(moec_app_open(try path(folder), &options))
    let session = moec_app_session(artifact)
    if session < 0 {
      let reason = MoecError.last
      _ = moec_app_close(artifact)
      throw reason
    }
    self.artifact = artifact
    self.session = session
  }

  deinit {
    _ = moec_app_close(session)
    _ = moec_app_close(artifact)
  }

  /// Answer a conversation; `each` gets every piece of the answer and ends it by returning false. Only what is new in the
  /// conversation is computed.
  @discardableResult
  public func answer(_ messages: [Message], settings: Settings = Settings(), each: (String) throws -> Bool) throws -> Stats {
    try generate(try prompt(of: messages, tools: nil), settings, segments: 0, each: each)
  }

  /// As `answer`, with thinking told from text and calls in the model's own form. tools: definitions in OpenAI's form as
  /// JSON, the same with every turn; nil for none.
  @discardableResult
  public func answerInParts(
    _ messages: [Message], tools: String? = nil, settings: Settings = Settings(), each: (Part) throws -> Bool
  ) throws -> Stats {
    let ids = try prompt(of: messages, tools: tools)
    let flags = Int32(tools == nil ? MOEC_APP_SEGMENTS : MOEC_APP_SEGMENTS | MOEC_APP_TOOLS)
    let splitter = try checked(moec_app_splitter(artifact, ids, Int64(ids.count), flags))
    defer { _ = moec_app_close(splitter) }
    var wanted = true
    func tell() throws -> Bool {
      var segment = moec_app_segment()
      segment.size = sizeOf(moec_app_segment.self)
      while try wanted && checked(moec_app_next_segment(splitter, &segment)) == 1 { wanted = try each(part(of: segment)) }
      return wanted
    }
    let stats = try generate(ids, settings, segments: flags) { piece in
      _ = try checked(moec_app_split(splitter, piece, Int64(piece.utf8.count)))
      return try tell()
    }
    _ = try checked(moec_app_split(splitter, nil, 0))
    _ = try tell()
    return stats
  }

  /// Continue a text instead.
  @discardableResult
  public func continueText(_ text: String, settings: Settings = Settings(), each: (String) throws -> Bool) throws -> Stats {
    let bytes = Int64(text.utf8.count)
    let ids = try numbers { moec_app_tokenize(artifact, text, bytes, 0, $0, $1) }
    return try generate(ids, settings, segments: 0, each: each)
  }

  /// End the answer that runs, from any thread.
  public func stop() {
    lock.lock()
    defer { lock.unlock() }
    if running != 0 { _ = moec_app_cancel(running) }
  }

  /// Keep the conversation in a file, for a process that the system may end.
  public func save(to file: URL) throws { _ = try checked(moec_app_save(session, try path(file))) }

  /// Go on with a conversation that was saved with the same artifact; the session stays as it was where that fails.
  public func restore(from file: URL) throws { _ = try checked(moec_app_restore(session, try path(file))) }

  /// Forget the conversation.
  public func reset() throws { _ = try checked(moec_app_rewind(session, 0)) }

  private func prompt(of messages: [Message], tools: String?) throws -> [Int32] {
    let texts = Texts()
    let given = try tools.map { try texts.add($0) }
    let turns = try messages.map { message in
      var turn = moec_app_turn()
      turn.size = sizeOf(moec_app_turn.self)
      turn.role = try texts.add(message.role)
      turn.content = try texts.add(message.content)
      turn.calls = try texts.add(message.calls)
      turn.call_count = Int64(message.calls.count)
      return turn
    }
    return try withExtendedLifetime(texts) {
      try numbers { moec_app_chat_with_tools(artifact, given, turns, Int64(turns.count), $0, $1) }
    }
  }

  private func generate(
    _ prompt: [Int32], _ settings: Settings, segments: Int32, each: (String) throws -> Bool
  ) throws -> Stats {
    var options = moec_app_options()
    options.size = sizeOf(moec_app_options.self)
    _ = try checked(moec_app_defaults(artifact, &options))
    options.temperature = settings.temperature ?? options.temperature
    options.top_p = settings.topP ?? options.top_p
    options.top_k = settings.topK.map { Int32(clamping: $0) } ?? options.top_k
    options.max_new_tokens = settings.limit.map { Int64($0) } ?? -1
    options.seed = settings.seed
    options.segments = segments
    let texts = Texts()
    let stops = try settings.stops.map { Optional(try texts.add($0)) }
    var constraint = settings.constraint?.constraint ?? moec_app_constraint()
    // All that the options point to is copied by the call, but for what the constraint itself points to.
    let generation = try withExtendedLifetime(texts) {
      try stops.withUnsafeBufferPointer { stops in
        try withUnsafePointer(to: &constraint) { constraint in
          options.stops = stops.baseAddress
          options.stop_count = Int64(stops.count)
          options.constraint = settings.constraint == nil ? nil : constraint
          return try checked(moec_app_generate(session, prompt, Int64(prompt.count), &options))
        }
      }
    }
    hold(generation)
    defer {
      hold(0)
      _ = moec_app_close(generation)
    }
    return try withExtendedLifetime(settings.constraint) {
      var piece: UnsafePointer<CChar>?
      var bytes: Int64 = 0
      var wanted = true
      while try checked(moec_app_next(generation, &piece, &bytes)) == 1 {
        guard wanted else { continue }
        wanted = try each(text(piece, bytes))
        if !wanted { _ = try checked(moec_app_cancel(generation)) }
      }
      return try stats(of: generation)
    }
  }

  private func hold(_ generation: Int64) {
    lock.lock()
    running = generation
    lock.unlock()
  }
}

private func stats(of generation: Int64) throws -> Stats {
  var stats = moec_app_stats()
  stats.size = sizeOf(moec_app_stats.self)
  _ = try checked(moec_app_stats_of(generation, &stats))
  return Stats(
    promptTokens: Int(stats.prompt_tokens), reusedTokens: Int(stats.reused_tokens), newTokens: Int(stats.new_tokens),
    prefillSeconds: stats.prefill_seconds, decodeSeconds: stats.decode_seconds,
    isWhole: [MOEC_APP_STOP_TOKEN, MOEC_APP_STOP_STRING, MOEC_APP_COMPLETE].contains(Int(stats.stopped)))
}

private func part(of segment: moec_app_segment) -> Part {
  switch Int(segment.kind) {
  case MOEC_APP_TEXT: return .text(text(segment.text, segment.bytes))
  case MOEC_APP_THINKING: return .thinking(text(segment.text, segment.bytes))
  default: return .call(Call(name: String(cString: segment.name), arguments: String(cString: segment.arguments)))
  }
}

/// The number that a function gave; MoecError where it failed.
private func checked<Number: SignedInteger>(_ given: Number) throws -> Number {
  if given < 0 { throw MoecError.last }
  return given
}

/// The ids of a function that writes them; a first call gives their number.
private func numbers(_ call: (UnsafeMutablePointer<Int32>?, Int64) -> Int64) throws -> [Int32] {
  let count = try checked(call(nil, 0))
  var ids = [Int32](repeating: 0, count: Int(count))
  _ = try ids.withUnsafeMutableBufferPointer { try checked(call($0.baseAddress, count)) }
  return ids
}

private func text(_ begin: UnsafePointer<CChar>?, _ bytes: Int64) -> String {
  guard let begin else { return "" }
  return String(decoding: UnsafeRawBufferPointer(start: begin, count: Int(bytes)), as: UTF8.self)
}

/// Of a structure of C, as its first member has it: with the padding at its end.
private func sizeOf<Structure>(_ type: Structure.Type) -> UInt32 { UInt32(MemoryLayout<Structure>.stride) }

private func path(_ file: URL) throws -> String {
  if !file.isFileURL || file.path.utf8.contains(0) { throw MoecError("\(file) is no file; give the URL of one") }
  return file.path
}

/// Texts and calls as C has them, until this is released.
private final class Texts {
  private var texts: [UnsafeMutablePointer<CChar>] = []
  private var calls: [UnsafeMutablePointer<moec_app_call>] = []

  deinit {
    texts.forEach { free($0) }
    calls.forEach { $0.deallocate() }
  }

  /// A text ends at a zero byte in C: one inside is an error instead of a text that is cut off.
  func add(_ text: String) throws -> UnsafePointer<CChar> {
    if text.utf8.contains(0) { throw MoecError("a text holds a zero byte; leave it out") }
    guard let copy = strdup(text) else { throw MoecError("out of memory") }
    texts.append(copy)
    return UnsafePointer(copy)
  }

  func add(_ given: [Call]) throws -> UnsafePointer<moec_app_call>? {
    if given.isEmpty { return nil }
    let rows = try given.map { moec_app_call(name: try add($0.name), arguments: try add($0.arguments)) }
    let copy = UnsafeMutablePointer<moec_app_call>.allocate(capacity: rows.count)
    copy.initialize(from: rows, count: rows.count)
    calls.append(copy)
    return UnsafePointer(copy)
  }
}
