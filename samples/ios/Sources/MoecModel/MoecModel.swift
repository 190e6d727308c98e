// One artifact with its KV cache: token ids in, logits out. Tokenizing is the application's.
import ExecuTorch
import Foundation
import MoecCheck

public enum MoecError: Error {
  case noModel(URL)
  case noTokens(URL)  // the file's `forward` takes no tokens: another compiler wrote it
  case doesNotFit(tokens: Int, position: Int, context: Int)
  case notInVocabulary(Int64)
  case damaged(URL, reason: String)
  case notNumbers  // NaN among the logits: the weights are damaged
}

/// Not thread-safe: use it from one queue. Only `forward` is loaded: every loaded method has a KV cache of its own.
public final class MoecModel {
  private let module: Module
  public let vocabSize: Int
  public let context: Int
  private let maxTokens: Int
  public let stopTokens: Set<Int64>
  public private(set) var position = 0

  /// `artifact`: the folder that `moec compile --target metal` wrote.
  public init(artifact: URL) throws {
    // Before MLX is first used: newer GPUs round the operands of float32 products to TF32, and a router that is rounded
    // selects other experts.
    setenv("MLX_ENABLE_TF32", "0", 1)
    let file = artifact.appendingPathComponent("model.pte")
    guard FileManager.default.fileExists(atPath: file.path) else { throw MoecError.noModel(file) }
    // ExecuTorch trusts the structure of a file, so it is checked first.
    var reason = [CChar](repeating: 0, count: 512)
    guard moec_check_file(file.path, "MLXBackend", &reason, reason.count) == 0 else {
      throw MoecError.damaged(file, reason: String(cString: reason))
    }
    let module = Module(filePath: file.path, loadMode: .mmap)
    try module.load("forward")
    // Methods of the file that return constants; the module converts them, or throws when there is none of that name.
    let vocabSize: Int = try module.execute("get_vocab_size")
    let context: Int = try module.execute("get_max_context_len")
    let stopTokens: [Int] = try module.execute("get_eos_ids")
    // The longest chunk of one call is the upper bound of the first input, tokens [1, T].
    guard let maxTokens = try module.methodMetadata("forward").inputTensorMetadata[0]?.shape.last else {
      throw MoecError.noTokens(file)
    }
    self.module = module
    self.vocabSize = vocabSize
    self.context = context
    self.maxTokens = maxTokens
    self.stopTokens = Set(stopTokens.map { Int64($0) })
  }

  /// Append tokens; the logits of the last one. A prompt goes through in chunks of up to `maxTokens` tokens, at least 32
  /// of them while there are enough: below that the GPU reads an expert's weights once for every token.
  public func append(_ ids: [Int64]) throws -> [Float] {
    guard !ids.isEmpty, position + ids.count <= context else {
      throw MoecError.doesNotFit(tokens: ids.count, position: position, context: context)
    }
    if let wrong = ids.first(where: { $0 < 0 || $0 >= Int64(vocabSize) }) { throw MoecError.notInVocabulary(wrong) }
    var logits: [Float] = []
    for begin in stride(from: 0, to: ids.count, by: maxTokens) {
      let chunk = Array(ids[begin..<min(begin + maxTokens, ids.count)])
      let tokens = Tensor<Int64>(chunk, shape: [1, chunk.count])
      let start = Tensor<Int64>([Int64(position)], shape: [1])
      let output: Tensor<Float> = try module.forward([tokens, start])
      logits = Array(output.scalars().suffix(vocabSize))
      guard logits.count == vocabSize, !logits.contains(where: { $0.isNaN }) else { throw MoecError.notNumbers }
      position += chunk.count
    }
    return logits
  }

  /// Start another conversation. The cache is not cleared: attention ends at the current position.
  public func reset() { position = 0 }

  /// Greedy generation; `each` is called with every token and stops it by returning false.
  public func generate(prompt: [Int64], limit: Int, each: (Int64) -> Bool) throws {
    var logits = try append(prompt)
    for _ in 0..<limit {
      guard let best = logits.indices.max(by: { logits[$0] < logits[$1] }) else { return }
      let token = Int64(best)
      if stopTokens.contains(token) || !each(token) || position == context { return }
      logits = try append([token])
    }
  }
}
