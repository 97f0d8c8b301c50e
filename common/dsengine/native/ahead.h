// Cached keys and values, asked for by products before attention needs them.
//
// Products of many rows leave memory idle, and attention waits for it: so they ask for the KV of the layer that comes
// next, where the caches have room for all of it or nearly. Nobody's result depends on it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace ds {

// A run of memory to ask for, bit by bit; nothing where `at` is null.
struct Ask {
  const char* at = nullptr;
  size_t step = 0;
  void go_on() {
    __builtin_prefetch(at, 0, 2);
    at += step;
  }
};

class Ahead {
 public:
  // Of each layer, `runs` of so many bytes each; a layer's lie behind those of the layer before.
  void plan(std::vector<const char*>&& runs, size_t nbytes, int layers) {
    if (layers > static_cast<int>(taken_.size())) taken_ = std::vector<std::atomic<int>>(layers);
    for (std::atomic<int>& taken : taken_) taken = 0;
    runs_ = std::move(runs), nbytes_ = nbytes, layers_ = layers;
    pieces_ = static_cast<int>((nbytes + PIECE - 1) / PIECE);
    const size_t total = runs_.size() * nbytes;
    total_ = total > ROOM ? 0 : static_cast<int>(runs_.size()) * pieces_;
  }

  // Every thread may say it. Nothing is asked for where there is no such layer.
  void turn_to(int layer) { layer_.store(layer, std::memory_order_relaxed); }

  // What a product of so many steps should ask for.
  Ask next(int steps) {
    const int layer = layer_.load(std::memory_order_relaxed);
    if (!total_ || layer >= layers_ || taken_[layer].load(std::memory_order_relaxed) >= total_) return {};
    const int piece = taken_[layer].fetch_add(1, std::memory_order_relaxed);
    if (piece >= total_) return {};
    const size_t first = piece % pieces_ * PIECE, left = nbytes_ - first, size = left < PIECE ? left : PIECE;
    const size_t step = (size + steps - 1) / steps;
    return {runs_[piece / pieces_] + layer * nbytes_ + first, step < LINE ? step : LINE};
  }

 private:
  static constexpr size_t LINE = 64;
  static constexpr size_t PIECE = 12 << 10;
  //: bytes of a layer; weights and activations pass through the same caches
  static constexpr size_t ROOM = 16 << 20;

  std::vector<const char*> runs_;
  size_t nbytes_ = 0;
  int pieces_ = 0, total_ = 0, layers_ = 0;
  std::atomic<int> layer_{0};
  std::vector<std::atomic<int>> taken_;  // pieces of each layer
};

}  // namespace ds
