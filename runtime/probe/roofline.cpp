// Measures the limits of this machine per thread: bytes read from DRAM, and integer operations in registers.
//   roofline THREADS MEGABYTES SECONDS -> one JSON object on standard output
// The integer peak is that of the instruction the kernel of the best instruction set is made of, on independent registers.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

uint64_t read_all(const uint64_t* data, size_t words) {
  uint64_t s[8] = {};
  for (size_t i = 0; i + 64 <= words; i += 64) {
#if defined(__AVX512F__)
    __m512i a = _mm512_setzero_si512();
    for (int j = 0; j < 64; j += 8) a = _mm512_xor_si512(a, _mm512_loadu_si512(data + i + j));
    s[0] ^= uint64_t(_mm512_reduce_add_epi64(a));
#else
    for (int j = 0; j < 64; j += 8) {
      for (int l = 0; l < 8; ++l) s[l] ^= data[i + j + l];
    }
#endif
  }
  uint64_t total = 0;
  for (uint64_t v : s) total ^= v;
  return total;
}

// Returns the multiply and add operations done; `sink` keeps them from being dropped.
template <int kRounds>
double multiply(volatile int32_t* sink) {
#if defined(__AVX512VNNI__)
  __m512i s[16], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  for (auto& v : s) v = _mm512_setzero_si512();
  for (int r = 0; r < kRounds; ++r) {
    for (auto& v : s) v = _mm512_dpbusd_epi32(v, a, b);
    asm volatile("" : "+v"(a));
  }
  for (int i = 1; i < 16; ++i) s[0] = _mm512_add_epi32(s[0], s[i]);
  *sink = _mm512_reduce_add_epi32(s[0]);
  return 16.0 * 128 * kRounds;
#elif defined(__AVX2__)
  __m256i s[10], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
  for (auto& v : s) v = _mm256_setzero_si256();
  for (int r = 0; r < kRounds; ++r) {
    for (auto& v : s) {
#if defined(__AVXVNNI__)
      v = _mm256_dpbusd_avx_epi32(v, a, b);
#else
      v = _mm256_add_epi16(v, _mm256_maddubs_epi16(a, b));
#endif
    }
    asm volatile("" : "+x"(a));
  }
  for (int i = 1; i < 10; ++i) s[0] = _mm256_add_epi32(s[0], s[i]);
  *sink = _mm256_extract_epi32(s[0], 0);
  return 10.0 * 64 * kRounds;
#elif defined(__ARM_FEATURE_DOTPROD)
  int32x4_t s[16];
  int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(5);
  for (auto& v : s) v = vdupq_n_s32(0);
  for (int r = 0; r < kRounds; ++r) {
    for (auto& v : s) v = vdotq_s32(v, a, b);
    asm volatile("" : "+w"(a));
  }
  for (int i = 1; i < 16; ++i) s[0] = vaddq_s32(s[0], s[i]);
  *sink = vaddvq_s32(s[0]);
  return 16.0 * 32 * kRounds;
#else
  *sink = kRounds;
  return 0;
#endif
}

// work(thread) repeatedly on every thread for `seconds`; the sum of what it returns, per second.
template <typename Work>
double rate(int threads, double seconds, Work work) {
  std::atomic<int> ready{0};
  std::vector<double> done(size_t(threads), 0.0), took(size_t(threads), 0.0);
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) {
    all.emplace_back([&, i] {
      work(i);
      ready.fetch_add(1);
      while (ready.load() < threads) std::this_thread::yield();
      const double begin = now();
      do done[size_t(i)] += work(i);
      while (now() - begin < seconds);
      took[size_t(i)] = now() - begin;
    });
  }
  for (auto& t : all) t.join();
  double sum = 0;
  for (int i = 0; i < threads; ++i) sum += done[size_t(i)] / took[size_t(i)];
  return sum;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s THREADS MEGABYTES SECONDS\n", argv[0]);
    return 2;
  }
  const int threads = std::atoi(argv[1]);
  const size_t words = size_t(std::atoi(argv[2])) << 17;  // of 8 bytes, all threads together
  const double seconds = std::atof(argv[3]);
  if (threads < 1 || threads > 256 || words < 4096 || !(seconds > 0)) return 2;
  std::vector<uint64_t> data(words);
  for (size_t i = 0; i < words; ++i) data[i] = i * 0x9E3779B97F4A7C15u;
  std::atomic<uint64_t> sink{0};
  const size_t share = words / size_t(threads);
  const double bytes = rate(threads, seconds, [&](int i) {
    sink.fetch_xor(read_all(data.data() + size_t(i) * share, share));
    return double(share) * 8;
  });
  volatile int32_t kept = 0;
  const double operations = rate(threads, seconds, [&](int) {
    volatile int32_t mine = 0;
    const double n = multiply<4096>(&mine);
    return n;
  });
  std::printf("{\"threads\": %d, \"read_gb_per_s\": %.2f, \"int8_gop_per_s\": %.1f, \"check\": %llu}\n", threads, bytes / 1e9,
              operations / 1e9, static_cast<unsigned long long>(sink.load() + uint64_t(kept)));
  return 0;
}
