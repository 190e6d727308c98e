// What the classes share about C: errors, ids, texts.
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

/// The number that a function gave; MoecError where it failed.
func checked<Number: SignedInteger>(_ given: Number) throws -> Number {
  if given < 0 { throw MoecError.last }
  return given
}

/// The elements that a function writes, whose number a first call gives; there may be more or fewer by the second one.
func written<Element>(_ empty: Element, _ call: (UnsafeMutablePointer<Element>?, Int64) -> Int64) throws -> [Element] {
  var found: [Element] = []
  var count = Int(try checked(call(nil, 0)))
  while count > found.count {
    found = [Element](repeating: empty, count: count)
    count = Int(try found.withUnsafeMutableBufferPointer { try checked(call($0.baseAddress, Int64($0.count))) })
  }
  return Array(found.prefix(count))
}

func text(_ begin: UnsafePointer<CChar>?, _ bytes: Int64) -> String {
  guard let begin else { return "" }
  return String(decoding: UnsafeRawBufferPointer(start: begin, count: Int(bytes)), as: UTF8.self)
}

/// Of a structure of C, as its first member has it: with the padding at its end.
func sizeOf<Structure>(_ type: Structure.Type) -> UInt32 { UInt32(MemoryLayout<Structure>.stride) }

func path(_ file: URL) throws -> String {
  if !file.isFileURL || file.path.utf8.contains(0) { throw MoecError("\(file) is no file; give the URL of one") }
  return file.path
}

/// Texts and calls as C has them, until this is released.
final class Texts {
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
