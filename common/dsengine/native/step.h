// One step of a model: rows of tokens in, logits of the wanted rows out, keys and values written to the pool.
//
// A batch holds any mixture of whole prompts, chunks and single tokens. The residual stream stays in single precision.
#pragma once

#include <algorithm>

#include "feed.h"

namespace ds {

// Query rows of one sequence, for some KV heads. `chunk` -1: all chunks one after the other; else that one of
// `chunks`, its states in the slots from `slot` on, one for each head.
struct Task {
  int32_t sequence, row, count, head, heads, chunk, chunks, slot;
};

template <class E>
class Step {
  using active = typename E::active;
  using weight = typename E::weight;

 public:
  Step(const Model& model, Team& team)
      : m_(model),
        team_(team),
        feed_(model, team),
        qkv_width_(padded((model.shape.heads + 2 * model.shape.kv_heads) * model.shape.head_dim)),
        q_width_(padded(model.shape.heads * model.shape.head_dim)),
        hidden_width_(padded(model.hidden)),
        head_width_(padded(model.shape.head_dim)),
        group_(model.shape.heads / model.shape.kv_heads) {}

  void forward(const Batch& batch, const Pool& pool) {
    b_ = &batch, pool_ = &pool;
    prepare();
    std::function<void()> job = [this] { work(); };
    team_.run(job);
  }

 private:
  void prepare() {
    size_t rows = b_->rows;
    hidden_.reserve(rows * hidden_width_), extra_.reserve(rows * hidden_width_);
    normed_.reserve(rows * hidden_width_), qkv_.reserve(rows * qkv_width_);
    q_.reserve(rows * q_width_), mixed_.reserve(rows * q_width_);
    feed_.reserve(b_->rows);
    sequence_of_.resize(rows), positions_.resize(rows), tasks_.clear(), merges_.clear();
    int row = 0, slots = 0;
    const int heads = heads_of_task();
    for (int s = 0; s < b_->sequences; ++s) {
      int first = row;
      for (; row < b_->row_ends[s]; ++row) sequence_of_[row] = s, positions_[row] = b_->starts[s] + row - first;
      plan(s, first, row - first, heads, slots);
    }
    size_t state_rows = static_cast<size_t>(slots) * group_;
    highest_.reserve(state_rows), total_.reserve(state_rows), out_.reserve(state_rows * head_width_);
    look_ahead();
  }

  // What attention of single tokens will read, in the order of its tasks, is asked for by products of many rows.
  void look_ahead() {
    std::vector<const char*> runs;
    const size_t nbytes = 2 * sizeof(weight) * m_.shape.kv_heads * m_.shape.head_dim * pool_->block_size;
    for (int s = 0; s < b_->sequences && b_->rows > MAX_ROWS; ++s) {
      if (b_->row_ends[s] - (s ? b_->row_ends[s - 1] : 0) != 1) continue;
      const int32_t* table = b_->tables + b_->table_starts[s];
      for (int block = 0; block * pool_->block_size < b_->starts[s]; ++block)
        runs.push_back(pool_->base + table[block] * pool_->block_nbytes);
    }
    team_.ahead.plan(std::move(runs), nbytes, m_.layers);
    ask_for(0);
  }

  // From here on for the KV of that layer; a window sees little of it.
  void ask_for(int layer) { team_.ahead.turn_to(layer < m_.layers && !m_.layer[layer].window ? layer : m_.layers); }

  // Long prompts in blocks of queries; single tokens by chunks of keys, so that one long sequence keeps all threads
  // busy. Several heads at once read longer runs of memory, where there are enough tasks all the same.
  void plan(int sequence, int first, int count, int heads, int& slots) {
    if (count > 1 || b_->starts[sequence] == 0) return plan_prompt(sequence, first, count);
    const int chunks = (b_->starts[sequence] + CHUNK) / CHUNK;
    for (int head = 0; head < m_.shape.kv_heads; head += heads) {
      const int some = std::min(heads, m_.shape.kv_heads - head);
      if (chunks > 1) merges_.push_back({sequence, first, 1, head, some, 0, chunks, slots});
      for (int c = 0; c < chunks; ++c, slots += some)
        tasks_.push_back({sequence, first, 1, head, some, c, chunks, slots});
    }
  }

  void plan_prompt(int sequence, int first, int count) {
    // Fewer rows where there would not be tasks enough for all threads.
    const bool few = count * m_.shape.heads < 4 * team_.count() * QUERY_ROWS;
    const int per_task = std::max((few ? QUERY_ROWS / 2 : QUERY_ROWS) / group_, 1);
    // The longest first, so that no thread ends with one.
    for (int head = 0; head < m_.shape.kv_heads; ++head)
      for (int at = (count - 1) / per_task * per_task; at >= 0; at -= per_task)
        tasks_.push_back({sequence, first + at, std::min(count - at, per_task), head, 1, -1, 0, 0});
  }

  // KV heads that a task of a single token takes.
  int heads_of_task() const {
    const int most = heads_together<E>(m_.shape);
    int chunks = 0;
    for (int s = 0; s < b_->sequences; ++s) chunks += (b_->starts[s] + CHUNK) / CHUNK;
    return team_.count() == 1 || chunks >= 4 * team_.count() ? most : 1;
  }

  void work() {
    clear_blocks();
    if (b_->hidden_in) take(); else embed();
    for (int layer = 0; layer < m_.layers; ++layer) {
      const Layer& l = m_.layer[layer];
      attention(layer, l);
      mlp(l);
    }
    if (b_->hidden_out) give(); else logits();
  }

  // A block that this step begins and does not fill is cleared: see dsengine/pool.py.
  void clear_blocks() {
    int size = pool_->block_size;
    team_.share(b_->rows, 64, [&](int begin, int end) {
      for (int row = begin; row < end; ++row) {
        int s = sequence_of_[row];
        if (positions_[row] % size || row + size <= b_->row_ends[s]) continue;
        int block = b_->tables[b_->table_starts[s] + positions_[row] / size];
        std::memset(pool_->base + block * pool_->block_nbytes, 0, pool_->block_nbytes);
      }
    });
  }

  void embed() {
    share_rows(team_, b_->rows, [&](int row) {
      const weight* from = static_cast<const weight*>(m_.embedding) + static_cast<size_t>(b_->tokens[row]) * m_.hidden;
      float* to = hidden_.get() + row * hidden_width_;
      for (int i = 0; i < m_.hidden; ++i) to[i] = E::one(from[i]) * m_.embedding_scale;
      if (!m_.position_embedding) return;
      const float* position = m_.position_embedding + static_cast<size_t>(positions_[row]) * m_.hidden;
      for (int i = 0; i < m_.hidden; ++i) to[i] += position[i];
    });
  }

  // Between the stages of a pipeline rows lie close.
  void take() {
    share_rows(team_, b_->rows, [&](int row) {
      std::memcpy(hidden_.get() + row * hidden_width_, b_->hidden_in + static_cast<size_t>(row) * m_.hidden,
                  m_.hidden * sizeof(float));
    });
  }

  void give() {
    share_rows(team_, b_->rows, [&](int row) {
      std::memcpy(b_->hidden_out + static_cast<size_t>(row) * m_.hidden, hidden_.get() + row * hidden_width_,
                  m_.hidden * sizeof(float));
    });
  }

  // `besides(row)` is done for each row.
  template <class Besides>
  void norm_rows(const Norm& norm, Besides besides) {
    share_rows(team_, b_->rows, [&](int row) {
      besides(row);
      active* to = normed_.get() + row * hidden_width_;
      normalise(hidden_.get() + row * hidden_width_, m_.hidden, norm, m_.eps,
                [&](int i, int n, vf y) { activate_some<E>(to + i, y, n); });
    });
  }

  // The product joins the residual stream, through a norm of its own where the model has one.
  void join(const Linear& linear, const active* from, size_t width, const Norm& after) {
    bool apart = after.weight || m_.reduce;
    float* to = apart ? extra_.get() : hidden_.get();
    multiply<E>(team_, b_->rows, from, width, linear, [&](int row, int column, vf y) {
      float* at = to + row * hidden_width_ + column;
      store(at, apart ? y : load(at) + y);
    });
    if (apart) join_extra(after);
  }

  // What has come together in `extra_` joins the residual stream.
  void join_extra(const Norm& after) {
    float* to = extra_.get();
    if (m_.reduce) team_.share(1, 1, [&](int, int) { m_.reduce(to, static_cast<int64_t>(b_->rows) * hidden_width_); });
    share_rows(team_, b_->rows, [&](int row) {
      float* at = hidden_.get() + row * hidden_width_;
      const float* come = extra_.get() + row * hidden_width_;
      auto add = [&](int i, int n, vf y) { store_some(at + i, load_some(at + i, n) + y, n); };
      if (after.weight) return normalise(come, m_.hidden, after, m_.eps, add);
      in_lanes(m_.hidden, [&](int i, int n) { add(i, n, load_some(come + i, n)); });
    });
  }

  void attention(int index, const Layer& l) {
    norm_rows(l.before_attention, [&](int row) { expect(index, row); });
    multiply<E>(team_, b_->rows, normed_.get(), hidden_width_, l.qkv,
               [&](int row, int column, vf y) { store(qkv_.get() + row * qkv_width_ + column, y); });
    share_rows(team_, b_->rows, [&](int row) { place(index, l, row); });
    team_.share(static_cast<int>(tasks_.size()), 1, [&](int task, int) { attend(index, l, tasks_[task]); });
    ask_for(index + 1);
    if (!merges_.empty())
      team_.share(static_cast<int>(merges_.size()), 1, [&](int task, int) { merge_chunks(merges_[task]); });
    if (!m_.parallel) return join(l.attention_out, mixed_.get(), q_width_, l.after_attention);
    // The MLP reads the same input: its norm goes first, before the residual stream moves on.
    norm_rows(l.before_mlp, [](int) {});
    join(l.attention_out, mixed_.get(), q_width_, l.after_attention);
  }

  void mlp(const Layer& l) {
    if (!m_.parallel) norm_rows(l.before_mlp, [](int) {});
    if (l.experts) {
      feed_.experts(*l.experts, b_->rows, normed_.get(), hidden_width_, extra_.get());
      return join_extra(l.after_mlp);
    }
    feed_.inner(b_->rows, normed_.get(), hidden_width_, l.gate, l.up);
    join(l.down, feed_.made(), feed_.width(), l.after_mlp);
  }

  // Ask for the lines that `place` will write to: nobody has them in a cache.
  void expect(int index, int row) {
    const Shape& shape = m_.shape;
    const int32_t* table = b_->tables + b_->table_starts[sequence_of_[row]];
    for (int head = 0; head < shape.kv_heads; ++head) {
      auto cache = cached<E>(*pool_, table, shape, index, head, positions_[row] + 1);
      for (weight* to : {cache.key(positions_[row]), cache.value(positions_[row])})
        for (int at = 0; at < shape.head_dim; at += 64 / sizeof(weight)) __builtin_prefetch(to + at, 1);
    }
  }

  // Norm and rotation of a row's heads; queries made ready, keys and values written to the pool.
  void place(int index, const Layer& l, int row) {
    const Shape& shape = m_.shape;
    int position = positions_[row], dim = shape.head_dim;
    const int32_t* table = b_->tables + b_->table_starts[sequence_of_[row]];
    size_t turn_row = static_cast<size_t>(position) * (m_.rotary / 2);
    const float* cos = l.cos ? l.cos + turn_row : nullptr;
    const float* sin = l.cos ? l.sin + turn_row : nullptr;
    for (int head = 0; head < shape.heads + 2 * shape.kv_heads; ++head) {
      float* x = qkv_.get() + row * qkv_width_ + head * dim;
      int kv = head - shape.heads;
      if (kv < 0) {
        turn_head(x, dim, l.q_norm, m_.eps, m_.rotary, cos, sin);
        active* to = q_.get() + row * q_width_ + head * dim;
        in_lanes(dim, [&](int i, int n) { activate_some<E>(to + i, load_some(x + i, n), n); });
        continue;
      }
      int which = kv >= shape.kv_heads;
      if (!which) turn_head(x, dim, l.k_norm, m_.eps, m_.rotary, cos, sin);
      auto cache = cached<E>(*pool_, table, shape, index, kv % shape.kv_heads, position + 1);
      weight* to = which ? cache.value(position) : cache.key(position);
      in_lanes(dim, [&](int i, int n) { narrow_some<E>(to + i, load_some(x + i, n), n); });
    }
  }

  Cached<E> cache_of(int index, const Task& task, int head, int end) const {
    return cached<E>(*pool_, b_->tables + b_->table_starts[task.sequence], m_.shape, index, head, end);
  }

  void attend(int index, const Layer& l, const Task& task) {
    static thread_local Scratch<E> scratch;
    scratch.reserve(task.count * task.heads * group_, head_width_);
    if (task.chunk < 0) return attend_prompt(scratch, index, l, task);
    attend_single(scratch, index, l, task);
    if (task.chunks == 1) finish(task, slot(task.slot));
  }

  Single<E> single(int index, const Layer& l, const Task& task) const {
    const int position = positions_[task.row], rows = task.heads * group_;
    const active* q = q_.get() + task.row * q_width_ + task.head * group_ * m_.shape.head_dim;
    auto cache = cache_of(index, task, task.head, position + 1);
    return {q, {rows, rows, position, l.window}, m_.shape, cache, task.heads, task.chunk};
  }

  void pass(Scratch<E>& scratch, int index, const Layer& l, const Task& task) {
    const Task* after = &task + team_.count();
    const bool follows = after < tasks_.data() + tasks_.size() && after->chunk >= 0;
    const Single<E> now = single(index, l, task), next = single(index, l, follows ? *after : task);
    pass_chunk_of<E>(scratch, now, follows ? &next : nullptr, slot(task.slot));
  }

  // One chunk of the keys that a single token sees.
  void attend_single(Scratch<E>& scratch, int index, const Layer& l, const Task& task) {
    if constexpr (IN_WORDS<E>) {
      if (passes(m_.shape, *pool_)) return pass(scratch, index, l, task);
    }
    const int position = positions_[task.row];
    Queries queries{group_, group_, position, l.window};
    for (int head = 0; head < task.heads; ++head) {
      take_queries(scratch, task, task.head + head, group_);
      auto cache = cache_of(index, task, task.head + head, position + 1);
      attend_chunk<E>(scratch, queries, m_.shape, cache, task.chunk, slot(task.slot + head));
    }
  }

  void attend_prompt(Scratch<E>& scratch, int index, const Layer& l, const Task& task) {
    const int first = positions_[task.row], end = first + task.count;
    Queries queries{task.count * group_, group_, first, l.window};
    take_queries(scratch, task, task.head, queries.rows);
    auto cache = cache_of(index, task, task.head, end);
    State chunk{scratch.chunk_max.data(), scratch.chunk_sum.data(), scratch.chunk_out.data()};
    static thread_local std::vector<float> all;
    all.resize(queries.rows * (head_width_ + 2));
    State state{all.data(), all.data() + queries.rows, all.data() + 2 * queries.rows};
    attend_chunk<E>(scratch, queries, m_.shape, cache, 0, state);
    for (int c = 1; c * CHUNK < end; ++c)
      if (attend_chunk<E>(scratch, queries, m_.shape, cache, c, chunk))
        merge(queries.rows, head_width_, state, chunk);
    finish(task, state);
  }

  void take_queries(Scratch<E>& scratch, const Task& task, int head, int rows) {
    const int dim = m_.shape.head_dim;
    for (int row = 0; row < rows; ++row)
      std::memcpy(scratch.q.data() + row * head_width_,
                  q_.get() + (task.row + row / group_) * q_width_ + (head * group_ + row % group_) * dim,
                  dim * sizeof(active));
  }

  State slot(int number) const {
    size_t at = static_cast<size_t>(number) * group_;
    return {highest_.get() + at, total_.get() + at, out_.get() + at * head_width_};
  }

  void merge_chunks(const Task& task) {
    State state = slot(task.slot);
    for (int c = 1; c < task.chunks; ++c)
      merge(task.heads * group_, head_width_, state, slot(task.slot + c * task.heads));
    finish(task, state);
  }

  // The states of a task's rows, head by head, to the input of the next product.
  void finish(const Task& task, const State& state) {
    const int dim = m_.shape.head_dim, rows = task.count * group_;
    for (int i = 0; i < task.heads * rows; ++i) {
      const int row = i % rows, head = task.head + i / rows;
      active* to = mixed_.get() + (task.row + row / group_) * q_width_ + (head * group_ + row % group_) * dim;
      const float* from = state.out + i * head_width_;
      float scale = 1.0f / state.total[i];
      in_lanes(dim, [&](int i, int n) { activate_some<E>(to + i, load_some(from + i, n) * scale, n); });
    }
  }

  void logits() {
    team_.share(b_->logit_rows, 1, [&](int row, int) {
      active* to = normed_.get() + row * hidden_width_;
      normalise(hidden_.get() + b_->picked[row] * hidden_width_, m_.hidden, m_.final_norm, m_.eps,
                [&](int i, int n, vf y) { activate_some<E>(to + i, y, n); });
    });
    size_t width = padded(m_.vocab);
    multiply<E>(team_, b_->logit_rows, normed_.get(), hidden_width_, m_.head, [&](int row, int column, vf y) {
      if (m_.logit_softcap != 0) y = soft_cap(y, m_.logit_softcap);
      store(b_->logits + row * width + column, y);
    });
  }

  const Model m_;
  Team& team_;
  Feed<E> feed_;
  const size_t qkv_width_, q_width_, hidden_width_, head_width_;
  const int group_;
  const Batch* b_ = nullptr;
  const Pool* pool_ = nullptr;
  Buffer<float> hidden_, extra_, qkv_, highest_, total_, out_;
  Buffer<active> normed_, q_, mixed_;
  std::vector<int32_t> sequence_of_, positions_;
  std::vector<Task> tasks_, merges_;
};

}  // namespace ds
