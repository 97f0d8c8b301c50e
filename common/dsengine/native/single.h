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

// Elements that a multiply-add takes in words, on a processor that has the instructions.
template <class E>
#ifdef DS_PASSES
constexpr bool IN_WORDS = sizeof(typename E::weight) * E::STEP == sizeof(int32_t);
#else
constexpr bool IN_WORDS = false;
#endif

// Can this shape be computed here?
inline bool passes(const Shape& shape, const Pool& pool) {
  return shape.head_dim % PANEL == 0 && pool.block_size % LANES == 0 && shape.heads / shape.kv_heads <= SINGLE_ROWS;
}

// KV heads of one task.
template <class E>
inline int heads_together(const Shape& shape) {
  size_t tile = 2 * TILE * shape.head_dim * sizeof(typename E::weight);
  int most = static_cast<int>(TILE_NBYTES / tile);
  return most < 1 ? 1 : most < shape.kv_heads ? most : shape.kv_heads;
}

// What the tiles of a task share.
template <class E>
struct Single {
  const typename E::active* q;  // [heads][ROWS][head_dim]
  Queries queries;              // the rows of all heads, at one position
  const Shape& shape;
  Cached<E> cache;              // of the first head
  int heads;
  int chunk;
};

#ifdef DS_PASSES

// Where a tile's keys or values lie, 16 rows a run, and those of the tile that follows: beside the loads of this one, in
// the order of turns, its lines are asked for in the second-level cache. Asked for in one go they would fill the queue of
// loads.
template <class E>
struct Runs {
  using weight = typename E::weight;
  const weight* now[TILE / LANES];
  const weight* next[TILE / LANES];

  // The tile at `first`, where there is a key; runs behind the last key are that of the last key once more.
  static void find(const Cached<E>& cache, int first, const weight** runs) {
    for (int i = 0; i < TILE / LANES; ++i)
      runs[i] = first + i * LANES < cache.end ? cache.key(first + i * LANES) : runs[i - 1];
  }
};

// Scores of `count` keys, `behind` elements from the runs, for ROWS query rows: to scores + row * TILE.
template <class E, int ROWS>
inline void score_keys(const typename E::active* q, const Runs<E>& keys, size_t behind, int count, int head_dim,
                       float* scores) {
  using words = decltype(E::load_weights(keys.now[0]));
  constexpr int PARTS = LANES / PART, LINE = LANES * E::STEP;
  Turns turns(count), ahead(count);
  for (int part = 0; part < PARTS; ++part) ahead.go_on();
  auto offset = [&](const Turns& at) { return behind + static_cast<size_t>(at.within) * head_dim; };
  for (int key = 0; key < count; key += LANES) {
    const typename E::weight* from[PARTS];
    const typename E::weight* soon[PARTS];  // the 16 keys after these, from the second-level cache
    const typename E::weight* next[PARTS];
    int to[PARTS];
    for (int part = 0; part < PARTS; ++part, turns.go_on(), ahead.go_on()) {
      from[part] = keys.now[turns.run] + offset(turns), soon[part] = keys.now[ahead.run] + offset(ahead);
      next[part] = keys.next[turns.run] + offset(turns), to[part] = turns.key();
    }
    vf acc[ROWS] = {};
    for (int dim = 0; dim < head_dim; dim += LINE) {
      const char* at[LANES];
      for (int i = 0; i < LANES; ++i)
        at[i] = reinterpret_cast<const char*>(from[i / PART] + dim + i % PART * head_dim);
#pragma GCC unroll 4
      for (int quarter = 0; quarter < 4; ++quarter) {
        __m512i columns[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          __builtin_prefetch(next[quarter] + dim * PART + i * LINE, 0, 2);
          __builtin_prefetch(soon[quarter] + dim * PART + i * LINE, 0, 3);
        }
        turn(at, quarter, columns);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
#pragma GCC unroll 16
          for (int row = 0; row < ROWS; ++row) {
            auto x = E::spread(q + row * head_dim + dim + (quarter * 4 + i) * E::STEP);
            acc[row] = E::mac(acc[row], (words)columns[i], x);
          }
      }
    }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
      float four[PARTS][PART];
      std::memcpy(four, &acc[row], sizeof four);
      for (int part = 0; part < PARTS; ++part) std::memcpy(scores + row * TILE + to[part], four[part], sizeof four[0]);
    }
  }
}

// 32 dimensions of STEP neighbouring values.
template <class E, class Words>
inline void take_values(const typename E::weight* from, int head_dim, Words* to) {
  if constexpr (E::STEP == 2)
    interleave_two(from, from + head_dim, to);
  else
    to[0] = E::load_weights(from), to[1] = E::load_weights(from + LANES);
}

// Add `count` values, `behind` elements from the runs, with weights `p` to 16 * VECTORS dimensions of ROWS rows.
template <class E, int ROWS, int VECTORS>
inline void add_values(const typename E::active* p, const Runs<E>& values, size_t behind, int count, int head_dim,
                       float* out) {
  constexpr size_t LINE = LANES * 4 / sizeof(typename E::weight);
  vf acc[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) acc[row][v] = load(out + row * head_dim + v * LANES);
  Turns turns(count);
  for (int slot = 0; slot < count; slot += PART, turns.go_on()) {
    const size_t offset = behind + static_cast<size_t>(turns.within) * head_dim;
    const typename E::weight* now = values.now[turns.run] + offset;
    const typename E::weight* next = values.next[turns.run] + offset;
#pragma GCC unroll 4
    for (int key = 0; key < PART; ++key)
#pragma GCC unroll 4
      for (size_t line = 0; line < VECTORS * LANES; line += LINE)
        __builtin_prefetch(next + key * head_dim + line, 0, 2);
#pragma GCC unroll 4
    for (int key = 0; key < PART; key += E::STEP) {
      decltype(E::load_weights(now)) w[VECTORS];
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; v += 2) take_values<E>(now + key * head_dim + v * LANES, head_dim, w + v);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        auto x = E::spread(p + row * TILE + slot + key);
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) acc[row][v] = E::mac(acc[row][v], w[v], x);
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) store(out + row * head_dim + v * LANES, acc[row][v]);
}

// One tile.
template <class E, int ROWS>
__attribute__((noinline)) void pass_tile(Scratch<E>& scratch, const Single<E>& task, int first, int count,
                                         const Runs<E>& runs, const State& state) {
  const int dim = task.shape.head_dim;
  const size_t head_size = static_cast<size_t>(task.cache.pool->block_size) * dim;
  for (int head = 0; head < task.heads; ++head)
    score_keys<E, ROWS>(task.q + head * ROWS * dim, runs, head * head_size, count, dim,
                        scratch.scores.data() + head * ROWS * TILE);
  soften(scratch, task.queries, task.shape, first, count, state);
  for (int head = 0; head < task.heads; ++head) {
    const size_t behind = task.cache.value_offset - task.cache.key_offset + head * head_size;
    const typename E::active* p = scratch.p.data() + head * ROWS * TILE;
    float* out = state.out + head * ROWS * dim;
    int from = 0;
    if constexpr (ROWS <= 6)
      for (; from + 2 * PANEL <= dim; from += 2 * PANEL)
        add_values<E, ROWS, 4>(p, runs, behind + from, count, dim, out + from);
    for (; from < dim; from += PANEL) add_values<E, ROWS, 2>(p, runs, behind + from, count, dim, out + from);
  }
}

// The keys of a chunk for all heads of the task, into fresh states, one head's behind the other's. `after` is what this
// thread will probably do next.
template <class E, int ROWS>
void pass_chunk(Scratch<E>& scratch, const Single<E>& task, const Single<E>* after, const State& state) {
  const Reach tiles = reach(task.queries, task.chunk);
  reset(task.queries.rows, task.shape.head_dim, state);
  Runs<E> runs;
  for (int at = tiles.begin; at < tiles.end; at += TILE) {
    Runs<E>::find(task.cache, at, runs.now);
    if (at + TILE < tiles.end)
      Runs<E>::find(task.cache, at + TILE, runs.next);
    else if (after)
      Runs<E>::find(after->cache, reach(after->queries, after->chunk).begin, runs.next);
    else
      std::memcpy(runs.next, runs.now, sizeof runs.now);
    pass_tile<E, ROWS>(scratch, task, at, tiles.count(at), runs, state);
  }
}

// The same with the number of rows known only now.
template <class E, int ROWS = SINGLE_ROWS>
inline void pass_chunk_of(Scratch<E>& scratch, const Single<E>& task, const Single<E>* after, const State& state) {
  if constexpr (ROWS > 1) {
    if (task.queries.rows / task.heads < ROWS) return pass_chunk_of<E, ROWS - 1>(scratch, task, after, state);
  }
  pass_chunk<E, ROWS>(scratch, task, after, state);
}

#endif

}  // namespace ds
