// What tests/targets/test_samples_ios.py runs of the Swift classes: a line for each check, "name<tab>what it found".
import CMoec
import Foundation
import MoecApp

func say(_ name: String, _ found: Any) {
  let line = "\(name)\t\(found)".replacingOccurrences(of: "\n", with: "\\n")
  FileHandle.standardError.write((line + "\n").data(using: .utf8)!)
}

func text(_ conversation: Conversation, _ prompt: String, _ settings: Settings) throws -> String {
  var found = ""
  try conversation.continueText(prompt, settings: settings) { piece in
    found += piece
    return true
  }
  return found
}

func refused(_ name: String, _ call: () throws -> Void) {
  do {
    try call()
    say(name, "not refused")
  } catch {
    say(name, "\(type(of: error)): \(error)")
  }
}

func with(_ settings: Settings, _ change: (inout Settings) -> Void) -> Settings {
  var changed = settings
  change(&changed)
  return changed
}

struct Mine: Error {}

/// Calls something on another thread, again and again until it is told to end.
final class Repeating: @unchecked Sendable {
  private let lock = NSLock()
  private let ended = DispatchSemaphore(value: 0)
  private var over = false

  init(_ call: @escaping @Sendable () -> Void) {
    Thread.detachNewThread {
      while !self.lock.withLock({ self.over }) { call() }
      self.ended.signal()
    }
  }

  func end() {
    lock.withLock { over = true }
    ended.wait()
  }
}

/// Only these tokens, one after the other.
final class Only: MoecConstraint {
  private var tokens: ArraySlice<Int32>
  private let asked: () -> Void

  /// asked: called when an answer takes the constraint, which it does before there is a generation.
  init(_ tokens: [Int32], asked: @escaping () -> Void = {}) { (self.tokens, self.asked) = (tokens[...], asked) }

  var constraint: moec_app_constraint {
    asked()
    var made = moec_app_constraint()
    made.size = UInt32(MemoryLayout<moec_app_constraint>.stride)
    made.user = Unmanaged.passUnretained(self).toOpaque()
    made.allowed = { user, mask, _ in
      guard let token = Only.of(user).tokens.first else { return -1 }
      mask![Int(token / 32)] |= 1 << UInt32(token % 32)
      return 0
    }
    made.take = { user, token in
      let own = Only.of(user)
      return own.tokens.popFirst() != token ? -1 : own.tokens.isEmpty ? 1 : 0
    }
    return made
  }

  private static func of(_ user: UnsafeMutableRawPointer?) -> Only { Unmanaged<Only>.fromOpaque(user!).takeUnretainedValue() }
}

func check(_ folder: String, _ kept: String, _ prompt: String) throws {
  let model = try MoecModel(folder: URL(fileURLWithPath: folder), threads: 1)
  let info = model.info
  say("info", [info.vocabulary, info.context, info.threads, info.hasChat ? 1 : 0, info.hasTools ? 1 : 0])
  let given = try model.recommended
  say("recommended", [given.temperature!, Double(given.topK!), given.topP!, given.minP!, given.repeatPenalty!])

  var all = Settings()
  (all.limit, all.temperature, all.topK, all.topP, all.minP) = (40, 0.9, 50, 0.95, 0.001)
  (all.repeatPenalty, all.presencePenalty, all.frequencyPenalty) = (1.1, 0.2, 0.1)
  (all.biases, all.seed, all.speculate) = ([5: 2.0, 7: -.infinity], UInt64.max - 2, false)
  let first = try model.conversation()
  say("all", try text(first, prompt, all))
  let sampled = with(Settings()) { ($0.limit, $0.temperature, $0.seed) = (40, 0.9, 7) }
  let whole = try text(first, prompt, sampled)
  say("sampled", whole)
  let stop = String(whole.dropFirst(15).prefix(3))
  let cut = try text(first, prompt, with(sampled) { $0.stops = ["never said", stop] })
  say("stops", whole.components(separatedBy: stop)[0] == cut)

  // sessions
  try first.save(to: URL(fileURLWithPath: kept))
  let second = try model.conversation()
  try second.restore(from: URL(fileURLWithPath: kept))
  let forked = try first.fork()
  let (a, b, c) = (try first.tokens, try second.tokens, try forked.tokens)
  say("kept", a == b && a == c && !a.isEmpty)
  try first.rewind(to: 2)
  let (left, others) = (try first.tokens.count, try forked.tokens.count)
  say("rewound", left == 2 && others > 2)
  let scored = try second.continueText(prompt, settings: with(sampled) { ($0.limit, $0.topScores) = (3, 2) }) { _ in true }
  say("stats", "\(scored.end) \(scored.newTokens) \(scored.reusedTokens == scored.promptTokens - 1) \(scored.isWhole)")
  say("scores", scored.scores.map { one in [one.taken.token] + one.likeliest.map { $0.token } })
  say("likely", scored.scores.map { String(format: "%.9f", $0.taken.logProbability) }.joined(separator: " "))

  // ends
  var pieces = 0
  let ended = try first.continueText(prompt, settings: sampled) { _ in
    pieces += 1
    return false
  }
  say("given up", "\(ended.end) \(pieces)")
  let endless = with(Settings()) { ($0.limit, $0.onFull, $0.keepFirst) = (1_000_000, .dropOldest, 5) }
  Thread.detachNewThread {
    Thread.sleep(forTimeInterval: 0.3)
    first.stop()
  }
  let stopped = try first.continueText(prompt, settings: endless) { _ in true }
  say("stopped", stopped.end)
  say("endless", [stopped.droppedTokens > 200, try first.tokens.count <= 512])
  refused("thrown") { try first.continueText(prompt, settings: sampled) { _ in throw Mine() } }
  say("goes on", try text(first, prompt, sampled) == whole)

  // constraints
  let wanted = try model.tokenize(" a \u{1F642} b", plain: true)
  var answer = ""
  let followed = try first.continueText(prompt, settings: with(sampled) { $0.constraint = Only(wanted) }) { piece in
    answer += piece
    return true
  }
  say("constrained", [followed.end == .complete, followed.isWhole, answer == (try model.text(of: wanted))])
  func early() -> Settings {
    let constraint = Only(wanted) {
      let stopped = DispatchSemaphore(value: 0)
      Thread.detachNewThread {
        first.stop()
        stopped.signal()
      }
      stopped.wait()
    }
    return with(sampled) { ($0.constraint, $0.fit) = (constraint, true) }
  }
  let hello = [Message(role: "user", content: "Hi")]
  let stoppedEarly = [
    try first.answer(hello, settings: early()) { _ in true },
    try first.answerInParts(hello, settings: early()) { _ in true },
    try first.continueText(prompt, settings: early()) { _ in true },
  ]
  say("stopped early", stoppedEarly.map { "\($0.end) \($0.newTokens)" })
  let one = with(Settings()) { $0.limit = 1 }
  let afterStops: [() throws -> Stats] = [
    { try first.answer(hello, settings: one) { _ in true } },
    { try first.answerInParts(hello, settings: one) { _ in true } },
    { try first.continueText(prompt, settings: one) { _ in true } },
  ]
  let ends = try afterStops.map { answer in
    first.stop()
    return try answer().end
  }
  say("stopped before", ends.map { "\($0)" })
  refused("nothing allowed") { _ = try text(first, prompt, with(sampled) { $0.constraint = Only([]) }) }

  // parts
  let messages = [Message(role: "system", content: "Be brief."), Message(role: "user", content: "Name a \u{1F642} city.")]
  let short = with(Settings()) { ($0.limit, $0.temperature, $0.seed) = (30, 0.9, 5) }
  var spoken = ""
  try first.answer(messages, settings: short) { piece in
    spoken += piece
    return true
  }
  say("answer", spoken)
  var parts: [String] = []
  try first.answerInParts(messages, settings: short) { part in
    if case .text(let text) = part { parts.append(text) } else { parts.append("no text") }
    return true
  }
  say("parts", parts.joined() == spoken)
  var told = 0
  try first.answerInParts(messages, settings: short) { _ in
    told += 1
    return false
  }
  say("told", told)
  let tools = #"[{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"n": 1.5}}}]"#
  let calls = [
    Message(role: "user", content: "Hi"),
    Message(role: "assistant", content: "", calls: [Call(name: "f", arguments: #"{"n": 2}"#)]),
    Message(role: "tool", content: "two"),
  ]
  var long = ""
  try first.answerInParts(calls, tools: tools, settings: with(Settings()) { $0.limit = 8 }) { part in
    if case .text(let text) = part { long += text } else { long += "no text" }
    return true
  }
  say("tools", long)
  let question = Message(role: "user", content: String(repeating: "Name a city. ", count: 150))
  let reply = Message(role: "assistant", content: "Rome.")
  var fitting = ""
  let many = [messages[0], question, reply, question, reply, messages[1]]
  let fitted = try first.answer(many, settings: with(short) { $0.fit = true }) { piece in
    fitting += piece
    return true
  }
  say("fit", "\(fitted.droppedMessages) \(fitting == spoken)")

  // beginnings that are kept, and drafts
  try model.keepPrefixes(in: URL(fileURLWithPath: kept + ".prefixes"))
  let begun = try [1, 2].map { _ in try model.conversation().prepare("start", system: "Be brief.", tools: tools).reusedTokens }
  let known = try model.prefixTokens("start")
  say("prepared", [begun[0] == 0, begun[1] == known, known > 20, try model.prefixWarning.isEmpty])
  let next = try model.conversation().answerInParts(
    [messages[0]] + calls, tools: tools, settings: with(Settings()) { $0.limit = 8 }) { _ in true }
  say("begun", next.reusedTokens == known)
  refused("name") { try first.keepPrefix("a/b") }
  say("forgotten", [try model.forgetPrefix("start"), try model.forgetPrefix("start")])
  let stops = Repeating { first.stop() }
  var prepared: Stats
  var tries = 0
  repeat {  // until the other thread was as fast
    _ = try model.forgetPrefix("start")
    try first.rewind(to: 0)
    tries += 1
    prepared = try first.prepare("start", system: "Be brief.", tools: tools)
  } while prepared.end != .cancelled && tries < 300
  stops.end()
  let unkept = try model.prefixTokens("start")
  say("stopped prefix", "\(prepared.end) \(unkept) \(try first.prepare("start", system: "Be brief.", tools: tools).end)")
  try model.keepPrefixes(in: nil)
  let drafting = try model.conversation()
  say("draft", [try text(first, prompt, with(sampled) { $0.draft = drafting }) == whole, try !drafting.tokens.isEmpty])

  // faults
  refused("too long") { try first.answer(many) { _ in true } }
  refused("zero") { try first.answer([Message(role: "user", content: "a\0b")]) { _ in true } }
  refused("role") { try first.answer([Message(role: "nobody", content: "Hi")]) { _ in true } }
  refused("top p") { _ = try text(first, prompt, with(sampled) { $0.topP = 1.5 }) }
  refused("not a number") { _ = try text(first, prompt, with(sampled) { $0.temperature = .nan }) }
  refused("bias") { _ = try text(first, prompt, with(sampled) { $0.biases = [100_000_000: 1] }) }
  refused("definitions") { try first.answerInParts(messages, tools: "[] x") { _ in true } }
  refused("folder") { _ = try MoecModel(folder: URL(fileURLWithPath: "/not \u{1F642} here")) }
  refused("no file") { _ = try MoecModel(folder: URL(string: "https://example.com/a")!) }
}

let arguments = CommandLine.arguments
do {
  try check(arguments[1], arguments[2], arguments[3])
} catch {
  say("failed", error)
  exit(1)
}
