// swift-tools-version:5.9
// A package around one artifact: MoecModel for the GPU (moec compile --target metal), MoecApp for the CPU (--target xnnpack).
// Link one from an app target.
import PackageDescription

let package = Package(
  name: "MoecModel",
  platforms: [.iOS(.v17), .macOS(.v14)],
  products: ["MoecModel", "MoecApp", "MoecSchema"].map { Product.library(name: $0, targets: [$0]) },
  dependencies: [
    // The branch of the ExecuTorch version that the artifact's manifest names (versions.executorch).
    .package(url: "https://github.com/pytorch/executorch.git", branch: "swiftpm-1.5.1")
  ],
  targets: [
    // The header of the C library of applications; an application builds the library and links it.
    .systemLibrary(name: "CMoec", path: "Sources/CMoec"),
    .target(
      name: "MoecApp",
      dependencies: ["CMoec"],
      path: "Sources/MoecApp",
      linkerSettings: [.linkedLibrary("moec_runtime")]),
    // Structured output, with llguidance's header and C library, which an application builds as well.
    .systemLibrary(name: "CMoecSchema", path: "Sources/CMoecSchema"),
    .target(
      name: "MoecSchema",
      dependencies: ["CMoec", "CMoecSchema", "MoecApp"],
      path: "Sources/MoecSchema",
      linkerSettings: [.linkedLibrary("llguidance")]),
    // The structure checks of the native runtime, compiled from its sources; they need neither ExecuTorch nor kernels.
    .target(
      name: "MoecCheck",
      path: "Sources/MoecCheck",
      cxxSettings: [.unsafeFlags(["-std=c++17"])]),
    .target(
      name: "MoecModel",
      dependencies: [
        "MoecCheck",
        .product(name: "executorch", package: "executorch"),
        .product(name: "backend_mlx", package: "executorch"),
      ],
      linkerSettings: [
        // The backend registers itself when it is loaded; nothing refers to a symbol of it.
        .unsafeFlags(["-Wl,-all_load"])
      ])
  ]
)
