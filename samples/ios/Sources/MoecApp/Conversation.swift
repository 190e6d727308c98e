// Tokens with their caches: text in, text out.
import CMoec
import Foundation

/// A conversation with a model; one answer at a time. `stop` may be called from any thread.
public final class Conversation: @unchecked Sendable {
  private let model: MoecModel
  let session: Int64
  private let lock = NSLock()
  private var running: Int64 = 0  // the generation, 0 for none; under the lock
  // Since the answer began: a prompt is rendered before there is a generation to cancel. Under the lock.
  private var stopping = false

  init(model: MoecModel, session: Int64) {
    self.model = model
    self.session = session
  }

  deinit { _ = moec_app_close(session) }

  /// Answer a conversation; `each` gets every piece of the answer and ends it by returning false. Only what is new in the
  /// conversation is computed.
  @discardableResult
  public func answer(_ messages: [Message], settings: Settings = Settings(), each: (String) throws -> Bool) throws -> Stats {
    begin()
    let (ids, dropped) = try prompt(of: messages, tools: nil, settings)
    return try generate(ids, settings, segments: 0, dropped, each: each)
  }

  /// As `answer`, with thinking told from text and calls in the model's own form. tools: definitions in OpenAI's form as
  /// JSON, the same with every turn; nil for none.
  @discardableResult
  public func answerInParts(
    _ messages: [Message], tools: String? = nil, settings: Settings = Settings(), each: (Part) throws -> Bool
  ) throws -> Stats {
    begin()
    let (ids, dropped) = try prompt(of: messages, tools: tools, settings)
    let flags = Int32(tools == nil ? MOEC_APP_SEGMENTS : MOEC_APP_SEGMENTS | MOEC_APP_TOOLS)
    let splitter = try checked(moec_app_splitter(model.artifact, ids, Int64(ids.count), flags))
    defer { _ = moec_app_close(splitter) }
    var wanted = true
    func tell() throws -> Bool {
      var segment = moec_app_segment()
      segment.size = sizeOf(moec_app_segment.self)
      while try wanted && checked(moec_app_next_segment(splitter, &segment)) == 1 { wanted = try each(part(of: segment)) }
      return wanted
    }
    let stats = try generate(ids, settings, segments: flags, dropped) { piece in
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
    begin()
    return try generate(try model.tokenize(text), settings, segments: 0, 0, each: each)
  }

  /// End the answer that runs, from any thread, also while its prompt is rendered; one that is asked for later is not ended.
  public func stop() {
    lock.lock()
    defer { lock.unlock() }
    stopping = true
    if running != 0 { _ = moec_app_cancel(running) }
  }

  /// Another conversation that goes on from here by itself.
  public func fork() throws -> Conversation { Conversation(model: model, session: try checked(moec_app_fork(session))) }

  /// The tokens that it holds.
  public var tokens: [Int32] {
    get throws { try written(0) { moec_app_tokens(session, $0, $1) } }
  }

  /// Forget the tokens from `position` on; 0 for all.
  public func rewind(to position: Int) throws { _ = try checked(moec_app_rewind(session, Int64(position))) }

  /// Keep the conversation in a file, for a process that the system may end.
  public func save(to file: URL) throws { _ = try checked(moec_app_save(session, try path(file))) }

  /// Go on with one that was saved with the same artifact; the conversation stays as it was where that fails.
  public func restore(from file: URL) throws { _ = try checked(moec_app_restore(session, try path(file))) }

  /// Compute what every conversation with this system prompt and these tools begins with, or read it where it was kept before,
  /// and keep it under a name: do so when the application starts. MoecModel.keepPrefixes(in:) comes first. `stop` ends it, too,
  /// with End.cancelled: then nothing is kept.
  @discardableResult
  public func prepare(_ name: String, system: String?, tools: String? = nil) throws -> Stats {
    begin()
    var settings = Settings()
    settings.limit = 0
    let stats = try generate(try model.systemPrompt(system, tools: tools), settings, segments: 0, 0) { _ in true }
    if stats.end != .cancelled { try keepPrefix(name) }
    return stats
  }

  /// Keep the tokens that it holds in the folder of MoecModel.keepPrefixes(in:), under a name in place of what had it.
  public func keepPrefix(_ name: String? = nil) throws {
    let texts = Texts()
    let given = try name.map { try texts.add($0) }
    _ = try withExtendedLifetime(texts) { try checked(moec_app_keep_prefix(session, given)) }
  }

  private func prompt(of messages: [Message], tools: String?, _ settings: Settings) throws -> (ids: [Int32], dropped: Int64) {
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
    let count = Int64(turns.count)
    let room = settings.limit.map { Int64($0) } ?? -1
    var dropped: Int64 = 0
    let ids = try withExtendedLifetime(texts) {
      try written(0) { ids, capacity in
        settings.fit
          ? moec_app_fitting_chat(model.artifact, given, turns, count, room, ids, capacity, &dropped)
          : moec_app_chat_with_tools(model.artifact, given, turns, count, ids, capacity)
      }
    }
    return (ids, dropped)
  }

  private func generate(
    _ prompt: [Int32], _ settings: Settings, segments: Int32, _ dropped: Int64, each: (String) throws -> Bool
  ) throws -> Stats {
    var options = try defaults(of: model.artifact)
    options.temperature = settings.temperature ?? options.temperature
    options.top_k = settings.topK.map { Int32(clamping: $0) } ?? options.top_k
    options.top_p = settings.topP ?? options.top_p
    options.min_p = settings.minP ?? options.min_p
    options.repeat_penalty = settings.repeatPenalty ?? options.repeat_penalty
    options.presence_penalty = settings.presencePenalty ?? options.presence_penalty
    options.frequency_penalty = settings.frequencyPenalty ?? options.frequency_penalty
    options.speculate = settings.speculate.map { $0 ? 1 : 0 } ?? options.speculate
    options.max_new_tokens = settings.limit.map { Int64($0) } ?? -1
    options.seed = settings.seed
    options.segments = segments
    options.top_scores = settings.topScores.map { Int32(clamping: $0) } ?? -1
    options.on_full = settings.onFull.rawValue
    options.keep_first = Int64(settings.keepFirst)
    options.draft = settings.draft?.session ?? 0
    let texts = Texts()
    let stops = try settings.stops.map { Optional(try texts.add($0)) }
    let biases = settings.biases.map { moec_app_bias(token: $0.key, reserved: 0, bias: $0.value) }
    var constraint = settings.constraint?.constraint ?? moec_app_constraint()
    // All that the options point to is copied by the call, but for what the constraint itself points to.
    let generation = try withExtendedLifetime(texts) {
      try stops.withUnsafeBufferPointer { stops in
        try biases.withUnsafeBufferPointer { biases in
          try withUnsafePointer(to: &constraint) { constraint in
            options.stops = stops.baseAddress
            options.stop_count = Int64(stops.count)
            options.biases = biases.baseAddress
            options.bias_count = Int64(biases.count)
            options.constraint = settings.constraint == nil ? nil : constraint
            return try checked(moec_app_generate(session, prompt, Int64(prompt.count), &options))
          }
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
      return try Stats(of: generation, scored: settings.topScores != nil, droppedMessages: dropped)
    }
  }

  private func begin() {
    lock.lock()
    stopping = false
    lock.unlock()
  }

  private func hold(_ generation: Int64) {
    lock.lock()
    defer { lock.unlock() }
    running = generation
    if stopping && generation != 0 { _ = moec_app_cancel(generation) }
  }
}

private func part(of segment: moec_app_segment) -> Part {
  switch Int(segment.kind) {
  case MOEC_APP_TEXT: return .text(text(segment.text, segment.bytes))
  case MOEC_APP_THINKING: return .thinking(text(segment.text, segment.bytes))
  default: return .call(Call(name: String(cString: segment.name), arguments: String(cString: segment.arguments)))
  }
}
