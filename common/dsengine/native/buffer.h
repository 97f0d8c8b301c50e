// Memory of a step that the next one uses again.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace ds {

// Memory that only grows, on a cache line; not cleared.
template <class T>
class Buffer {
 public:
  T* reserve(size_t count) {
    if (count > size_) {
      memory_.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
      if (!memory_) throw std::bad_alloc();
      size_ = count;
      std::memset(static_cast<void*>(memory_.get()), 0, count * sizeof(T));
    }
    return memory_.get();
  }
  T* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory_;
  size_t size_ = 0;
};

}  // namespace ds
