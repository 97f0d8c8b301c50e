// Copies of blocks that are summed on their way, so that memory is read once and written once.
//
// The sum is XXH3_64 of more than 240 bytes without a seed, as github.com/Cyan4973/xxHash specifies it. Large copies go
// past the caches: a store that does not first read what it overwrites leaves a third of the memory's work out.
#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

constexpr int STRIPE = 64, STRIPES = 16, SECRET_NBYTES = 192;
constexpr uint64_t PRIME32_1 = 0x9E3779B1, PRIME32_2 = 0x85EBCA77, PRIME32_3 = 0xC2B2AE3D;
constexpr uint64_t PRIME64_1 = 0x9E3779B185EBCA87, PRIME64_2 = 0xC2B2AE3D27D4EB4F, PRIME64_3 = 0x165667B19E3779F9;
constexpr uint64_t PRIME64_4 = 0x85EBCA77C2B2AE63, PRIME64_5 = 0x27D4EB2F165667C5, MIX = 0x165667919E3779F9;
// of the specification, in words
constexpr uint64_t SECRET[SECRET_NBYTES / 8] = {
    0xBE4BA423396CFEB8, 0x1CAD21F72C81017C, 0xDB979083E96DD4DE, 0x1F67B3B7A4A44072, 0x78E5C0CC4EE679CB,
    0x2172FFCC7DD05A82, 0x8E2443F7744608B8, 0x4C263A81E69035E0, 0xCB00C391BB52283C, 0xA32E531B8B65D088,
    0x4EF90DA297486471, 0xD8ACDEA946EF1938, 0x3F349CE33F76FAA8, 0x1D4F0BC7C7BBDCF9, 0x3159B4CD4BE0518A,
    0x647378D9C97E9FC8, 0xC3EBD33483ACC5EA, 0xEB6313FAFFA081C5, 0x49DAF0B751DD0D17, 0x9E68D429265516D3,
    0xFCA1477D58BE162B, 0xCE31D07AD1B8F88F, 0x280416958F3ACB45, 0x7E404BBBCAFBD7AF};
// how far ahead memory is asked for
constexpr int AHEAD = 4096;

#if defined(__AVX512F__)
constexpr int WIDTH = 64;
#elif defined(__AVX2__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif
constexpr int PARTS = STRIPE / WIDTH;

// A register of words. A stripe is a few of them: compilers make poor work of vectors that no register holds.
typedef uint64_t Words __attribute__((vector_size(WIDTH)));

inline Words load(const void* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

inline Words secret(int offset) { return load(reinterpret_cast<const char*>(SECRET) + offset); }

// Each word in the place of its neighbour.
inline Words swapped(Words words) {
#if defined(__AVX512F__)
  return (Words)_mm512_shuffle_epi32((__m512i)words, _MM_PERM_BADC);
#elif defined(__AVX2__)
  return (Words)_mm256_shuffle_epi32((__m256i)words, 0x4E);
#else
  return Words{words[1], words[0]};
#endif
}

// Past the caches where there are instructions for that.
inline void store_past(char* to, Words words) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)words);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)words);
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)words);
#else
  std::memcpy(to, &words, sizeof words);
#endif
}

struct Sum {
  alignas(STRIPE) uint64_t words[STRIPE / 8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                                               PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
  Words part[PARTS];

  Sum() { std::memcpy(part, words, sizeof part); }

  void add(int at, Words data, Words key) {
    const Words mixed = data ^ key;
    part[at] += swapped(data) + (mixed & 0xFFFFFFFF) * (mixed >> 32);
  }

  void scramble() {
    for (int at = 0; at < PARTS; ++at) {
      const Words mixed = part[at] ^ (part[at] >> 47) ^ secret(SECRET_NBYTES - STRIPE + at * WIDTH);
      // the factor has 32 bits
      part[at] = (mixed & 0xFFFFFFFF) * PRIME32_1 + (((mixed >> 32) * PRIME32_1) << 32);
    }
  }

  uint64_t end(int64_t nbytes) {
    uint64_t key[STRIPE / 8], result = nbytes * PRIME64_1;
    std::memcpy(words, part, sizeof part);
    std::memcpy(key, reinterpret_cast<const char*>(SECRET) + 11, sizeof key);
    for (int i = 0; i < STRIPE / 8; i += 2) {
      const auto product = static_cast<unsigned __int128>(words[i] ^ key[i]) * (words[i + 1] ^ key[i + 1]);
      result += static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
    }
    result = (result ^ (result >> 37)) * MIX;
    return result ^ (result >> 32);
  }
};

template <bool SUMMED, bool PAST>
uint64_t copy(char* to, const char* from, int64_t nbytes) {
  Sum sum;
  const char* const last = from + nbytes - STRIPE;
  // the last stripe, whole or not, is summed once more at the end
  for (int64_t left = (nbytes - 1) / STRIPE; left > 0;) {
    const int count = left < STRIPES ? left : STRIPES;
    for (int i = 0; i < count; ++i, from += STRIPE, to += STRIPE) {
      __builtin_prefetch(from + AHEAD, 0, 3);
      for (int at = 0; at < PARTS; ++at) {
        const Words data = load(from + at * WIDTH);
        if (PAST)
          store_past(to + at * WIDTH, data);
        else
          std::memcpy(to + at * WIDTH, &data, WIDTH);
        if (SUMMED) sum.add(at, data, secret(8 * i + at * WIDTH));
      }
    }
    if (SUMMED && count == STRIPES) sum.scramble();
    left -= count;
  }
  std::memcpy(to, from, last + STRIPE - from);
  if (!SUMMED) return 0;
  for (int at = 0; at < STRIPE; at += WIDTH)
    sum.add(at / WIDTH, load(last + at), secret(SECRET_NBYTES - STRIPE - 7 + at));
  return sum.end(nbytes);
}

template <bool SUMMED>
uint64_t copy(char* to, const char* from, int64_t nbytes, bool past) {
  return past ? copy<SUMMED, true>(to, from, nbytes) : copy<SUMMED, false>(to, from, nbytes);
}

}  // namespace

// Copies `count` blocks of more than 240 bytes, `from[i]` of those at `source` to `to[i]` of those at `target`. `sums`
// may be null, else it gets a sum for each, most significant byte first. `past`: past the caches.
extern "C" void ds_copy(char* target, const char* source, int64_t nbytes, int64_t count, const int64_t* to,
                        const int64_t* from, uint64_t* sums, int32_t past) {
  past = past && reinterpret_cast<uintptr_t>(target) % STRIPE == 0 && nbytes % STRIPE == 0;
  for (int64_t i = 0; i < count; ++i) {
    char* const mine = target + to[i] * nbytes;
    const char* const theirs = source + from[i] * nbytes;
    if (sums)
      sums[i] = __builtin_bswap64(copy<true>(mine, theirs, nbytes, past));
    else
      copy<false>(mine, theirs, nbytes, past);
  }
#ifdef __x86_64__
  // stores past the caches are not in order with others
  _mm_sfence();
#endif
}
