// Answers that follow a JSON Schema, by llguidance's C library, which the application links (runtime/include/moec_llguidance.h).
import CMoec
import CMoecSchema
import Foundation
import MoecApp

public struct SchemaError: LocalizedError, CustomStringConvertible {
  public let description: String
  public var errorDescription: String? { description }
}

/// The vocabulary of a model, made once; the model stays open as long as it.
public final class SchemaVocabulary {
  private let model: MoecModel
  fileprivate let tokens: OpaquePointer

  /// folder: the model's, whose tokenizer.json is read.
  public init(model: MoecModel, folder: URL) throws {
    let tokenizer = try String(contentsOf: folder.appendingPathComponent("tokenizer.json"), encoding: .utf8)
    self.model = model
    tokens = try made { moec_llguidance_tokenizer(model.artifact, tokenizer, $0, $1) }
  }

  deinit { llg_free_tokenizer(tokens) }
}

/// What one answer may be: for `Settings.constraint`, a new one for every answer.
public final class JSONSchema: MoecConstraint {
  private let vocabulary: SchemaVocabulary
  private let matcher: OpaquePointer

  /// A schema that cannot be enforced is an error.
  public init(_ schema: String, vocabulary: SchemaVocabulary) throws {
    self.vocabulary = vocabulary
    matcher = try made { moec_llguidance_matcher(vocabulary.tokens, "json_schema", schema, $0, $1) }
  }

  deinit { llg_free_matcher(matcher) }

  public var constraint: moec_app_constraint { moec_llguidance_constraint(matcher) }
}

private func made(_ call: (UnsafeMutablePointer<CChar>, Int) -> OpaquePointer?) throws -> OpaquePointer {
  var reason = [CChar](repeating: 0, count: 512)
  if let found = reason.withUnsafeMutableBufferPointer({ call($0.baseAddress!, $0.count) }) { return found }
  throw SchemaError(description: String(cString: reason))
}
