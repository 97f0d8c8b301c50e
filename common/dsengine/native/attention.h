// Attention of a few query rows over the paged cache, in tiles of 128 keys with a running softmax (FlashAttention,
// arXiv 2205.14135).
//
// A query row's result has the same bits in a decode step, in a chunk and in a whole prompt: tiles are counted from
// position 0, a masked key adds exactly nothing, and the states of CHUNK keys are always merged in the same order.
#pragma once

#include "product.h"
#include "turns.h"

namespace ds {

constexpr int CHUNK = 512;
constexpr int QUERY_ROWS = 96;  // query rows (positions x heads of a group) of one task, unless one group has more

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

// The cached keys and values of one sequence for one KV head of one layer.
template <class E>
struct Cached {
  using weight = typename E::weight;
  const Pool* pool;
  const int32_t* table;
  size_t key_offset, value_offset;  // elements from a block's start
  int head_dim;
  int end;  // positions from here on are masked: the last one stands in for them

  weight* block(int number) const {
    return reinterpret_cast<weight*>(pool->base + table[number] * pool->block_nbytes);
  }

  weight* key(int position) const {
    return block(position / pool->block_size) + key_offset + position % pool->block_size * head_dim;
  }

  weight* value(int position) const { return key(position) + (value_offset - key_offset); }

  // The keys of positions first to first + count.
  void rows(int first, int count, const weight** out) const {
    int number = first / pool->block_size, offset = first % pool->block_size;
    const weight* start = block(number) + key_offset;
    for (int i = 0; i < count; ++i) {
      out[i] = first + i < end ? start + offset * head_dim : out[i - 1];
      if (++offset == pool->block_size && first + i + 1 < end) offset = 0, start = block(++number) + key_offset;
    }
  }
};

template <class E>
Cached<E> cached(const Pool& pool, const int32_t* table, const Shape& shape, int layer, int head, int end) {
  size_t run = static_cast<size_t>(pool.block_size) * shape.head_dim;
  size_t first = static_cast<size_t>(layer) * 2 * shape.kv_heads + head;
  return {&pool, table, first * run, (first + shape.kv_heads) * run, shape.head_dim, end};
}

#ifdef __AVX512F__
// Eight words of 16 rows, on their way to being turned over: `column` has the rest of it. Two rows come side by side by
// loads alone, which are cheaper than moves between the lanes of vectors; four would take more loads than that saves.
inline void turn(const char* const* rows, __m512i* to) {
  auto load = [&](int row) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[row])); };
#pragma GCC unroll 2
  for (int eight = 0; eight < 2; ++eight) {
    __m512i r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      r[i] = _mm512_inserti64x4(_mm512_castsi256_si512(load(eight * 8 + i)), load(eight * 8 + i + 4), 1);
    __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    to[0] = _mm512_unpacklo_epi64(a, c), to[1] = _mm512_unpackhi_epi64(a, c);
    to[2] = _mm512_unpacklo_epi64(b, d), to[3] = _mm512_unpackhi_epi64(b, d);
    to += 4;
  }
}

// Word `word` of those eight, of each row.
template <int WORD>
inline __m512i column(const __m512i* turned) {
  constexpr int LANES_OF_BOTH = WORD < 4 ? 0x88 : 0xdd;
  return _mm512_shuffle_i32x4(turned[WORD % 4], turned[WORD % 4 + 4], LANES_OF_BOTH);
}

// each.operator()<WORD>() for those eight in order.
template <int WORD = 0, class Each>
inline void each_word(Each each) {
  each.template operator()<WORD>();
  if constexpr (WORD < 7) each_word<WORD + 1>(each);
}
#endif

// Scratch of one task, in the thread's own memory.
template <class E>
struct Scratch {
  using weight = typename E::weight;
  using active = typename E::active;
  std::vector<active> q, p;
  std::vector<weight> k, v;
  std::vector<float> scores, chunk_out, chunk_max, chunk_sum;

  void reserve(size_t rows, size_t width) {
    if (rows <= rows_ && width == width_) return;
    rows_ = rows, width_ = width;
    q.resize(rows * width), p.resize(rows * TILE), k.resize(TILE * width), v.resize(TILE * width);
    scores.resize(rows * TILE), chunk_out.resize(rows * width);
    chunk_max.resize(rows), chunk_sum.resize(rows);
  }

 private:
  size_t rows_ = 0, width_ = 0;
};

// 16 keys into the panels of a tile: [head_dim / STEP][32 keys][STEP].
template <class E>
inline void pack_keys(const typename E::weight* const* rows, int head_dim, typename E::weight* to) {
  int dim = 0;
#ifdef __AVX512F__
  if constexpr (sizeof(typename E::weight) * E::STEP == 4) {
    constexpr int WIDE = LANES / 2 * E::STEP;
    for (; dim + WIDE <= head_dim; dim += WIDE) {
      const char* at[LANES];
      for (int i = 0; i < LANES; ++i) at[i] = reinterpret_cast<const char*>(rows[i] + dim);
      __m512i turned[8];
      turn(at, turned);
      each_word([&]<int WORD>() {
        _mm512_storeu_si512(to + (dim + WORD * E::STEP) * PANEL, column<WORD>(turned));
      });
    }
  }
#endif
  for (; dim < head_dim; ++dim)
    for (int i = 0; i < LANES; ++i) to[(dim / E::STEP * PANEL + i) * E::STEP + dim % E::STEP] = rows[i][dim];
}

// Two rows of values side by side, `LANES` dimensions from each: [LANES][2].
inline void interleave(const uint16_t* even, const uint16_t* odd, uint16_t* to) {
  vi low = __builtin_convertvector(*reinterpret_cast<const vh_any*>(even), vi);
  vi high = __builtin_convertvector(*reinterpret_cast<const vh_any*>(odd), vi);
  *reinterpret_cast<vi_any*>(to) = low | (high << 16);
}

#ifdef __AVX512BW__
// The same for 2 * LANES dimensions, as two vectors of pairs.
inline void interleave_two(const uint16_t* even, const uint16_t* odd, vi* to) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                       37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
  to[0] = (vi)_mm512_permutex2var_epi16(a, low, b);
  to[1] = (vi)_mm512_permutex2var_epi16(a, high, b);
}
#endif

// `count` values (a multiple of STEP), `delta` elements behind their keys, into panels of 32 dimensions:
// [TILE / STEP][32][STEP] each.
template <class E>
inline void pack_values(const typename E::weight* const* keys, size_t delta, int count, int head_dim,
                        typename E::weight* to) {
  using weight = typename E::weight;
  for (int key = 0; key < count; key += E::STEP) {
    const weight* rows[2] = {keys[key] + delta, keys[key + E::STEP - 1] + delta};
    auto at = [&](int dim) { return to + (dim / PANEL * TILE + key) * PANEL + dim % PANEL * E::STEP; };
    int dim = 0;
    if constexpr (E::STEP == 2) {
#ifdef __AVX512BW__
      for (; dim + 2 * LANES <= head_dim; dim += 2 * LANES) {
        vi pairs[2];
        interleave_two(rows[0] + dim, rows[1] + dim, pairs);
        std::memcpy(at(dim), pairs, sizeof pairs);
      }
#endif
      for (; dim + LANES <= head_dim; dim += LANES) interleave(rows[0] + dim, rows[1] + dim, at(dim));
    } else {
      for (; dim + LANES <= head_dim; dim += LANES) std::memcpy(at(dim), rows[0] + dim, LANES * sizeof(weight));
    }
    for (; dim < head_dim; ++dim)
      for (int s = 0; s < E::STEP; ++s) at(dim)[s] = rows[s][dim];
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

// The running state of each row, [rows], [rows], [rows][width]; the highest score as a power of two.
struct State {
  float* highest;
  float* total;
  float* out;
};

inline vf soft_cap(vf s, float cap) { return tanh(s / cap) * cap; }

// What a score is multiplied by to be a power of two.
inline float power_scale(const Shape& shape) { return shape.softcap != 0 ? LOG2_E : shape.scale * LOG2_E; }

// Soft-cap the scores of a row and take out what its position does not see; the highest one.
template <bool MASKED>
inline float mask_row(float* line, const Queries& queries, const Shape& shape, int row, int first, int count) {
  const int position = MASKED ? queries.at(row) : 0;
  const int from = MASKED && queries.window ? position - queries.window + 1 : 0;
  vf top = broadcast(-INFINITY);
  for (int at = 0; at < count; at += LANES) {
    vf score = load(line + at);
    if (shape.softcap != 0) score = soft_cap(score * shape.scale, shape.softcap);
    if constexpr (MASKED) {
      vi key = lane_numbers() + (first + at);
      score = (key <= position) & (key >= from) ? score : broadcast(-INFINITY);
    }
    if (MASKED || shape.softcap != 0) store(line + at, score);
    top = max(top, score);
  }
  return largest(top);
}

// Probabilities of a row, to `p` in the order of turns; their sum. What is stored is not read again here: a load of
// several stores at once has to wait for them.
template <class E>
inline float weigh_row(const float* line, float scale, float base, int count, typename E::active* p) {
  vf added{};
  auto weigh = [&](int at) {
    vf weight = exp2(load(line + at) * scale - base);
    added += weight;
    return weight;
  };
  if constexpr (sizeof(typename E::active) == sizeof(uint16_t)) {
    if (count == TILE) {
      vq numbers[TILE / (2 * LANES)];
#pragma GCC unroll 4
      for (int i = 0; i < TILE / (2 * LANES); ++i) {
        const vf low = weigh(2 * i * LANES);
        numbers[i] = E::activated(low, weigh((2 * i + 1) * LANES));
      }
      turn_tile(numbers);
      std::memcpy(p, numbers, sizeof numbers);
      return sum(added);
    }
  }
  const int runs = count / LANES;
  for (int run = 0; run < runs; ++run) {
    typename E::active parts[LANES / PART][PART];
    E::activate(parts[0], weigh(run * LANES));
#pragma GCC unroll 4
    for (int part = 0; part < LANES / PART; ++part)
      std::memcpy(p + (part * runs + run) * PART, parts[part], sizeof parts[0]);
  }
  return sum(added);
}

// Scores -> probabilities; the state so far shrinks where a higher score came.
template <class E>
void soften(Scratch<E>& scratch, const Queries& queries, const Shape& shape, int first, int count,
            const State& state) {
  const float scale = power_scale(shape);
  const size_t width = padded(shape.head_dim);
  const int last = queries.at(queries.rows - 1);
  const bool masked = first + count - 1 > queries.position || (queries.window && first <= last - queries.window);
  for (int begin = 0; begin < queries.rows; begin += LANES) {
    const int rows = queries.rows - begin < LANES ? queries.rows - begin : LANES;
    float* lines = scratch.scores.data() + begin * TILE;
    float tops[LANES] = {}, bases[LANES], factors[LANES];
    for (int row = 0; row < rows; ++row)
      tops[row] = masked ? mask_row<true>(lines + row * TILE, queries, shape, begin + row, first, count)
                         : mask_row<false>(lines + row * TILE, queries, shape, begin + row, first, count);
    vf before = load_some(state.highest + begin, rows), now = max(load(tops) * scale, before);
    vf base = now == -INFINITY ? vf{} : now;
    store(bases, base), store(factors, exp2(before - base));
    store_some(state.highest + begin, now, rows);
    for (int row = 0; row < rows; ++row) {
      float added = weigh_row<E>(lines + row * TILE, scale, bases[row], count, scratch.p.data() + (begin + row) * TILE);
      state.total[begin + row] = state.total[begin + row] * factors[row] + added;
      if (factors[row] == 1) continue;
      float* out = state.out + (begin + row) * width;
      for (size_t i = 0; i < width; i += LANES) store(out + i, load(out + i) * factors[row]);
    }
  }
}

// Ask for `count` rows, `delta` elements behind `rows`: the blocks of a sequence lie anywhere.
template <class E>
inline void prefetch(const typename E::weight* const* rows, size_t delta, int count, int head_dim) {
  const size_t nbytes = head_dim * sizeof(typename E::weight);
  for (int i = 0; i < count; ++i)
    for (size_t at = 0; at < nbytes; at += 64) __builtin_prefetch(reinterpret_cast<const char*>(rows[i] + delta) + at);
}

// One tile: scores, softmax, weighted values. `count` keys are there, a multiple of 16.
template <class E>
void attend_tile(Scratch<E>& scratch, const Queries& queries, const Shape& shape, const Cached<E>& cache, int first,
                 int count, const State& state) {
  using weight = typename E::weight;
  const size_t width = padded(shape.head_dim), panel = static_cast<size_t>(PANEL) * shape.head_dim;
  const size_t delta = cache.value_offset - cache.key_offset;
  const weight* rows[TILE];
  cache.rows(first, count, rows);
  // The next tile is asked for bit by bit while this one is worked on: memory and arithmetic take turns no more.
  const int left = cache.end - first - count, more = left < 0 ? 0 : left < TILE ? left : TILE;
  const weight* next[TILE];
  if (more > 0) cache.rows(first + count, more, next);
  auto ask = [&](size_t behind, int at) {
    int here = more - at < LANES ? more - at : LANES;
    if (here > 0) prefetch<E>(next + at, behind, here, shape.head_dim);
  };
  for (int key = 0; key < count; key += LANES) {
    ask(0, key);
    pack_keys<E>(rows + key, shape.head_dim, scratch.k.data() + key / PANEL * panel + key % PANEL * E::STEP);
  }
  strips<E>(queries.rows, scratch.q.data(), width, scratch.k.data(), panel, count, shape.head_dim,
            {nullptr, 0, scratch.scores.data(), TILE});
  soften(scratch, queries, shape, first, count, state);
  const weight* turned[TILE];
  take_turns(rows, count, turned);
  for (int key = 0; key < count; key += LANES) {
    ask(delta, key);
    pack_values<E>(turned + key, delta, LANES, shape.head_dim, scratch.v.data() + key * PANEL);
  }
  strips<E>(queries.rows, scratch.p.data(), TILE, scratch.v.data(), static_cast<size_t>(PANEL) * TILE,
            static_cast<int>(width), count, {state.out, width, state.out, width});
}

// Move `into` on by the state `other` of later keys.
inline void merge(int rows, size_t width, const State& into, const State& other) {
  for (int row = 0; row < rows; ++row) {
    float a = into.highest[row], b = other.highest[row];
    if (b == -INFINITY) continue;
    float now = std::fmax(a, b);
    float old_part = a == -INFINITY ? 0 : exp2(a - now), new_part = exp2(b - now);
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

// The tiles [begin, end) of chunk number `chunk` that the queries see.
struct Reach {
  int begin, end;
  int count(int at) const { return end - at < TILE ? (end - at + LANES - 1) / LANES * LANES : TILE; }
};

inline Reach reach(const Queries& queries, int chunk) {
  int last = queries.at(queries.rows - 1) + 1, first = chunk * CHUNK;
  int seen = queries.window ? queries.position - queries.window + 1 : 0;
  return {first > seen ? first : seen / TILE * TILE, first + CHUNK < last ? first + CHUNK : last};
}

// The keys of chunk number `chunk` that the queries see, into a fresh `state`. False where they see none.
template <class E>
bool attend_chunk(Scratch<E>& scratch, const Queries& queries, const Shape& shape, const Cached<E>& cache, int chunk,
                  const State& state) {
  const Reach tiles = reach(queries, chunk);
  reset(queries.rows, padded(shape.head_dim), state);
  for (int at = tiles.begin; at < tiles.end; at += TILE)
    attend_tile<E>(scratch, queries, shape, cache, at, tiles.count(at), state);
  return tiles.begin < tiles.end;
}

}  // namespace ds
