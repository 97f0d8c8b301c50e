// Attention of a few query rows over the paged cache, in tiles of 64 keys with a running softmax (FlashAttention,
// arXiv 2205.14135).
//
// A query row's result has the same bits in a decode step, in a chunk and in a whole prompt: tiles are counted from
// position 0, a masked key adds exactly nothing, and the states of CHUNK keys are always merged in the same order.
#pragma once

#include "product.h"

namespace ds {

constexpr int TILE = 64;
constexpr int TILE_VECTORS = TILE / LANES;
constexpr int CHUNK = 512;
constexpr int QUERY_ROWS = 48;  // query rows (positions x heads of a group) of one task, unless one group has more

struct Pool {
  char* base;
  int64_t block_nbytes;
  int32_t block_size;
};

struct Shape {
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  float scale;
  float softcap;  // 0: none
};

// Where the K (which = 0) or V (1) of one KV head of a layer lies, by position.
template <class E>
struct KeyValues {
  const Pool* pool;
  const int32_t* table;
  size_t offset;  // elements from a block's start
  int head_dim;
  int end;  // positions from here on are masked: the last one stands in for them

  typename E::weight* at(int position) const {
    int size = pool->block_size;
    position = position < end ? position : end - 1;
    char* block = pool->base + table[position / size] * pool->block_nbytes;
    return reinterpret_cast<typename E::weight*>(block) + offset + static_cast<size_t>(position % size) * head_dim;
  }
};

template <class E>
KeyValues<E> key_values(const Pool& pool, const int32_t* table, const Shape& shape, int layer, int which, int head,
                        int end) {
  size_t runs = (static_cast<size_t>(layer) * 2 + which) * shape.kv_heads + head;
  return {&pool, table, runs * pool.block_size * shape.head_dim, shape.head_dim, end};
}

#ifdef __AVX512F__
// 16 rows of 16 words each, turned over: `rows` readable 64 bytes each; column i goes to out + i * stride words.
inline void turn(const void* const* rows, int32_t* out, size_t stride) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i]);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(out + i * stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 8) * stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
  }
}
#endif

// Scratch of one task, in the thread's own memory.
template <class E>
struct Scratch {
  using weight = typename E::weight;
  using active = typename E::active;
  std::vector<active> q, p;
  std::vector<weight> k, v;
  std::vector<float> scores, chunk_out, chunk_max, chunk_sum, factor;

  void reserve(size_t rows, size_t width) {
    if (rows <= rows_ && width == width_) return;
    rows_ = rows, width_ = width;
    q.resize(rows * width), p.resize(rows * TILE), k.resize(TILE * width), v.resize(TILE * width);
    scores.resize(rows * TILE), chunk_out.resize(rows * width);
    chunk_max.resize(rows), chunk_sum.resize(rows), factor.resize(rows);
  }

 private:
  size_t rows_ = 0, width_ = 0;
};

// K of 16 keys from `first` on into the panels of a tile: [head_dim / STEP][32 keys][STEP].
template <class E>
inline void pack_keys(const KeyValues<E>& keys, int first, typename E::weight* to) {
  const typename E::weight* rows[LANES];
  for (int i = 0; i < LANES; ++i) rows[i] = keys.at(first + i);
  int dim = 0;
#ifdef __AVX512F__
  if constexpr (sizeof(typename E::weight) * E::STEP == 4) {
    constexpr int WIDE = LANES * E::STEP;
    for (; dim + WIDE <= keys.head_dim; dim += WIDE) {
      const void* at[LANES];
      for (int i = 0; i < LANES; ++i) at[i] = rows[i] + dim;
      turn(at, reinterpret_cast<int32_t*>(to + static_cast<size_t>(dim) * PANEL), PANEL);
    }
  }
#endif
  for (; dim < keys.head_dim; ++dim)
    for (int i = 0; i < LANES; ++i)
      to[(dim / E::STEP * PANEL + i) * E::STEP + dim % E::STEP] = rows[i][dim];
}

// V of `count` keys (a multiple of STEP) into panels of 32 dimensions: [TILE / STEP][32][STEP] each.
template <class E>
inline void pack_values(const KeyValues<E>& values, int first, int count, typename E::weight* to) {
  using weight = typename E::weight;
  for (int key = 0; key < count; key += E::STEP) {
    const weight* rows[2] = {values.at(first + key), values.at(first + key + E::STEP - 1)};
    int dim = 0;
    for (; dim + LANES <= values.head_dim; dim += LANES) {
      weight* at = to + static_cast<size_t>(dim / PANEL) * PANEL * TILE + key * PANEL + dim % PANEL * E::STEP;
      if constexpr (E::STEP == 2) {
        vi low = __builtin_convertvector(*reinterpret_cast<const vh_any*>(rows[0] + dim), vi);
        vi high = __builtin_convertvector(*reinterpret_cast<const vh_any*>(rows[1] + dim), vi);
        *reinterpret_cast<vi_any*>(at) = low | (high << 16);
      } else {
        std::memcpy(at, rows[0] + dim, LANES * sizeof(weight));
      }
    }
    for (; dim < values.head_dim; ++dim)
      for (int s = 0; s < E::STEP; ++s)
        to[static_cast<size_t>(dim / PANEL) * PANEL * TILE + key * PANEL + dim % PANEL * E::STEP + s] = rows[s][dim];
  }
}

// What a task attends from: query row r stands at `position(r)` and sees (position - window, position].
struct Queries {
  int rows;       // positions x group
  int group;      // heads that share the KV head
  int position;   // of the first row
  int window;     // 0: sees everything before it
  int at(int row) const { return position + row / group; }
};

// The running state of each row, [rows], [rows], [rows][width].
struct State {
  float* highest;
  float* total;
  float* out;
};

inline vf soft_cap(vf s, float cap) { return tanh(s / cap) * cap; }

// Scores -> probabilities, state moved on; factor[row] is what the sums so far shrink by.
template <class E>
void soften(Scratch<E>& scratch, const Queries& queries, const Shape& shape, int first, const State& state) {
  for (int row = 0; row < queries.rows; ++row) {
    float* line = scratch.scores.data() + row * TILE;
    int position = queries.at(row);
    int from = queries.window ? position - queries.window + 1 : 0;
    vf s[TILE_VECTORS], top = broadcast(-INFINITY);
    for (int v = 0; v < TILE_VECTORS; ++v) {
      vi key = lane_numbers() + (first + v * LANES);
      vf score = load(line + v * LANES) * shape.scale;
      if (shape.softcap != 0) score = soft_cap(score, shape.softcap);
      s[v] = (key <= position) & (key >= from) ? score : broadcast(-INFINITY);
      top = max(top, s[v]);
    }
    float before = state.highest[row], now = std::fmax(before, largest(top));
    float base = now == -INFINITY ? 0 : now;
    vf added{};
    for (int v = 0; v < TILE_VECTORS; ++v) {
      vf p = exp(s[v] - base);
      added += p;
      E::activate(scratch.p.data() + row * TILE + v * LANES, p);
    }
    float factor = before == now ? 1.0f : exp1(before - base);
    scratch.factor[row] = factor;
    state.highest[row] = now;
    state.total[row] = state.total[row] * factor + sum(added);
  }
}

// One tile: scores, softmax, weighted values. `count` keys are there, a multiple of 16.
template <class E>
void attend_tile(Scratch<E>& scratch, const Queries& queries, const Shape& shape, const KeyValues<E>& keys,
                 const KeyValues<E>& values, int first, int count, const State& state) {
  using weight = typename E::weight;
  const size_t width = padded(shape.head_dim), panel = static_cast<size_t>(PANEL) * shape.head_dim;
  for (int key = 0; key < count; key += LANES)
    pack_keys<E>(keys, first + key, scratch.k.data() + key / PANEL * panel + key % PANEL * E::STEP);
  for (int pair = 0; pair < count; pair += PANEL) {
    const weight* panels[1] = {scratch.k.data() + pair / PANEL * panel};
    strip<E, 1>(
        queries.rows, scratch.q.data(), width, panels, shape.head_dim, [](int, int) { return vf{}; },
        [&](int m, int v, vf s) { store(scratch.scores.data() + m * TILE + pair + v * LANES, s); });
  }
  soften(scratch, queries, shape, first, state);
  pack_values<E>(values, first, count, scratch.v.data());
  for (size_t dim = 0; dim < width; dim += PANEL) {
    const weight* panels[1] = {scratch.v.data() + dim * TILE};
    float* out = state.out + dim;
    strip<E, 1>(
        queries.rows, scratch.p.data(), TILE, panels, count,
        [&](int m, int v) { return load(out + m * width + v * LANES) * scratch.factor[m]; },
        [&](int m, int v, vf o) { store(out + m * width + v * LANES, o); });
  }
}

// Move `into` on by the state `other` of later keys.
inline void merge(int rows, size_t width, const State& into, const State& other) {
  for (int row = 0; row < rows; ++row) {
    float a = into.highest[row], b = other.highest[row];
    if (b == -INFINITY) continue;
    float now = std::fmax(a, b);
    float old_part = a == -INFINITY ? 0 : exp1(a - now), new_part = exp1(b - now);
    into.highest[row] = now;
    into.total[row] = into.total[row] * old_part + other.total[row] * new_part;
    for (size_t i = 0; i < width; i += LANES) {
      float* out = into.out + row * width + i;
      store(out, load(out) * old_part + load(other.out + row * width + i) * new_part);
    }
  }
}

inline void reset(int rows, size_t width, const State& state) {
  for (int row = 0; row < rows; ++row) state.highest[row] = -INFINITY, state.total[row] = 0;
  std::memset(state.out, 0, rows * width * sizeof(float));
}

// The keys of chunk number `chunk` that the queries see, into a fresh `state`. False where they see none.
template <class E>
bool attend_chunk(Scratch<E>& scratch, const Queries& queries, const Shape& shape, const KeyValues<E>& keys,
                  const KeyValues<E>& values, int chunk, const State& state) {
  const size_t width = padded(shape.head_dim);
  int last = queries.at(queries.rows - 1) + 1, first = chunk * CHUNK;
  int end = first + CHUNK < last ? first + CHUNK : last;
  int seen = queries.window ? queries.position - queries.window + 1 : 0;
  int begin = first > seen ? first : seen / TILE * TILE;
  reset(queries.rows, width, state);
  for (int at = begin; at < end; at += TILE) {
    int count = end - at < TILE ? (end - at + LANES - 1) / LANES * LANES : TILE;
    attend_tile<E>(scratch, queries, shape, keys, values, at, count, state);
  }
  return begin < end;
}

}  // namespace ds
