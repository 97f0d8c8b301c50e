// Sixteen floats at a time, and the three kinds of element a model is kept in.
//
// Written with the compiler's vector extension, so that it builds for any processor; where AVX-512 has an
// instruction for it, that is used.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace ds {

constexpr int LANES = 16;
constexpr float LOG2_E = 1.44269504f;

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef float vf_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint64_t vq __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef uint16_t vh_any __attribute__((vector_size(32), aligned(2), may_alias));

inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_any*>(p) = v; }
// `count` of them, at most 16; the others are zero.
inline vf load_some(const float* p, int count) {
  if (count == LANES) return load(p);
  vf v{};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}

inline void store_some(float* p, vf v, int count) { std::memcpy(p, &v, count * sizeof(float)); }

inline vf broadcast(float x) { return vf{} + x; }
inline vi lane_numbers() { return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// The greater and the lesser of two; `b` where one is no number.
inline vf max(vf a, vf b) {
#ifdef __AVX512F__
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

inline vf min(vf a, vf b) {
#ifdef __AVX512F__
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

inline float sum(vf v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
#endif
}

inline float largest(vf v) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < LANES; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

// e^x to about one unit in the last place (Cephes' expf). exp(0) is exactly 1 and exp(-inf) exactly 0: masked
// keys change no bit of a result. NaN stays NaN.
inline vf exp(vf x) {
  // 1.5 * 2^23: adding it rounds to an integer, which then is in the last bits
  const vf magic = broadcast(12582912.0f);
  vf bounded = min(broadcast(88.0f), max(broadcast(-87.0f), x));
  vf rounded = bounded * 1.44269504f + magic;
  vf n = rounded - magic;
  vf r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  vi power = ((vi)rounded << 23) + (127 << 23);
  return x < -87.0f ? vf{} : p * (vf)power;
}

// 2^x for x up to 0, or little above: to about two units in the last place from 2^-126 on. exp2(0) is exactly 1 and
// exp2(-inf) exactly 0. NaN stays NaN.
inline vf exp2(vf x) {
#ifdef __AVX512DQ__
  vf r = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);  // of -inf it is 0
#else
  const vf magic = broadcast(12582912.0f);
  vf bounded = max(broadcast(-127.0f), x);
  vf rounded = bounded + magic;
  vf r = bounded - (rounded - magic);
#endif
  vf p = 1.3264816e-3f * r + 9.6715120e-3f;
  p = p * r + 5.5507336e-2f;
  p = p * r + 2.4022242e-1f;
  p = p * r + 6.9314700e-1f;
  p = p * r + 1.0f;
#ifdef __AVX512DQ__
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)(x - r));
#else
  return (vf)((vi)p + ((vi)rounded << 23));  // of -127 all bits but the sign are gone
#endif
}

inline vf tanh(vf x) {
  vf e = exp(x * 2.0f);
  return 1.0f - 2.0f / (e + 1.0f);
}

inline float exp2(float x) { return exp2(broadcast(x))[0]; }

inline vf from_bf16(vh bits) { return (vf)(__builtin_convertvector(bits, vi) << 16); }

inline vh to_bf16(vf v) {
#ifdef __AVX512BF16__
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  vi bits = (vi)v;
  vi rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = v == v ? rounded : (bits >> 16) | 0x40;  // rounding must not turn NaN into a number
  return __builtin_convertvector(rounded & 0xffff, vh);
#endif
}

// Sixteen and sixteen.
inline vq to_bf16(vf low, vf high) {
#ifdef __AVX512BF16__
  return (vq)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
  vh both[2] = {to_bf16(low), to_bf16(high)};
  vq joined;
  std::memcpy(&joined, both, sizeof joined);
  return joined;
#endif
}

inline float half_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

inline vf from_half(vh bits) {
#ifdef __AVX512F__
  return (vf)_mm512_cvtph_ps((__m256i)bits);
#else
  vf out;
  for (int i = 0; i < LANES; ++i) out[i] = half_to_float(bits[i]);
  return out;
#endif
}

inline vh to_half(vf v) {
#ifdef __AVX512F__
  return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#else
  vh out;
  for (int i = 0; i < LANES; ++i) {
    _Float16 value = static_cast<_Float16>(v[i]);
    std::memcpy(&out[i], &value, 2);
  }
  return out;
#endif
}

// An element kind says how weights and cached keys lie in memory (`weight`), how activations come to a product
// (`active`), and how many neighbours in the inner dimension one multiply-add takes (`STEP`).

struct F32 {
  using weight = float;
  using active = float;
  static constexpr int STEP = 1;
  static vf load_weights(const weight* p) { return load(p); }
  static vf spread(const active* p) { return broadcast(*p); }
  static vf mac(vf acc, vf w, vf x) { return acc + w * x; }
  static vf widen(const weight* p) { return load(p); }
  static void narrow(weight* p, vf v) { store(p, v); }
  static void activate(active* p, vf v) { store(p, v); }
  static float one(weight w) { return w; }
};

struct Bf16 {
  using weight = uint16_t;
  using active = uint16_t;
  static constexpr int STEP = 2;
  static vi load_weights(const weight* p) { return *reinterpret_cast<const vi_any*>(p); }
  static vi spread(const active* p) {
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return vi{} + pair;
  }
  static vf mac(vf acc, vi w, vi x) {
#ifdef __AVX512BF16__
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#else
    acc += (vf)(w << 16) * (vf)(x << 16);
    return acc + (vf)(w & static_cast<int32_t>(0xffff0000)) * (vf)(x & static_cast<int32_t>(0xffff0000));
#endif
  }
  static vf widen(const weight* p) { return from_bf16(*reinterpret_cast<const vh_any*>(p)); }
  static void narrow(weight* p, vf v) { *reinterpret_cast<vh_any*>(p) = to_bf16(v); }
  static void activate(active* p, vf v) { narrow(p, v); }
  static vq activated(vf low, vf high) { return to_bf16(low, high); }
  static float one(weight w) {
    uint32_t bits = static_cast<uint32_t>(w) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

// Half precision is kept in memory only: products are made in single precision.
struct F16 {
  using weight = uint16_t;
  using active = float;
  static constexpr int STEP = 1;
  static vf load_weights(const weight* p) { return widen(p); }
  static vf spread(const active* p) { return broadcast(*p); }
  static vf mac(vf acc, vf w, vf x) { return acc + w * x; }
  static vf widen(const weight* p) { return from_half(*reinterpret_cast<const vh_any*>(p)); }
  static void narrow(weight* p, vf v) { *reinterpret_cast<vh_any*>(p) = to_half(v); }
  static void activate(active* p, vf v) { store(p, v); }
  static float one(weight w) { return half_to_float(w); }
};

}  // namespace ds
