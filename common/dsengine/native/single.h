// Attention of single tokens: the query rows of one position, over some KV heads at once.
//
// With so few rows, packing a tile of keys and values costs more than using it: here they pass through registers
// straight from the cache, and the next tile is asked for meanwhile. Every sum is made in the same order as in
// attention.h, so that a row has the same bits there and here.
#pragma once

#include "attention.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define DS_PASSES
#endif

namespace ds {

constexpr int SINGLE_ROWS = 8;              // query rows of a KV head, at most
constexpr size_t TILE_NBYTES = 128 << 10;   // keys and values of a tile for all heads of a task, at most

// Can this shape be computed here?
template <class E>
inline bool passes(const Shape& shape) {
#ifdef DS_PASSES
  constexpr int WORDS = LANES * static_cast<int>(sizeof(int32_t) / sizeof(typename E::weight));
  return sizeof(typename E::weight) * E::STEP == sizeof(int32_t) && shape.head_dim % WORDS == 0 &&
         shape.head_dim % PANEL == 0 && shape.heads / shape.kv_heads <= SINGLE_ROWS;
#else
  return false;
#endif
}

// KV heads of one task.
template <class E>
inline int heads_together(const Shape& shape) {
  size_t tile = 2 * TILE * shape.head_dim * sizeof(typename E::weight);
  int most = static_cast<int>(TILE_NBYTES / tile);
  return most < 1 ? 1 : most < shape.kv_heads ? most : shape.kv_heads;
}

#ifdef DS_PASSES

// Where a tile's keys lie, and those of the tile that follows: each line of that one is asked for in the second-level
// cache beside the load of its counterpart here. Asked for in one go they would fill the queue of loads.
template <class E>
struct Tiles {
  const typename E::weight* const* now;
  const typename E::weight* const* next;
  size_t delta;  // elements from a key to what is meant

  const typename E::weight* at(int key, int dim) const {
    __builtin_prefetch(next[key] + delta + dim, 0, 2);
    return now[key] + delta + dim;
  }
};

// Scores of `count` keys for ROWS query rows: to scores + row * TILE.
template <class E, int ROWS>
inline void score_keys(const typename E::active* q, const Tiles<E>& keys, int count, int head_dim, float* scores) {
  using words = decltype(E::load_weights(keys.now[0]));
  for (int dim = 0; dim < head_dim; dim += LANES * E::STEP)
    for (int key = 0; key < count; key += LANES) {
      Columns columns = turn([&](int i) { return keys.at(key + i, dim); });
      vf acc[ROWS];
      for (int row = 0; row < ROWS; ++row) acc[row] = dim ? load(scores + row * TILE + key) : vf{};
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i)
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row)
          acc[row] = E::mac(acc[row], (words)columns.at[i], E::spread(q + row * head_dim + dim + i * E::STEP));
      for (int row = 0; row < ROWS; ++row) store(scores + row * TILE + key, acc[row]);
    }
}

// 32 dimensions of STEP neighbouring values.
template <class E, class Words>
inline void take_values(const Tiles<E>& values, int key, int dim, Words* to) {
  if constexpr (E::STEP == 2)
    interleave_two(values.at(key, dim), values.at(key + 1, dim), to);
  else
    to[0] = E::load_weights(values.at(key, dim)), to[1] = E::load_weights(values.at(key, dim + LANES));
}

// Add `count` values with weights `p` to 16 * VECTORS dimensions, from `dim` on, of ROWS rows.
template <class E, int ROWS, int VECTORS>
inline void add_values(const typename E::active* p, const Tiles<E>& values, int count, int dim, size_t width,
                       float* out) {
  vf acc[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) acc[row][v] = load(out + row * width + dim + v * LANES);
  for (int key = 0; key < count; key += E::STEP) {
    decltype(E::load_weights(values.now[0])) w[VECTORS];
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; v += 2)
      take_values<E>(values, key, dim + v * LANES, w + v);
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
      auto x = E::spread(p + row * TILE + key);
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) acc[row][v] = E::mac(acc[row][v], w[v], x);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) store(out + row * width + dim + v * LANES, acc[row][v]);
}

// What the heads of a task share.
template <class E>
struct Single {
  const typename E::active* q;  // [heads][group][head_dim]
  Queries queries;              // of one head
  const Shape& shape;
  const Cached<E>& cache;       // of the first head
  int heads;
};

// One head's part of a tile.
template <class E, int ROWS>
__attribute__((noinline)) void pass_tile(Scratch<E>& scratch, const Single<E>& task, int head, int first, int count,
                                         Tiles<E> tiles, const State& state) {
  const int dim = task.shape.head_dim;
  tiles.delta = static_cast<size_t>(head) * task.cache.pool->block_size * dim;
  score_keys<E, ROWS>(task.q + static_cast<size_t>(head) * ROWS * dim, tiles, count, dim, scratch.scores.data());
  soften(scratch, task.queries, task.shape, first, state);
  tiles.delta += task.cache.value_offset - task.cache.key_offset;
  int from = 0;
  if constexpr (ROWS <= 6)
    for (; from + 2 * PANEL <= dim; from += 2 * PANEL)
      add_values<E, ROWS, 4>(scratch.p.data(), tiles, count, from, dim, state.out);
  for (; from < dim; from += PANEL) add_values<E, ROWS, 2>(scratch.p.data(), tiles, count, from, dim, state.out);
}

// The keys of a chunk for all heads of the task, into fresh states, one head's behind the other's.
template <class E, int ROWS>
bool pass_chunk(Scratch<E>& scratch, const Single<E>& task, int chunk, const State& states) {
  const size_t width = task.shape.head_dim;
  reset(ROWS * task.heads, width, states);
  const typename E::weight* tiles[2][TILE];
  int now = 0, ready = -1;
  return chunk_tiles(task.queries, chunk, [&](int first, int count) {
    if (ready != first) task.cache.rows(first, TILE, tiles[now]);
    const bool more = first + TILE < task.cache.end;
    if (more) task.cache.rows(ready = first + TILE, TILE, tiles[now ^ 1]);
    for (int head = 0; head < task.heads; ++head) {
      const int row = head * ROWS;
      pass_tile<E, ROWS>(scratch, task, head, first, count, {tiles[now], tiles[more ? now ^ 1 : now], 0},
                         {states.highest + row, states.total + row, states.out + row * width});
    }
    now ^= 1;
  });
}

// The same with the number of rows known only now.
template <class E, int ROWS = SINGLE_ROWS>
inline bool pass_chunk_of(Scratch<E>& scratch, const Single<E>& task, int chunk, const State& states) {
  if constexpr (ROWS > 1) {
    if (task.queries.rows < ROWS) return pass_chunk_of<E, ROWS - 1>(scratch, task, chunk, states);
  }
  return pass_chunk<E, ROWS>(scratch, task, chunk, states);
}

#endif

}  // namespace ds
