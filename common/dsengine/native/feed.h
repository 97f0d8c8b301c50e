// The feed-forward part of a layer: one network, or a mixture of experts.
#pragma once

#include "experts.h"
#include "int8.h"

namespace ds {

template <class E>
class Feed {
  using active = typename E::active;

 public:
  Feed(const Model& model, Team& team) : m_(model), team_(team), width_(padded(model.mlp)) {}

  void reserve(int rows) {
    made_.reserve(rows * width_);
    if (routing_.reserve(m_, rows)) gathered_.reserve(rows * padded(m_.hidden));
  }

  // What `inner` makes, rows of so many numbers.
  const active* made() const { return made_.get(); }
  size_t width() const { return width_; }

  // The numbers inside of a network for `rows` rows `ld` apart; a gate without panels is none.
  void inner(int rows, const active* from, size_t ld, const Linear& gate, const Linear& up) {
    auto keep = [&](int row, int column, vf y) { E::activate(made_.get() + row * width_ + column, y); };
    if (!gate.panels)
      return multiply<E>(team_, rows, from, ld, up,
                         [&](int row, int column, vf y) { keep(row, column, activation(m_.activation, y)); });
    multiply_gated<E>(team_, rows, from, ld, gate, up, [&](int row, int column, vf gate, vf up) {
      keep(row, column, activation(m_.activation, gate) * up);
    });
  }

  // Each of `rows` rows `ld` apart goes to the experts that the router likes best, and their answers, in the order of
  // their numbers, are added up in `to`: nothing depends on the rows that come with it.
  void experts(const Experts& all, int rows, const active* from, size_t ld, float* to) {
    multiply<E>(team_, rows, from, ld, all.router,
                [&](int row, int column, vf y) { store(routing_.logits(row) + column, y); });
    share_rows(team_, rows, [&](int row) {
      routing_.choose(all, row);
      std::memset(to + row * ld, 0, ld * sizeof(float));
    });
    team_.share(1, 1, [&](int, int) { routing_.sort(all, rows); });
    for (int number = 0; number < all.count; ++number) {
      const Routing::Rows own = routing_.rows(number);
      if (own.count) expert(all.each[number], gather(own, rows, from, ld), ld, own, to);
    }
    if (!all.shared_gate.panels) return;
    multiply<E>(team_, rows, from, ld, all.shared_gate, [&](int row, int column, vf y) {
      if (!column) routing_.share(row, y[0]);
    });
    expert(all.shared, from, ld, routing_.shared(rows), to);
  }

 private:
  void expert(const Expert& one, const active* from, size_t ld, const Routing::Rows& own, float* to) {
    inner(own.count, from, ld, one.gate, one.up);
    multiply<E>(team_, own.count, made_.get(), width_, one.down, [&](int i, int column, vf y) {
      float* at = to + own.row[i] * ld + column;
      store(at, load(at) + y * own.weight[i]);
    });
  }

  // The rows of an expert one behind the other.
  const active* gather(const Routing::Rows& own, int rows, const active* from, size_t ld) {
    if (own.count == rows) return from;
    share_rows(team_, own.count, [&](int i) {
      std::memcpy(gathered_.get() + i * ld, from + own.row[i] * ld, ld * sizeof(active));
    });
    return gathered_.get();
  }

  const Model m_;
  Team& team_;
  const size_t width_;
  Buffer<active> made_, gathered_;
  Routing routing_;
};

}  // namespace ds
