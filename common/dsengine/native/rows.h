// What happens to single rows between the products: norms, rotary embedding, activations.
#pragma once

#include "model.h"

namespace ds {

// Sixteen at a time where `count` allows, the rest through a padded copy.
template <class Body>
inline void in_lanes(int count, Body body) {
  for (int i = 0; i < count; i += LANES) body(i, count - i < LANES ? count - i : LANES);
}

template <class E>
inline void activate_some(typename E::active* p, vf v, int count) {
  if (count == LANES) return E::activate(p, v);
  typename E::active all[LANES];
  E::activate(all, v);
  std::memcpy(p, all, count * sizeof(typename E::active));
}

template <class E>
inline void narrow_some(typename E::weight* p, vf v, int count) {
  if (count == LANES) return E::narrow(p, v);
  typename E::weight all[LANES];
  E::narrow(all, v);
  std::memcpy(p, all, count * sizeof(typename E::weight));
}

// out(i, count, normed values) for each run of lanes.
template <class Out>
inline void normalise(const float* x, int size, const Norm& norm, float eps, Out out) {
  float mean = 0;
  if (norm.bias) {
    vf total{};
    in_lanes(size, [&](int i, int n) { total += load_some(x + i, n); });
    mean = sum(total) / size;
  }
  vf squares{};
  in_lanes(size, [&](int i, int n) {
    vf d = load_some(x + i, n) - mean;
    if (n < LANES) d = lane_numbers() < n ? d : vf{};
    squares += d * d;
  });
  float scale = 1.0f / std::sqrt(sum(squares) / size + eps);
  in_lanes(size, [&](int i, int n) {
    vf y = (load_some(x + i, n) - mean) * scale * load_some(norm.weight + i, n);
    out(i, n, norm.bias ? y + load_some(norm.bias + i, n) : y);
  });
}

// One head in place: norm, then rotation of its first `rotary` elements (half-split form).
inline void turn_head(float* x, int head_dim, const Norm& norm, float eps, int rotary, const float* cos,
                      const float* sin) {
  if (norm.weight) normalise(x, head_dim, norm, eps, [&](int i, int n, vf y) { store_some(x + i, y, n); });
  if (!cos) return;
  int half = rotary / 2;
  in_lanes(half, [&](int i, int n) {
    vf a = load_some(x + i, n), b = load_some(x + half + i, n);
    vf c = load_some(cos + i, n), s = load_some(sin + i, n);
    store_some(x + i, a * c - b * s, n);
    store_some(x + half + i, b * c + a * s, n);
  });
}

inline vf gelu_erf(vf x) {
  vf y;
  for (int i = 0; i < LANES; ++i) y[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
  return y;
}

inline vf activation(int kind, vf x) {
  switch (kind) {
    case SILU: return x / (1.0f + exp(-x));
    case GELU_TANH: return 0.5f * x * (1.0f + tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case GELU: return gelu_erf(x);
    case QUICK_GELU: return x / (1.0f + exp(x * -1.702f));
    default: return max(x, vf{});
  }
}

}  // namespace ds
