// What samples/ios/Sources/MoecModel uses of ExecuTorch's module of this name, declared so that the class can be compiled where
// there is no Apple machine. Nothing here runs.
import Foundation

public protocol ValueConvertible {}
public protocol ValueSequenceConstructible { init() }

extension Int: ValueSequenceConstructible {}
extension Array: ValueSequenceConstructible where Element == Int {}

public final class Tensor<Scalar>: ValueConvertible, ValueSequenceConstructible {
  public init() {}
  public init(_ scalars: [Scalar], shape: [Int] = []) {}
  public func scalars() -> [Scalar] { [] }
}

public struct TensorMetadata { public let shape: [Int] = [] }
public struct MethodMetadata { public let inputTensorMetadata: [Int: TensorMetadata] = [:] }
public enum ModuleLoadMode { case file, mmap }

public final class Module {
  public init(filePath: String, loadMode: ModuleLoadMode = .file) {}
  public func load(_ method: String) throws {}
  public func methodMetadata(_ method: String) throws -> MethodMetadata { MethodMetadata() }
  public func execute<Output: ValueSequenceConstructible>(_ method: String) throws -> Output { Output() }
  public func forward<Output: ValueSequenceConstructible>(_ inputs: [ValueConvertible]) throws -> Output { Output() }
}
