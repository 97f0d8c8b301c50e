// What logits weigh in a draw. drawing.py does the same in torch, bit for bit:
//
// A token's weight is 2^((logit - highest) * scale), made with the operations of `unrounded_weight` one after the
// other, none of them fused, and then rounded to a whole number of 2^-44. Sums of those are exact, in whatever order
// they are made, for vocabularies of less than 2^19.
#pragma once

#include <cstdint>
#include <limits>

#include "vector.h"

namespace ds {

constexpr int MOST_LIKELIEST = 20;
constexpr double UNIT = 17592186044416.0;  // 2^44

// What the next token of one sequence depends on besides its logits, and the answer.
struct Draw {
  double uniform, top_p, min_p;
  const int32_t* seen;    // distinct tokens of prompt and output that penalties are for
  const int32_t* counts;  // how often each of them is in the output
  const int32_t* banned;
  int32_t seen_count, banned_count;
  float repetition, presence, frequency;
  float scale;  // log2(e) / temperature; 0: the likeliest
  int32_t top_k;
  int32_t likeliest;  // how many are wanted; -1: no probability at all
  int64_t total;      // of the row's weights at temperature 1
  int32_t token;      // -1: not all logits are finite
  int32_t listed;     // of the likeliest
  float highest, logit;
  int32_t tokens[MOST_LIKELIEST];
  float logits[MOST_LIKELIEST];
};

typedef float vf_half __attribute__((vector_size(32)));
typedef double vd __attribute__((vector_size(64)));
typedef int64_t vl __attribute__((vector_size(64)));
typedef int64_t vl_any __attribute__((vector_size(64), aligned(8), may_alias));

// One rounding for each operation from here on.
#ifdef __clang__
#pragma clang fp contract(off)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

// In 2^-44, not yet rounded to whole ones.
inline vf unrounded_weight(vf logits, float highest, float scale) {
  const vf magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf x = max((logits - highest) * scale, broadcast(-64.0f));
  vf rounded = x + magic;
  vf f = x - (rounded - magic);
  vf p = 1.3264816e-3f * f + 9.6715120e-3f;
  p = p * f + 5.5507336e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314700e-1f;
  p = p * f + 1.0f;
  vi power = ((vi)rounded << 23) + ((127 + 44) << 23);
  return p * (vf)power;
}

// Rounded to whole ones, halves to even.
inline vl whole(vf_half weights) {
#ifdef __AVX512DQ__
  return (vl)_mm512_cvtps_epi64((__m256)weights);
#else
  const vd magic = vd{} + 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  return (vl)(__builtin_convertvector(weights, vd) + magic) - (vl)magic;
#endif
}

// each(i, eight whole weights); of a last few logits that fill no vector, the weights behind them are 0.
template <class Each>
inline void weigh_each(const float* logits, int count, float highest, float scale, Each each) {
  vf_half halves[2];
  int i = 0;
  for (; i + LANES <= count; i += LANES) {
    vf w = unrounded_weight(load(logits + i), highest, scale);
    std::memcpy(halves, &w, sizeof w);
    each(i, whole(halves[0]));
    each(i + 8, whole(halves[1]));
  }
  if (i == count) return;
  vf w = unrounded_weight(load_some(logits + i, count - i), highest, scale);
  w = lane_numbers() < count - i ? w : vf{};
  std::memcpy(halves, &w, sizeof w);
  each(i, whole(halves[0]));
  each(i + 8, whole(halves[1]));
}

// `to` has room for whole vectors.
inline void weigh(const float* logits, int count, float highest, float scale, int64_t* to) {
  weigh_each(logits, count, highest, scale, [&](int i, vl w) { *reinterpret_cast<vl_any*>(to + i) = w; });
}

inline int64_t sum_of_weights(const float* logits, int count, float highest, float scale) {
  vl total{};
  weigh_each(logits, count, highest, scale, [&](int, vl w) { total += w; });
  int64_t sum = 0;
  for (int lane = 0; lane < 8; ++lane) sum += total[lane];
  return sum;
}

// Penalties and the ban on ends, in place. Tokens that no row has are passed over: they came from outside.
inline void adjust(const Draw& draw, int vocab, float* logits) {
  auto known = [&](int32_t token) { return token >= 0 && token < vocab; };
  for (int i = 0; i < draw.seen_count; ++i) {
    if (!known(draw.seen[i])) continue;
    float& x = logits[draw.seen[i]];
    if (draw.repetition != 1) x = x > 0 ? x / draw.repetition : x * draw.repetition;
    if (draw.counts[i]) x -= draw.presence + draw.frequency * draw.counts[i];
  }
  for (int i = 0; i < draw.banned_count; ++i)
    if (known(draw.banned[i])) logits[draw.banned[i]] = -std::numeric_limits<float>::infinity();
}

#ifndef __clang__
#pragma GCC pop_options
#endif

inline int64_t sum_of(const int64_t* weights, int count) {
  int64_t total = 0;
  for (int i = 0; i < count; ++i) total += weights[i];
  return total;
}

}  // namespace ds
