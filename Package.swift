// swift-tools-version:5.9
// A package around one artifact: MoecModel for the GPU (moec compile --target metal), MoecApp for the CPU (--target xnnpack).
// It lies here so that an application can add it by the repository's address; its sources are in samples/ios.
import PackageDescription

let sources = "samples/ios/Sources"

let package = Package(
  name: "moec",
  platforms: [.iOS(.v17), .macOS(.v14)],
  products: ["MoecModel", "MoecApp", "MoecSchema"].map { Product.library(name: $0, targets: [$0]) },
  dependencies: [
    // The branch of the ExecuTorch version that the artifact's manifest names (versions.executorch).
    .package(url: "https://github.com/pytorch/executorch.git", branch: "swiftpm-1.5.1")
  ],
  targets: [
    // The header of the C library of applications; an application builds the library and links it.
    .systemLibrary(name: "CMoec", path: "runtime/include"),
    .target(
      name: "MoecApp",
      dependencies: ["CMoec"],
      path: "\(sources)/MoecApp",
      linkerSettings: [.linkedLibrary("moec_runtime")]),
    // Structured output, with llguidance's header and C library, which an application builds as well.
    .systemLibrary(name: "CMoecSchema", path: "\(sources)/CMoecSchema"),
    .target(
      name: "MoecSchema",
      dependencies: ["CMoec", "CMoecSchema", "MoecApp"],
      path: "\(sources)/MoecSchema",
      linkerSettings: [.linkedLibrary("llguidance")]),
    // The structure checks of the native runtime, compiled from its sources; they need neither ExecuTorch nor kernels.
    .target(name: "MoecCheck", path: "\(sources)/MoecCheck"),
    // The backend registers itself when it is loaded, and nothing refers to a symbol of it: the application links with
    // -all_load. A package that sets such flags itself cannot be added by its address.
    .target(
      name: "MoecModel",
      dependencies: [
        "MoecCheck",
        .product(name: "executorch", package: "executorch"),
        .product(name: "backend_mlx", package: "executorch"),
      ],
      path: "\(sources)/MoecModel"),
  ],
  cxxLanguageStandard: .cxx17
)
