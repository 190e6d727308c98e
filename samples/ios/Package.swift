// swift-tools-version:5.9
// A package around one artifact for the GPU (moec compile --target metal). Link it from an app target.
import PackageDescription

let package = Package(
  name: "MoecModel",
  platforms: [.iOS(.v17), .macOS(.v14)],
  products: [.library(name: "MoecModel", targets: ["MoecModel"])],
  dependencies: [
    // The branch of the ExecuTorch version that the artifact's manifest names (versions.executorch).
    .package(url: "https://github.com/pytorch/executorch.git", branch: "swiftpm-1.5.1")
  ],
  targets: [
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
