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

// Where a tile's keys or values lie, PART of them to a place, in the order of turns, and those of the tile that follows:
// beside the loads of this one its lines are asked for in the second-level cache. Asked for in one go they would fill
// the queue of loads. All heads use the same places.
template <class E>
struct Places {
  using weight = typename E::weight;
  static constexpr int MOST = TILE / PART, AT_ONCE = 2 * LANES / PART;
  const weight* now[MOST + AT_ONCE];  // behind the last ones those at the end once more
  const weight* next[MOST];
  int key[MOST];  // number of the first key

  void find(const Cached<E>& cache, int first, int count, const Cached<E>& cache_after, int after) {
    const weight* runs[2][TILE / LANES];
    find_runs(cache, first, runs[0]), find_runs(cache_after, after, runs[1]);
    Turns turns(count);
    const int places = count / PART;
    for (int i = 0; i < places; ++i, turns.go_on()) {
      const size_t within = static_cast<size_t>(turns.within) * cache.head_dim;
      now[i] = runs[0][turns.run] + within, next[i] = runs[1][turns.run] + within, key[i] = turns.key();
    }
    for (int i = 0; i < AT_ONCE; ++i) now[places + i] = now[places - 1];
  }

 private:
  // 16 keys a run. Runs behind the last key are that of the last key once more.
  static void find_runs(const Cached<E>& cache, int first, const weight** runs) {
    runs[0] = cache.key(first);
    for (int i = 1; i < TILE / LANES; ++i)
      runs[i] = first + i * LANES < cache.end ? cache.key(first + i * LANES) : runs[i - 1];
  }
};

// Scores of GROUPS times 16 keys from place `place` on, `behind` elements from the places, for ROWS query rows: to
// scores + row * TILE. A DIM of 0 is told by `head_dim` alone.
template <class E, int ROWS, int DIM, int GROUPS>
inline void score_some(const typename E::active* q, const Places<E>& keys, int place, size_t behind, int head_dim,
                       float* scores) {
  using words = decltype(E::load_weights(keys.now[0]));
  constexpr int PARTS = LANES / PART, HALF = LANES / 2 * E::STEP, LINE = 2 * HALF;
  const int width = DIM ? DIM : head_dim;
  vf acc[GROUPS][ROWS] = {};
  for (int dim = 0; dim < width; dim += HALF) {
    __m512i turned[GROUPS][8];
#pragma GCC unroll 2
    for (int group = 0; group < GROUPS; ++group) {
      const int first = place + group * PARTS;
      const char* at[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i)
        at[i] = reinterpret_cast<const char*>(keys.now[first + i / PART] + behind + dim + i % PART * width);
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; ++part)
#pragma GCC unroll 2
        for (int line = 0; line < 2; ++line) {
          __builtin_prefetch(keys.next[first + part] + behind + dim * PART + line * LINE, 0, 2);
          __builtin_prefetch(keys.now[first + GROUPS * PARTS + part] + behind + dim * PART + line * LINE, 0, 3);
        }
      turn(at, turned[group]);
    }
    each_word([&]<int WORD>() {
      words w[GROUPS];
#pragma GCC unroll 2
      for (int group = 0; group < GROUPS; ++group) w[group] = (words)column<WORD>(turned[group]);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        auto x = E::spread(q + row * width + dim + WORD * E::STEP);
#pragma GCC unroll 2
        for (int group = 0; group < GROUPS; ++group) acc[group][row] = E::mac(acc[group][row], w[group], x);
      }
    });
  }
#pragma GCC unroll 2
  for (int group = 0; group < GROUPS; ++group)
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
      float four[PARTS][PART];
      std::memcpy(four, &acc[group][row], sizeof four);
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; ++part)
        std::memcpy(scores + row * TILE + keys.key[place + group * PARTS + part], four[part], sizeof four[0]);
    }
}

// The same for `count` keys. Where few rows leave registers for it, 32 keys share what is read of the queries.
template <class E, int ROWS, int DIM>
inline void score_keys(const typename E::active* q, const Places<E>& keys, size_t behind, int count, int head_dim,
                       float* scores) {
  constexpr int GROUPS = ROWS <= 4 ? 2 : 1, STEP = GROUPS * LANES / PART;
  const int places = count / PART;
  int place = 0;
  for (; place + STEP <= places; place += STEP)
    score_some<E, ROWS, DIM, GROUPS>(q, keys, place, behind, head_dim, scores);
  if (place < places) score_some<E, ROWS, DIM, 1>(q, keys, place, behind, head_dim, scores);
}

// 32 dimensions of STEP neighbouring values.
template <class E, class Words>
inline void take_values(const typename E::weight* from, int head_dim, Words* to) {
  if constexpr (E::STEP == 2)
    interleave_two(from, from + head_dim, to);
  else
    to[0] = E::load_weights(from), to[1] = E::load_weights(from + LANES);
}

// Add `count` values, `behind` elements from the places, with weights `p` to 16 * VECTORS dimensions of ROWS rows.
template <class E, int ROWS, int DIM, int VECTORS>
inline void add_values(const typename E::active* p, const Places<E>& values, size_t behind, int count, int head_dim,
                       float* out) {
  constexpr size_t LINE = LANES * 4 / sizeof(typename E::weight);
  const int width = DIM ? DIM : head_dim;
  vf acc[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) acc[row][v] = load(out + row * width + v * LANES);
  for (int place = 0; place < count / PART; ++place) {
    const typename E::weight* now = values.now[place] + behind;
    const typename E::weight* next = values.next[place] + behind;
#pragma GCC unroll 4
    for (int key = 0; key < PART; ++key)
#pragma GCC unroll 4
      for (size_t line = 0; line < VECTORS * LANES; line += LINE) __builtin_prefetch(next + key * width + line, 0, 2);
#pragma GCC unroll 4
    for (int key = 0; key < PART; key += E::STEP) {
      decltype(E::load_weights(now)) w[VECTORS];
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; v += 2) take_values<E>(now + key * width + v * LANES, width, w + v);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        auto x = E::spread(p + row * TILE + place * PART + key);
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) acc[row][v] = E::mac(acc[row][v], w[v], x);
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) store(out + row * width + v * LANES, acc[row][v]);
}

// One tile.
template <class E, int ROWS, int DIM>
__attribute__((noinline)) void pass_tile(Scratch<E>& scratch, const Single<E>& task, int first, int count,
                                         const Places<E>& places, const State& state) {
  const int dim = task.shape.head_dim;
  const size_t head_size = static_cast<size_t>(task.cache.pool->block_size) * dim;
  for (int head = 0; head < task.heads; ++head)
    score_keys<E, ROWS, DIM>(task.q + head * ROWS * dim, places, head * head_size, count, dim,
                             scratch.scores.data() + head * ROWS * TILE);
  soften(scratch, task.queries, task.shape, first, count, state);
  for (int head = 0; head < task.heads; ++head) {
    const size_t behind = task.cache.value_offset - task.cache.key_offset + head * head_size;
    const typename E::active* p = scratch.p.data() + head * ROWS * TILE;
    float* out = state.out + head * ROWS * dim;
    int from = 0;
    if constexpr (ROWS <= 6)
      for (; from + 2 * PANEL <= dim; from += 2 * PANEL)
        add_values<E, ROWS, DIM, 4>(p, places, behind + from, count, dim, out + from);
    for (; from < dim; from += PANEL) add_values<E, ROWS, DIM, 2>(p, places, behind + from, count, dim, out + from);
  }
}

// The keys of a chunk for all heads of the task, into fresh states, one head's behind the other's. `after` is what this
// thread will probably do next.
template <class E, int ROWS, int DIM>
void pass_chunk(Scratch<E>& scratch, const Single<E>& task, const Single<E>* after, const State& state) {
  const Reach tiles = reach(task.queries, task.chunk);
  reset(task.queries.rows, task.shape.head_dim, state);
  Places<E> places;
  for (int at = tiles.begin; at < tiles.end; at += TILE) {
    const int count = tiles.count(at);
    if (at + TILE < tiles.end)
      places.find(task.cache, at, count, task.cache, at + TILE);
    else if (after)
      places.find(task.cache, at, count, after->cache, reach(after->queries, after->chunk).begin);
    else
      places.find(task.cache, at, count, task.cache, at);
    pass_tile<E, ROWS, DIM>(scratch, task, at, count, places, state);
  }
}

// The same with the number of rows known only now.
template <class E, int DIM, int ROWS = SINGLE_ROWS>
inline void pass_rows(Scratch<E>& scratch, const Single<E>& task, const Single<E>* after, const State& state) {
  if constexpr (ROWS > 1) {
    if (task.queries.rows / task.heads < ROWS) return pass_rows<E, DIM, ROWS - 1>(scratch, task, after, state);
  }
  pass_chunk<E, ROWS, DIM>(scratch, task, after, state);
}

// And the number of dimensions: for the usual ones places are told by less arithmetic.
template <class E>
void pass_chunk_of(Scratch<E>& scratch, const Single<E>& task, const Single<E>* after, const State& state) {
  switch (task.shape.head_dim) {
    case 64: return pass_rows<E, 64>(scratch, task, after, state);
    case 128: return pass_rows<E, 128>(scratch, task, after, state);
    default: return pass_rows<E, 0>(scratch, task, after, state);
  }
}

#endif

}  // namespace ds
