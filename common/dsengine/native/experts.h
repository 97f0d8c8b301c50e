// Which rows of a step go to which expert of a layer, and with what weight (arXiv 2401.04088).
#pragma once

#include <algorithm>

#include "buffer.h"
#include "rows.h"

namespace ds {

class Routing {
 public:
  // The rows of one expert in order, and what its answers to them weigh.
  struct Rows {
    const int32_t* row;
    const float* weight;
    int count;
  };

  // Whether the model has experts at all; makes room for `rows` rows.
  bool reserve(const Model& model, int rows) {
    int most = 0, per_token = 0;
    for (int layer = 0; layer < model.layers; ++layer)
      if (const Experts* experts = model.layer[layer].experts) {
        most = std::max(most, experts->count), per_token = std::max(per_token, experts->per_token);
        width_ = padded(most);
      }
    if (!most) return false;
    const size_t all = static_cast<size_t>(rows) * per_token;
    logits_.reserve(rows * width_), chosen_.reserve(all), chosen_weight_.reserve(all);
    row_.reserve(all), weight_.reserve(all), ends_.reserve(most + 1);
    every_.reserve(rows), shared_weight_.reserve(rows);
    for (int row = 0; row < rows; ++row) every_.get()[row] = row;
    return true;
  }

  float* logits(int row) { return logits_.get() + row * width_; }

  // The experts of a row: those likeliest by its logits, of equals the first.
  void choose(const Experts& experts, int row) {
    float* p = logits(row);
    const float top = *std::max_element(p, p + experts.count);
    vf added{};
    in_lanes(experts.count, [&](int i, int n) {
      const vf weight = exp(load_some(p + i, n) - top);
      store_some(p + i, weight, n);
      added += n == LANES ? weight : lane_numbers() < n ? weight : vf{};
    });
    int32_t* chosen = chosen_.get() + row * experts.per_token;
    float* weights = chosen_weight_.get() + row * experts.per_token;
    float of_chosen = 0;
    for (int i = 0; i < experts.per_token; ++i) {
      chosen[i] = static_cast<int32_t>(std::max_element(p, p + experts.count) - p);
      weights[i] = p[chosen[i]], of_chosen += weights[i];
      p[chosen[i]] = -1;
    }
    const float total = experts.renormalise ? of_chosen : sum(added);
    for (int i = 0; i < experts.per_token; ++i) weights[i] /= total;
  }

  // Of all rows, what goes to each expert. For one thread, when all have chosen.
  void sort(const Experts& experts, int rows) {
    const int all = rows * experts.per_token;
    int32_t* ends = ends_.get();
    std::fill(ends, ends + experts.count + 1, 0);
    for (int i = 0; i < all; ++i) ++ends[chosen_.get()[i] + 1];
    for (int expert = 0; expert < experts.count; ++expert) ends[expert + 1] += ends[expert];
    // From the last to the first: an end moves down to the beginning, which is the end of the expert before.
    for (int i = all - 1; i >= 0; --i) {
      const int at = --ends[chosen_.get()[i] + 1];
      row_.get()[at] = i / experts.per_token, weight_.get()[at] = chosen_weight_.get()[i];
    }
    std::rotate(ends, ends + 1, ends + experts.count + 1);
    ends[experts.count] = all;
  }

  Rows rows(int expert) const {
    const int first = ends_.get()[expert];
    return {row_.get() + first, weight_.get() + first, ends_.get()[expert + 1] - first};
  }

  // The expert that all rows go to has a gate for each.
  void share(int row, float gate) { shared_weight_.get()[row] = 1.0f / (1.0f + std::exp(-gate)); }
  Rows shared(int rows) const { return {every_.get(), shared_weight_.get(), rows}; }

 private:
  size_t width_ = 0;
  Buffer<float> logits_, chosen_weight_, weight_, shared_weight_;
  Buffer<int32_t> chosen_, row_, ends_, every_;
};

}  // namespace ds
