// The order in which the values of a tile are added up.
//
// Memory gives the most where several places are read side by side, each from its beginning to its end. Blocks of the
// cache lie anywhere, but 16 positions lie together at least: so the values of a tile are taken four of each run of 16
// in turns. Runs that are not there are passed over, so that a row has the same bits whether they come or not.
#pragma once

#include "vector.h"

namespace ds {

constexpr int TILE = 128;  // keys
constexpr int PART = 4;

struct Turns {
  int runs;
  int run = 0, within = 0;
  explicit Turns(int count) : runs(count / LANES) {}
  int key() const { return run * LANES + within; }
  void go_on() {
    if (++run == runs) run = 0, within += PART;
  }
};

// What is known of each of `count` keys, in that order.
template <class T>
inline void take_turns(const T* from, int count, T* to) {
  Turns turns(count);
  for (int slot = 0; slot < count; slot += PART, turns.go_on())
    std::memcpy(to + slot, from + turns.key(), PART * sizeof(T));
}

// The same for a whole tile's 16-bit numbers, of which a part fills a word: 32 to a vector.
inline void turn_tile(vq* numbers) {
  static_assert(TILE == 8 * LANES && PART == 4);
  vq half[4];
  for (int i = 0; i < 2; ++i) {
    half[i] = __builtin_shufflevector(numbers[2 * i], numbers[2 * i + 1], 0, 4, 8, 12, 1, 5, 9, 13);
    half[i + 2] = __builtin_shufflevector(numbers[2 * i], numbers[2 * i + 1], 2, 6, 10, 14, 3, 7, 11, 15);
  }
  for (int i = 0; i < 4; i += 2) {
    numbers[i] = __builtin_shufflevector(half[i], half[i + 1], 0, 1, 2, 3, 8, 9, 10, 11);
    numbers[i + 1] = __builtin_shufflevector(half[i], half[i + 1], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

}  // namespace ds
