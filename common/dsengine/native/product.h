// Matrix products over packed weights.
//
// Weights lie in panels of 32 output columns: [columns / 32][inner / STEP][32][STEP], zero behind the last column.
// Every output is one chain of multiply-adds over the inner dimension in order, whatever the number of rows: a row's
// result does not depend on the rows that come with it, nor on whether it is part of a prompt or of a decode step.
#pragma once

#include "team.h"
#include "vector.h"

namespace ds {

constexpr int PANEL = 32;
constexpr int PANEL_VECTORS = PANEL / LANES;

inline size_t padded(size_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

// Products of MB rows with NP panels: `out(row, vector, accumulator)` for vector in [0, NP * 2).
template <class E, int MB, int NP, class Start, class Out>
inline __attribute__((always_inline)) void tile(const typename E::active* a, size_t lda,
                                                const typename E::weight* const* panels, int inner, Start start,
                                                Out out) {
  constexpr int NV = NP * PANEL_VECTORS;
  vf acc[MB][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[m][v] = start(m, v);
  const typename E::weight* p[NP];
  for (int n = 0; n < NP; ++n) p[n] = panels[n];
  for (int k = 0; k < inner; k += E::STEP) {
    decltype(E::load_weights(p[0])) w[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      const typename E::weight* at = p[v / PANEL_VECTORS] + (v % PANEL_VECTORS) * LANES * E::STEP;
      w[v] = E::load_weights(at);
      if (MB <= 2) __builtin_prefetch(reinterpret_cast<const char*>(at) + 2048, 0, 2);
    }
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m) {
      auto x = E::spread(a + m * lda + k);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[m][v] = E::mac(acc[m][v], w[v], x);
    }
    for (int n = 0; n < NP; ++n) p[n] += PANEL * E::STEP;
  }
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) out(m, v, acc[m][v]);
}

#ifdef __AVX512F__
constexpr int MAX_ROWS = 6;  // 6 rows x 4 vectors of accumulators, 4 of weights: 29 of 32 registers
#else
constexpr int MAX_ROWS = 2;
#endif

// `rows` rows with one or two panels: start(row, vector) and out(row, vector, sum), rows counted from `a`.
template <class E, int NP, int MB, class Start, class Out>
inline void rows_of(int count, const typename E::active* a, size_t lda, const typename E::weight* const* panels,
                    int inner, Start start, Out out) {
  if constexpr (MB > 1) {
    if (count < MB) return rows_of<E, NP, MB - 1>(count, a, lda, panels, inner, start, out);
  }
  tile<E, MB, NP>(a, lda, panels, inner, start, out);
}

template <class E, int NP, class Start, class Out>
inline void strip(int rows, const typename E::active* a, size_t lda, const typename E::weight* const* panels,
                  int inner, Start start, Out out) {
  // As even as can be: 8 rows are two tiles of 4, not one of 6 and one of 2 that starves.
  int tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
  for (int t = 0, row = 0; t < tiles; ++t) {
    int count = (rows - row + tiles - t - 1) / (tiles - t);
    rows_of<E, NP, MAX_ROWS>(
        count, a + row * lda, lda, panels, inner, [&](int m, int v) { return start(row + m, v); },
        [&](int m, int v, vf sum) { out(row + m, v, sum); });
    row += count;
  }
}

// One weight matrix, `in` even.
struct Linear {
  const void* panels;
  const float* bias;  // [padded(out)] or null
  int32_t in;
  int32_t out;
};

constexpr int ROW_BLOCK = 96;  // activations of so many rows stay in the second-level cache

// y = x W^T + b, shared out over the team; out(row, column, sixteen sums) with columns up to padded(out).
template <class E, class Out>
void product(Team& team, int rows, const typename E::active* a, size_t lda, const Linear& linear, Out out) {
  using weight = typename E::weight;
  const weight* packed = static_cast<const weight*>(linear.panels);
  const size_t panel_size = static_cast<size_t>(linear.in) * PANEL;
  const int panels = static_cast<int>(padded(linear.out) / PANEL);
  const int blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
  int piece = panels / (team.count() * 4);
  piece = piece < 1 ? 1 : piece > 8 ? 8 : piece / 2 * 2 + (piece == 1);
  const int pieces = (panels + piece - 1) / piece;
  team.share(blocks * pieces, 1, [&](int task, int) {
    int row = task / pieces * ROW_BLOCK;
    int count = rows - row < ROW_BLOCK ? rows - row : ROW_BLOCK;
    int first = task % pieces * piece;
    int last = first + piece < panels ? first + piece : panels;
    for (int panel = first; panel < last;) {
      const weight* both[2] = {packed + panel * panel_size, packed + (panel + 1) * panel_size};
      auto start = [&](int, int v) {
        return linear.bias ? load(linear.bias + panel * PANEL + v * LANES) : vf{};
      };
      auto done = [&](int m, int v, vf total) { out(row + m, panel * PANEL + v * LANES, total); };
      if (panel + 1 < last) {
        strip<E, 2>(count, a + row * lda, lda, both, linear.in, start, done);
        panel += 2;
      } else {
        strip<E, 1>(count, a + row * lda, lda, both, linear.in, start, done);
        panel += 1;
      }
    }
  });
}

// gate and up side by side: out(row, column, gate's sums, up's sums).
template <class E, class Out>
void gated_product(Team& team, int rows, const typename E::active* a, size_t lda, const Linear& gate,
                   const Linear& up, Out out) {
  using weight = typename E::weight;
  const size_t panel_size = static_cast<size_t>(gate.in) * PANEL;
  const int panels = static_cast<int>(padded(gate.out) / PANEL);
  const int blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
  team.share(blocks * panels, 1, [&](int task, int) {
    int row = task / panels * ROW_BLOCK;
    int count = rows - row < ROW_BLOCK ? rows - row : ROW_BLOCK;
    int panel = task % panels;
    const weight* both[2] = {static_cast<const weight*>(gate.panels) + panel * panel_size,
                             static_cast<const weight*>(up.panels) + panel * panel_size};
    auto start = [&](int, int v) {
      const float* bias = v < PANEL_VECTORS ? gate.bias : up.bias;
      return bias ? load(bias + panel * PANEL + v % PANEL_VECTORS * LANES) : vf{};
    };
    vf kept[ROW_BLOCK][PANEL_VECTORS];
    strip<E, 2>(count, a + row * lda, lda, both, gate.in, start, [&](int m, int v, vf total) {
      if (v < PANEL_VECTORS)
        kept[m][v] = total;
      else
        out(row + m, panel * PANEL + (v - PANEL_VECTORS) * LANES, kept[m][v - PANEL_VECTORS], total);
    });
  });
}

// Row-major weights [out][in] -> panels.
template <class E>
void pack(const typename E::weight* from, int out, int in, typename E::weight* to) {
  for (int panel = 0; panel * PANEL < out; ++panel) {
    typename E::weight* at = to + static_cast<size_t>(panel) * PANEL * in;
    for (int column = 0; column < PANEL; ++column) {
      int row = panel * PANEL + column;
      for (int k = 0; k < in; ++k)
        at[(k / E::STEP * PANEL + column) * E::STEP + k % E::STEP] =
            row < out ? from[static_cast<size_t>(row) * in + k] : typename E::weight{};
    }
  }
}

}  // namespace ds
