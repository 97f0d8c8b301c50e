// Products over weights in int8: a byte each, and a scale for each group of them in an output column.
//
// A weight's integer is made a number of the element kind again as it is read, which is exact; the sum is kept in units
// of the scale of the group that is being added. So rows have the same bits however many come together, as in
// product.h. The scales of a group, bfloat16, lie before its weights in the panel, which is read from front to back.
#pragma once

#include "product.h"

namespace ds {

typedef int8_t vbytes_any __attribute__((vector_size(16), aligned(1), may_alias));
typedef int8_t vpairs_any __attribute__((vector_size(32), aligned(1), may_alias));
typedef int16_t vpairs __attribute__((vector_size(64)));

// Groups of weights with one scale: GROUP neighbours in the inner dimension, but for the first and the last, which are
// what is left of theirs where ranks share the matrix or it ends.
struct Grouped {
  static constexpr int GROUP = 32;
  static constexpr int SCALES = PANEL * 2;  // bytes
  static vf load_scales(const uint8_t* p, int vector) {
    return from_bf16(*reinterpret_cast<const vh_any*>(p + vector * LANES * 2));
  }
  static size_t panel_elements(int in, int first) {
    const int groups = in <= first ? 1 : 1 + (in - first + GROUP - 1) / GROUP;
    return static_cast<size_t>(in) * PANEL + groups * SCALES;
  }
};

// For kinds that multiply in single precision.
template <class E>
struct Int8 : Grouped {
  using weight = uint8_t;
  using active = typename E::active;
  static constexpr int STEP = 1;
  static size_t place(int column, int) { return column; }
  static weight encoded(int8_t q) { return static_cast<weight>(q); }
  static vf load_weights(const weight* p) {
    return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const vbytes_any*>(p), vi), vf);
  }
  static vf spread(const active* p) { return F32::spread(p); }
  static vf mac(vf acc, vf w, vf x) { return F32::mac(acc, w, x); }
};

// Bfloat16 has room for eight bits: every integer of int8 is one.
template <>
struct Int8<Bf16> : Grouped {
  using weight = uint8_t;
  using active = Bf16::active;
  static constexpr int STEP = Bf16::STEP;
  static vi spread(const active* p) { return Bf16::spread(p); }
  static vf mac(vf acc, vi w, vi x) { return Bf16::mac(acc, w, x); }
#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
  // Sign and magnitude, so that the two bytes of a bfloat16 can be looked up, sixty-four at once. Columns lie as
  // unpacking wants them.
  static size_t place(int column, int step) {
    return column % LANES / 4 * 16 + column / LANES * 8 + column % 4 * 2 + step;
  }
  static weight encoded(int8_t q) { return static_cast<weight>(q < 0 ? 0x80 | -q : q); }
  struct Bytes {
    alignas(64) uint8_t low[128], high[128];
    constexpr Bytes() : low(), high() {
      for (int q = 1; q < 128; ++q) {
        int exponent = 0;
        while (q >> (exponent + 1)) ++exponent;
        int bits = (127 + exponent) << 7 | ((q << (7 - exponent)) & 0x7f);
        low[q] = static_cast<uint8_t>(bits), high[q] = static_cast<uint8_t>(bits >> 8);
      }
    }
  };
  static void load_panel(const weight* p, vi* w) {
    static constexpr Bytes bytes;
    __m512i q = _mm512_loadu_si512(p), sign = _mm512_set1_epi8(static_cast<char>(0x80));
    __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(bytes.low), q, _mm512_load_si512(bytes.low + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(bytes.high), q, _mm512_load_si512(bytes.high + 64));
    high = _mm512_ternarylogic_epi64(high, q, sign, 0xf8);  // high | (q & sign)
    w[0] = (vi)_mm512_unpacklo_epi8(low, high), w[1] = (vi)_mm512_unpackhi_epi8(low, high);
  }
  static vi load_weights(const weight* p);  // for its type alone
#else
  static size_t place(int column, int step) { return column * STEP + step; }
  static weight encoded(int8_t q) { return static_cast<weight>(q); }
  static vi load_weights(const weight* p) {
    vi pairs = (vi)__builtin_convertvector(*reinterpret_cast<const vpairs_any*>(p), vpairs);
    vi first = (vi)__builtin_convertvector((pairs << 16) >> 16, vf);
    vi second = (vi)__builtin_convertvector(pairs >> 16, vf);
    return ((first >> 16) & 0xffff) | (second & static_cast<int32_t>(0xffff0000));
  }
#endif
};

// y = x W^T + b, whatever the weights are.
template <class E, class Out>
void multiply(Team& team, int rows, const typename E::active* a, size_t lda, const Linear& linear, Out out) {
  if (!linear.first_group) return product<E>(team, rows, a, lda, linear, out);
  product<Int8<E>>(team, rows, a, lda, linear, out);
}

template <class E, class Out>
void multiply_gated(Team& team, int rows, const typename E::active* a, size_t lda, const Linear& gate,
                    const Linear& up, Out out) {
  if (!gate.first_group) return gated_product<E>(team, rows, a, lda, gate, up, out);
  gated_product<Int8<E>>(team, rows, a, lda, gate, up, out);
}

// Row-major integers [out][in] and scales [out][groups] -> panels. Scales are numbers of bfloat16.
template <class E>
void pack_int8(const int8_t* from, const float* scales, int out, int in, int first, uint8_t* to) {
  using K = Int8<E>;
  const int groups = (K::panel_elements(in, first) - static_cast<size_t>(in) * PANEL) / K::SCALES;
  for (int row = 0; row < static_cast<int>(padded(out)); ++row) {
    const int column = row % PANEL;
    uint8_t* at = to + row / PANEL * K::panel_elements(in, first);
    for (int group = 0, begin = 0, end = first; group < groups; ++group, begin = end, end += K::GROUP) {
      const int count = (end < in ? end : in) - begin;
      uint32_t scale = 0x3f800000;  // 1, where there is no column
      if (row < out) std::memcpy(&scale, scales + static_cast<size_t>(row) * groups + group, 4);
      const uint16_t upper = static_cast<uint16_t>(scale >> 16);
      std::memcpy(at + column * 2, &upper, 2);
      at += K::SCALES;
      for (int k = 0; k < count; ++k)
        at[k / K::STEP * PANEL * K::STEP + K::place(column, k % K::STEP)] =
            row < out ? K::encoded(from[static_cast<size_t>(row) * in + begin + k]) : 0;
      at += static_cast<size_t>(count) * PANEL;
    }
  }
}

}  // namespace ds
