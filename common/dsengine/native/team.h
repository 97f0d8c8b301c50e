// The threads of one engine. A whole step is one call: inside it, threads meet at barriers and share out the tasks
// of a phase by a counter, so that a thread that the machine holds up leaves its tasks to the others.
//
// Which thread does a task never changes a bit of its result: every output is made by one task.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include <sched.h>

#include "ahead.h"

namespace ds {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Team {
 public:
  explicit Team(int threads) : count_(threads) {
    for (int id = 1; id < threads; ++id) helpers_.emplace_back([this] { serve(); });
  }

  ~Team() {
    stopping_ = true;
    wake();
    for (std::thread& helper : helpers_) helper.join();
  }

  // What products ask for besides.
  Ahead ahead;

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int count() const { return count_; }

  // Run `job` on every thread; back when all are done.
  void run(const std::function<void()>& job) {
    job_ = &job;
    phase_ = 0;
    next_[0] = 0;
    wake();
    job();
    barrier();
  }

  // Every thread calls it with the same arguments: `task(begin, end)` over pieces of [0, total), then a barrier.
  template <class Task>
  void share(int total, int piece, Task&& task) {
    // Two counters take turns: the one behind is reset while nobody looks at it.
    int phase = phase_.load(std::memory_order_relaxed);
    std::atomic<int>& next = next_[phase & 1];
    for (int begin; (begin = next.fetch_add(piece, std::memory_order_relaxed)) < total;)
      task(begin, begin + piece < total ? begin + piece : total);
    barrier();
  }

 private:
  static constexpr int SPINS = 1500;
  static constexpr int IDLE_SPINS = 20000;

  void barrier() {
    uint32_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
      arrived_.store(0, std::memory_order_relaxed);
      int phase = phase_.load(std::memory_order_relaxed) + 1;
      phase_.store(phase, std::memory_order_relaxed);
      next_[phase & 1].store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spin = 0; round_.load(std::memory_order_acquire) == round; ++spin)
      spin < SPINS ? relax() : static_cast<void>(sched_yield());
  }

  void wake() {
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  }

  void serve() {
    for (uint32_t seen = 0;;) {
      for (int spin = 0; generation_.load(std::memory_order_acquire) == seen && spin < IDLE_SPINS; ++spin) relax();
      generation_.wait(seen, std::memory_order_acquire);
      ++seen;
      if (stopping_) return;
      (*job_)();
      barrier();
    }
  }

  int count_;
  std::vector<std::thread> helpers_;
  const std::function<void()>* job_ = nullptr;
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
  alignas(64) std::atomic<int> next_[2] = {};
};

// body(row) for each of `count` rows, some at a time.
template <class Body>
void share_rows(Team& team, int count, Body body) {
  const int piece = count / (team.count() * 4);
  team.share(count, piece < 1 ? 1 : piece > 32 ? 32 : piece, [&](int begin, int end) {
    for (int row = begin; row < end; ++row) body(row);
  });
}

}  // namespace ds
