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

// Bytes that weights are asked for ahead of their use, in the second-level cache. Two panels at a time are for few rows,
// which take weights as fast as memory gives them: there the processor looks ahead best by itself, unless widening them
// holds it up.
template <class E>
constexpr int ahead(int panels) {
  return panels == 1 ? 12288 : sizeof(typename E::weight) == 1 ? 4096 : 0;
}

inline size_t padded(size_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

#ifdef __AVX512F__
constexpr int MAX_ROWS = 12;  // 12 rows x 2 vectors of accumulators, 2 of weights: 27 of 32 registers
#else
constexpr int MAX_ROWS = 4;
#endif
constexpr int PAIR_ROWS = MAX_ROWS / 2;  // rows of a tile with two panels

// Where sums begin (null: at zero) and where they go; `start_ld` 0 begins every row alike.
struct Sums {
  const float* start;
  size_t start_ld;
  float* to;
  size_t ld;
};

// Weights of one step of a panel, as they are multiplied.
template <class E, int AHEAD, class Wide>
inline void load_panel(const typename E::weight* at, Wide* w) {
  for (size_t line = 0; AHEAD > 0 && line < PANEL * E::STEP * sizeof(*at); line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(at) + line + AHEAD, 0, 2);
  if constexpr (requires { E::load_panel(at, w); })
    E::load_panel(at, w);
  else
#pragma GCC unroll 16
    for (int v = 0; v < PANEL_VECTORS; ++v) w[v] = E::load_weights(at + v * LANES * E::STEP);
}

// The inner dimension, and how much of it the first group takes, where weights have scales by groups.
struct Inner {
  Inner(int length, int first = 0) : length(length), first(first) {}
  int length, first;
};

// A product rounded by itself: where compilers fuse it with what is added next, they do not always.
inline vf scaled(vf sum, vf scale) { return sum * scale + 0.0f; }

// MB rows of `a` with NP panels, which ask for something else meanwhile, or not. Not inlined: one tight loop, whatever
// is done with the sums.
template <class E, int MB, int NP, int AHEAD, bool ASKS>
__attribute__((noinline)) void tile(const typename E::active* a, size_t lda, const typename E::weight* const* panels,
                                    Inner inner, const Sums& sums, Ask ask) {
  constexpr int NV = NP * PANEL_VECTORS;
  const typename E::weight* first = panels[0];
  const typename E::weight* second = panels[NP - 1];
  // Four rows to a pointer: one for each of them would be more than there are registers.
  constexpr int GROUPS = (MB + 3) / 4;
  const typename E::active* rows[GROUPS];
#pragma GCC unroll 4
  for (int group = 0; group < GROUPS; ++group) rows[group] = a + group * 4 * lda;
  vf acc[MB][NV];
  auto every = [&](auto each) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) each(m, v);
  };
  auto add = [&](int count) __attribute__((always_inline)) {
    for (int k = 0; k < count; k += E::STEP) {
      if constexpr (ASKS) ask.go_on();
      decltype(E::load_weights(first)) w[NV];
      load_panel<E, AHEAD>(first, w);
      if constexpr (NP > 1) load_panel<E, AHEAD>(second, w + PANEL_VECTORS);
#pragma GCC unroll 16
      for (int m = 0; m < MB; ++m) {
        auto x = E::spread(rows[m / 4] + m % 4 * lda);
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) acc[m][v] = E::mac(acc[m][v], w[v], x);
      }
      first += PANEL * E::STEP, second += PANEL * E::STEP;
#pragma GCC unroll 4
      for (int group = 0; group < GROUPS; ++group) rows[group] += E::STEP;
    }
  };
  auto start = [&](int m, int v) { return sums.start ? load(sums.start + m * sums.start_ld + v * LANES) : vf{}; };
  auto to = [&](int m, int v) { return sums.to + m * sums.ld + v * LANES; };
  if constexpr (requires { E::GROUP; }) {
    // Sums are kept in units of the group's scale, which leaves them in their registers.
    every([&](int m, int v) { acc[m][v] = vf{}; });
    const typename E::weight *before = first, *beside = second;
    auto scale = [](auto* left, auto* right, int v) {
      return E::load_scales(v < PANEL_VECTORS ? left : right, v % PANEL_VECTORS);
    };
    for (int left = inner.length, count = inner.first; left > 0; left -= count, count = E::GROUP) {
      if constexpr (AHEAD > 0) __builtin_prefetch(first + AHEAD, 0, 2);
      if constexpr (AHEAD > 0 && NP > 1) __builtin_prefetch(second + AHEAD, 0, 2);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) {
        const vf change = scale(before, beside, v) / scale(first, second, v);
#pragma GCC unroll 16
        for (int m = 0; m < MB; ++m) acc[m][v] = scaled(acc[m][v], change);
      }
      before = first, beside = second;
      first += E::SCALES, second += E::SCALES;
      add(count < left ? count : left);
    }
    every([&](int m, int v) { store(to(m, v), scaled(acc[m][v], scale(before, beside, v)) + start(m, v)); });
  } else {
    every([&](int m, int v) { acc[m][v] = start(m, v); });
    add(inner.length);
    every([&](int m, int v) { store(to(m, v), acc[m][v]); });
  }
}

// The same with the number of rows known only now.
template <class E, int NP, int AHEAD, bool ASKS = false, int MB = MAX_ROWS / NP>
inline void tile_of(int rows, const typename E::active* a, size_t lda, const typename E::weight* const* panels,
                    Inner inner, const Sums& sums, const Ask& ask = {}) {
  if constexpr (MB > 1) {
    if (rows < MB) return tile_of<E, NP, AHEAD, ASKS, MB - 1>(rows, a, lda, panels, inner, sums, ask);
  }
  tile<E, MB, NP, AHEAD, ASKS>(a, lda, panels, inner, sums, ask);
}

// Cut rows into tiles as even as can be (16 are two of 8, not one of 12 and one of 4 that starves): each(row, count).
template <class Each>
inline void tiles(int rows, int most, Each each) {
  int left = (rows + most - 1) / most;
  for (int row = 0; left > 0; --left) {
    int count = (rows - row + left - 1) / left;
    each(row, count);
    row += count;
  }
}

// Any number of rows over what is in the caches, sums to memory.
template <class E, int NP>
inline void strip(int rows, const typename E::active* a, size_t lda, const typename E::weight* const* panels,
                  Inner inner, const Sums& sums) {
  tiles(rows, MAX_ROWS / NP, [&](int row, int count) {
    const float* start = sums.start ? sums.start + row * sums.start_ld : nullptr;
    tile_of<E, NP, 0>(count, a + row * lda, lda, panels, inner,
                   {start, sums.start_ld, sums.to + row * sums.ld, sums.ld});
  });
}

// Any number of columns in panels `panel` elements apart; two panels at a time, for more sums that do not wait for
// each other.
template <class E>
inline void strips(int rows, const typename E::active* a, size_t lda, const typename E::weight* packed, size_t panel,
                   int columns, int inner, const Sums& sums) {
  const int step = rows <= PAIR_ROWS ? 2 : 1;
  for (int column = 0; column < columns; column += step * PANEL, packed += step * panel) {
    const typename E::weight* both[2] = {packed, packed + panel};
    Sums here{sums.start ? sums.start + column : nullptr, sums.start_ld, sums.to + column, sums.ld};
    if (column + PANEL < columns && rows <= PAIR_ROWS)
      strip<E, 2>(rows, a, lda, both, inner, here);
    else
      strip<E, 1>(rows, a, lda, both, inner, here);
  }
}

// One weight matrix, `in` even.
struct Linear {
  const void* panels;
  const float* bias;  // [padded(out)] or null
  int32_t in;
  int32_t out;
  int32_t first_group;  // columns of the first group of weights in int8 (int8.h); 0 where they are not in int8
  int32_t reserved;

  Inner inner() const { return {in, first_group}; }
};

// Elements of one panel.
template <class E>
inline size_t panel_elements(const Linear& linear) {
  if constexpr (requires { E::GROUP; })
    return E::panel_elements(linear.in, linear.first_group);
  else
    return static_cast<size_t>(linear.in) * PANEL;
}

constexpr int ROW_BLOCK = 96;  // activations of so many rows stay in the second-level cache

// Rows [row, row + count) with two panels (or one): each(row, sums of 64 or 32 columns) while they are in the cache.
template <class E, int NP, class Each>
inline void finish_tiles(Ahead& later, int row, int count, const typename E::active* a, size_t lda,
                         const typename E::weight* const* panels, Inner inner, const float* start, Each each) {
  alignas(64) float sums[MAX_ROWS][NP * PANEL];
  tiles(count, MAX_ROWS, [&](int at, int some) {
    const typename E::active* from = a + (row + at) * lda;
    if (some <= MAX_ROWS / NP)
      tile_of<E, NP, ahead<E>(NP)>(some, from, lda, panels, inner, {start, 0, sums[0], NP * PANEL});
    else
      for (int n = 0; n < NP; ++n) {
        const Sums here{start ? start + n * PANEL : nullptr, 0, sums[0] + n * PANEL, NP * PANEL};
        if (const Ask ask = later.next(inner.length / E::STEP); ask.at)
          tile_of<E, 1, ahead<E>(1), true>(some, from, lda, panels + n, inner, here, ask);
        else
          tile_of<E, 1, ahead<E>(1)>(some, from, lda, panels + n, inner, here);
      }
    for (int m = 0; m < some; ++m) each(row + at + m, sums[m]);
  });
}

// Panels of one task. Few rows take two at a time; where there are more, pieces are cut until each thread gets as many
// as the others: nine for two threads would let one of them wait.
inline int panels_of_task(int threads, int rows, int blocks, int panels) {
  int piece = panels / (threads * 4);
  piece = piece < 1 ? 1 : piece > 8 ? 8 : piece;
  if (rows <= PAIR_ROWS) return piece;
  auto even = [&](int size) { return blocks * ((panels + size - 1) / size) % threads == 0; };
  for (int size = piece; size > 0; --size)
    if (even(size)) return size;
  return piece;
}

// Tasks are (block of rows, run of panels), shared out over the team: each(first row, rows, first panel, last panel).
template <class Each>
void share_product(Team& team, int rows, int panels, Each each) {
  const int blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
  const int piece = panels_of_task(team.count(), rows, blocks, panels);
  const int pieces = (panels + piece - 1) / piece;
  team.share(blocks * pieces, 1, [&](int task, int) {
    int row = task / pieces * ROW_BLOCK, first = task % pieces * piece;
    each(row, rows - row < ROW_BLOCK ? rows - row : ROW_BLOCK, first,
         first + piece < panels ? first + piece : panels);
  });
}

// y = x W^T + b; out(row, column, sixteen sums) with columns up to padded(out).
template <class E, class Out>
void product(Team& team, int rows, const typename E::active* a, size_t lda, const Linear& linear, Out out) {
  using weight = typename E::weight;
  const weight* packed = static_cast<const weight*>(linear.panels);
  const size_t panel_size = panel_elements<E>(linear);
  share_product(team, rows, padded(linear.out) / PANEL, [&](int row, int count, int first, int last) {
    for (int panel = first; panel < last; panel += 2) {
      const weight* both[2] = {packed + panel * panel_size, packed + (panel + 1) * panel_size};
      const float* bias = linear.bias ? linear.bias + panel * PANEL : nullptr;
      auto each = [&](int vectors) {
        return [&, vectors](int r, const float* sums) {
          for (int v = 0; v < vectors; ++v) out(r, panel * PANEL + v * LANES, load(sums + v * LANES));
        };
      };
      if (panel + 1 < last)
        finish_tiles<E, 2>(team.ahead, row, count, a, lda, both, linear.inner(), bias, each(2 * PANEL_VECTORS));
      else
        finish_tiles<E, 1>(team.ahead, row, count, a, lda, both, linear.inner(), bias, each(PANEL_VECTORS));
    }
  });
}

// gate and up side by side: out(row, column, gate's sums, up's sums).
template <class E, class Out>
void gated_product(Team& team, int rows, const typename E::active* a, size_t lda, const Linear& gate,
                   const Linear& up, Out out) {
  using weight = typename E::weight;
  const size_t panel_size = panel_elements<E>(gate);
  share_product(team, rows, padded(gate.out) / PANEL, [&](int row, int count, int first, int last) {
    for (int panel = first; panel < last; ++panel) {
      const weight* both[2] = {static_cast<const weight*>(gate.panels) + panel * panel_size,
                               static_cast<const weight*>(up.panels) + panel * panel_size};
      alignas(64) float start[2 * PANEL] = {};
      if (gate.bias) std::memcpy(start, gate.bias + panel * PANEL, PANEL * sizeof(float));
      if (up.bias) std::memcpy(start + PANEL, up.bias + panel * PANEL, PANEL * sizeof(float));
      finish_tiles<E, 2>(team.ahead, row, count, a, lda, both, gate.inner(), start, [&](int r, const float* sums) {
        for (int v = 0; v < PANEL; v += LANES) out(r, panel * PANEL + v, load(sums + v), load(sums + PANEL + v));
      });
    }
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
