// The module that an application adds (docs/android.md): in its settings.gradle.kts
//   include(":moec")
//   project(":moec").projectDir = file("../moec/samples/android")   // a checkout of moec
// in its own build.gradle.kts
//   implementation(project(":moec"))
// and in its gradle.properties where ExecuTorch was installed for the ABI: moec.executorch=/path/to/et-install
plugins {
    id("com.android.library")
}
if (extensions.findByName("kotlin") == null) { // before version 9 the Android plugin did not compile Kotlin itself
    apply(plugin = "org.jetbrains.kotlin.android")
    tasks.withType<org.jetbrains.kotlin.gradle.tasks.KotlinJvmCompile>().configureEach {
        compilerOptions.jvmTarget.set(org.jetbrains.kotlin.gradle.dsl.JvmTarget.JVM_17)
    }
}

val executorch = providers.gradleProperty("moec.executorch").orNull
    ?: error("moec.executorch is not set: build ExecuTorch for Android (docs/android.md) and name its install folder")

android {
    namespace = "dev.moec"
    compileSdk = 35
    ndkVersion = providers.gradleProperty("moec.ndk").getOrElse("28.0.13004108") // 16 KiB pages without a flag

    defaultConfig {
        minSdk = 26 // as ExecuTorch is built
        ndk { abiFilters += "arm64-v8a" }
        consumerProguardFiles("consumer-rules.pro")
        externalNativeBuild {
            cmake {
                arguments += listOf("-DCMAKE_BUILD_TYPE=Release", "-Dexecutorch_DIR=$executorch/lib/cmake/ExecuTorch")
            }
        }
    }
    externalNativeBuild {
        cmake {
            path = file("src/main/cpp/CMakeLists.txt")
            version = "3.28.0+"
        }
    }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}
