// From rows of logits to tokens. What is drawn is told in sampler.py; drawing.py does the same in torch, bit for bit:
// all that is kept is kept by comparing logits or whole numbers, and sums of weights do not depend on an order.
//
// So nobody has to sort: what a row keeps lies above some logit, and few tokens lie there.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "team.h"
#include "weight.h"

namespace ds {

constexpr int RUN = 128;  // neighbours whose highest logit is kept
constexpr int BUCKETS = 256;

// Memory of one thread.
class DrawScratch {
 public:
  void reserve(int vocab) {
    const size_t room = padded_lanes(vocab);
    if (adjusted.size() >= room) return;
    highest.resize(runs(vocab)), sums.resize(runs(vocab)), order.resize(std::max<size_t>(runs(vocab), room));
    adjusted.resize(room), logits.resize(room), ids.resize(room), weights.resize(room), pairs.resize(room);
  }

  static int runs(int vocab) { return (vocab + RUN - 1) / RUN; }

  std::vector<float> highest;  // of each run
  std::vector<int64_t> sums;   // of each run's weights
  std::vector<float> order;    // whatever is to be put in order
  std::vector<float> adjusted;
  // tokens that were gathered, in the order of their ids
  std::vector<int32_t> ids;
  std::vector<float> logits;
  std::vector<int64_t> weights;
  std::vector<std::pair<float, int64_t>> pairs;

 private:
  static size_t padded_lanes(int vocab) { return (static_cast<size_t>(vocab) + 2 * LANES - 1) / LANES * LANES; }
};

// One row of logits.
class LogitRow {
 public:
  LogitRow(const float* x, int vocab, DrawScratch& scratch)
      : x_(x), vocab_(vocab), runs_(DrawScratch::runs(vocab)), scratch_(scratch) {
    vf wrong{};
    for (int run = 0; run < runs_; ++run) {
      vf best = broadcast(-std::numeric_limits<float>::infinity());
      int i = run * RUN, end = last(run);
      for (; i + LANES <= end; i += LANES) {
        vf v = load(x + i);
        best = max(v, best), wrong += v - v;
      }
      float most = largest(best);
      for (; i < end; ++i) most = x[i] > most ? x[i] : most, wrong[0] += x[i] - x[i];
      scratch.highest[run] = most;
    }
    highest_ = *std::max_element(scratch.highest.begin(), scratch.highest.begin() + runs_);
    finite_ = sum(wrong) == 0;
  }

  float highest() const { return highest_; }
  bool finite() const { return finite_; }

  // The first of the highest.
  int32_t likeliest() const {
    for (int run = 0; run < runs_; ++run)
      if (scratch_.highest[run] == highest_)
        for (int i = run * RUN; i < last(run); ++i)
          if (x_[i] == highest_) return i;
    return 0;
  }

  // Of all weights; each run's are kept.
  int64_t total(float scale) {
    int64_t total = 0;
    for (int run = 0; run < runs_; ++run) {
      const int at = run * RUN;
      total += scratch_.sums[run] = sum_of_weights(x_ + at, last(run) - at, highest_, scale);
    }
    return total;
  }

  int32_t draw(const Draw& draw) {
    if (draw.scale == 0) return likeliest();
    const bool some = draw.top_k > 0 && draw.top_k < vocab_;
    if (!some && draw.top_p >= 1 && draw.min_p <= 0) return draw_of_all(draw);
    float border = some ? kth(draw.top_k) : -std::numeric_limits<float>::infinity();
    if (some) weigh_gathered(draw.scale);
    if (draw.top_p < 1) border = top_p_border(draw, some, border);
    if (!some && draw.top_p >= 1) {
      gather(highest_ + (std::log2(draw.min_p) - 0.01) / draw.scale);
      weigh_gathered(draw.scale);
    }
    return draw_of_gathered(draw, border);
  }

  // The `count` likeliest, likeliest first, of equals the lower id first.
  int list(int count, int32_t* tokens, float* logits) {
    count = std::min(count, vocab_);
    if (count <= 0) return 0;
    const float border = kth(count);
    int kept = 0;
    for (int i = 0; i < gathered_; ++i) {
      const float logit = scratch_.logits[i];
      if (logit < border || (kept == count && logit <= logits[count - 1])) continue;
      int at = kept < count ? kept++ : count - 1;
      for (; at > 0 && logits[at - 1] < logit; --at) logits[at] = logits[at - 1], tokens[at] = tokens[at - 1];
      logits[at] = logit, tokens[at] = scratch_.ids[i];
    }
    return kept;
  }

 private:
  int last(int run) const { return std::min((run + 1) * RUN, vocab_); }

  // All tokens with logits of at least `least`.
  void gather(double least) {
    const float border = least;
    int n = 0;
    for (int run = 0; run < runs_; ++run)
      if (scratch_.highest[run] >= border) n = gather_run(run, border, n);
    gathered_ = n;
  }

  int gather_run(int run, float border, int n) {
    int i = run * RUN;
#ifdef __AVX512F__
    for (; i + LANES <= last(run); i += LANES) {
      const __m512 v = _mm512_loadu_ps(x_ + i);
      const __mmask16 kept = _mm512_cmp_ps_mask(v, _mm512_set1_ps(border), _CMP_GE_OQ);
      if (!kept) continue;
      _mm512_storeu_ps(&scratch_.logits[n], _mm512_maskz_compress_ps(kept, v));
      _mm512_storeu_si512(&scratch_.ids[n], _mm512_maskz_compress_epi32(kept, (__m512i)(lane_numbers() + i)));
      n += __builtin_popcount(kept);
    }
#endif
    for (; i < last(run); ++i) {
      scratch_.logits[n] = x_[i], scratch_.ids[n] = i;
      n += x_[i] >= border;
    }
    return n;
  }

  void weigh_gathered(float scale) {
    weigh(scratch_.logits.data(), gathered_, highest_, scale, scratch_.weights.data());
  }

  // The `count`th highest logit; gathers at least those that are not below it.
  float kth(int count) {
    if (count <= runs_)
      gather(nth(scratch_.highest, runs_, count));
    else
      gather(-std::numeric_limits<float>::infinity());
    return nth(scratch_.logits, gathered_, count);
  }

  float nth(const std::vector<float>& values, int size, int count) {
    std::vector<float>& order = scratch_.order;
    std::copy_n(values.begin(), size, order.begin());
    std::nth_element(order.begin(), order.begin() + count - 1, order.begin() + size, std::greater<>());
    return order[count - 1];
  }

  // The highest logit such that all tokens from there up reach top_p of those above `border`.
  float top_p_border(const Draw& draw, bool some, float border) {
    const int64_t all = some ? total_from(border) : total(draw.scale);
    const double share = std::ceil(static_cast<double>(all) * draw.top_p);
    const int64_t needed = std::max<int64_t>(std::min(static_cast<int64_t>(share), all), 1);
    if (!some)
      for (double below : {6.0, 12.0, 24.0, std::numeric_limits<double>::infinity()}) {
        gather(highest_ - below / draw.scale);
        weigh_gathered(draw.scale);
        if (sum_of(scratch_.weights.data(), gathered_) >= needed) break;
      }
    return reaching(needed, border, draw.scale);
  }

  // The highest logit, not below `border`, such that all gathered from there up weigh `needed`.
  float reaching(int64_t needed, float border, float scale) {
    int64_t masses[BUCKETS] = {};
    for (int i = 0; i < gathered_; ++i)
      if (scratch_.logits[i] >= border) masses[bucket(scratch_.logits[i], scale)] += scratch_.weights[i];
    int found = 0;
    while (found < BUCKETS - 1 && masses[found] < needed) needed -= masses[found++];
    int n = 0;
    for (int i = 0; i < gathered_; ++i)
      if (scratch_.logits[i] >= border && bucket(scratch_.logits[i], scale) == found)
        scratch_.pairs[n++] = {scratch_.logits[i], scratch_.weights[i]};
    return select(scratch_.pairs.data(), scratch_.pairs.data() + n, needed);
  }

  // Eighths of a halving below the highest.
  int bucket(float logit, float scale) const {
    return static_cast<int>(std::min(BUCKETS - 1.0f, (highest_ - logit) * scale * 8));
  }

  int64_t total_from(float border) const {
    int64_t total = 0;
    for (int i = 0; i < gathered_; ++i) total += scratch_.logits[i] >= border ? scratch_.weights[i] : 0;
    return total;
  }

  // As quickselect, with weights.
  static float select(std::pair<float, int64_t>* first, std::pair<float, int64_t>* end, int64_t needed) {
    while (end - first > 1) {
      const float a = first->first, b = first[(end - first) / 2].first, c = end[-1].first;
      const float pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
      auto above = std::partition(first, end, [&](const auto& one) { return one.first > pivot; });
      auto equal = std::partition(above, end, [&](const auto& one) { return one.first == pivot; });
      int64_t higher = 0, same = 0;
      for (auto one = first; one < above; ++one) higher += one->second;
      for (auto one = above; one < equal; ++one) same += one->second;
      if (higher >= needed) {
        end = above;
      } else if (higher + same >= needed || equal == end) {
        return pivot;
      } else {
        needed -= higher + same, first = equal;
      }
    }
    return first->first;
  }

  static int64_t target(int64_t total, double uniform) {
    return std::min(static_cast<int64_t>(static_cast<double>(total) * uniform), total - 1);
  }

  int32_t draw_of_all(const Draw& draw) {
    int64_t left = target(total(draw.scale), draw.uniform);
    int run = 0;
    while (run < runs_ - 1 && left >= scratch_.sums[run]) left -= scratch_.sums[run++];
    alignas(64) int64_t weights[RUN];
    const int count = last(run) - run * RUN;
    weigh(x_ + run * RUN, count, highest_, draw.scale, weights);
    int i = 0;
    while (i < count - 1 && left >= weights[i]) left -= weights[i++];
    return run * RUN + i;
  }

  int32_t draw_of_gathered(const Draw& draw, float border) {
    const double least = draw.min_p * UNIT;
    int64_t total = 0;
    for (int i = 0; i < gathered_; ++i) {
      int64_t& weight = scratch_.weights[i];
      if (scratch_.logits[i] < border || static_cast<double>(weight) < least) weight = 0;
      total += weight;
    }
    int64_t left = target(total, draw.uniform);
    int i = 0;
    while (i < gathered_ - 1 && left >= scratch_.weights[i]) left -= scratch_.weights[i++];
    return gathered_ ? scratch_.ids[i] : 0;
  }

  const float* x_;
  int vocab_, runs_;
  DrawScratch& scratch_;
  float highest_ = 0;
  bool finite_ = true;
  int gathered_ = 0;
};

// Answers one row.
inline void draw_row(const float* logits, int vocab, DrawScratch& scratch, Draw& draw) {
  LogitRow raw(logits, vocab, scratch);
  draw.token = -1;
  if (!raw.finite()) return;
  draw.highest = raw.highest();
  if (draw.likeliest >= 0) {
    draw.total = raw.total(LOG2_E);
    draw.listed = raw.list(std::min(draw.likeliest, MOST_LIKELIEST), draw.tokens, draw.logits);
  }
  if (draw.seen_count + draw.banned_count == 0) {
    draw.token = raw.draw(draw);
  } else {
    std::copy_n(logits, vocab, scratch.adjusted.begin());
    adjust(draw, vocab, scratch.adjusted.data());
    draw.token = LogitRow(scratch.adjusted.data(), vocab, scratch).draw(draw);
  }
  draw.logit = logits[draw.token];
}

// Answers all rows, `stride` floats apart, each by one of the team's threads.
class Drawer {
 public:
  explicit Drawer(Team& team) : team_(team), scratch_(team.count()) {}

  void draw(const float* logits, int64_t stride, int vocab, int rows, Draw* const* draws) {
    for (DrawScratch& scratch : scratch_) scratch.reserve(vocab);
    auto some = [&](DrawScratch& scratch, int begin, int end) {
      for (int row = begin; row < end; ++row) draw_row(logits + row * stride, vocab, scratch, *draws[row]);
    };
    if (rows == 1 || team_.count() == 1) return some(scratch_[0], 0, rows);
    std::atomic<int> next{0};
    team_.run([&] {
      DrawScratch& scratch = scratch_[next.fetch_add(1)];
      team_.share(rows, 1, [&](int begin, int end) { some(scratch, begin, end); });
    });
  }

 private:
  Team& team_;
  std::vector<DrawScratch> scratch_;
};

}  // namespace ds
