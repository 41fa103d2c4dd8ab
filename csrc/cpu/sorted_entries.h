// Logits with their ids in falling order.
#pragma once

#include <algorithm>

#include "cpu/row_blocks.h"

namespace kd::KD_ISA {

// A logit and its id, sorted by falling logit, then by rising id.
template <class Real>
struct Entry;

template <>
struct Entry<float> {
  uint64_t bits = 0;

  static Entry of(float logit, int64_t id) {
    const uint32_t ordered = math::bit_cast<uint32_t>(logit + 0.0f);  // which makes -0 0
    const uint32_t falling = ordered & 0x80000000u ? ordered : ~ordered & 0x7FFFFFFFu;
    return {static_cast<uint64_t>(falling) << 32 | static_cast<uint64_t>(id)};
  }
  int64_t id() const { return static_cast<int64_t>(bits & 0xFFFFFFFFu); }
  float logit() const {
    const uint32_t falling = static_cast<uint32_t>(bits >> 32);
    return math::bit_cast<float>(falling & 0x80000000u ? falling : ~falling & 0x7FFFFFFFu);
  }
  bool operator<(Entry other) const { return bits < other.bits; }
};

template <>
struct Entry<double> {
  double value = 0;
  int64_t place = 0;

  static Entry of(double logit, int64_t id) { return {logit, id}; }
  int64_t id() const { return place; }
  double logit() const { return value; }
  bool operator<(Entry other) const { return value > other.value || (value == other.value && place < other.place); }
};

// Sorts a few entries: where each belongs is how many come before it.
inline void sort_few(Entry<float>* entries, int64_t n) {
  typedef uint64_t Lanes __attribute__((vector_size(64)));
  constexpr int64_t width = 8, most = 64;
  alignas(64) uint64_t bits[most], places[most];
  for (int64_t i = 0; i < n; ++i) bits[i] = entries[i].bits;
  std::fill(bits + n, bits + (n + width - 1) / width * width, 0);
  for (int64_t start = 0; start < n; start += width) {
    Lanes lanes, before = {};
    std::memcpy(&lanes, bits + start, sizeof lanes);
    for (int64_t i = 0; i < n; ++i) before -= reinterpret_cast<Lanes>(bits[i] < lanes);
    std::memcpy(places + start, &before, sizeof before);
  }
  for (int64_t i = 0; i < n; ++i) entries[places[i]].bits = bits[i];
}

// Sorts many entries, given in the order of their ids: by digits of the logit, the lowest first, each time keeping the order
// of equal ones. `spare` has room for as many.
inline void sort_many(Entry<float>* entries, Entry<float>* spare, int64_t n) {
  constexpr int digits = 3, digit_bits = 11, values = 1 << digit_bits;
  const auto digit_of = [](Entry<float> entry, int digit) {
    return static_cast<size_t>(entry.bits >> (32 + digit * digit_bits)) & (values - 1);
  };
  uint32_t counts[digits][values] = {};
  for (int64_t i = 0; i < n; ++i)
    for (int digit = 0; digit < digits; ++digit) ++counts[digit][digit_of(entries[i], digit)];
  Entry<float>*from = entries, *to = spare;
  for (int digit = 0; digit < digits; ++digit) {
    uint32_t* places = counts[digit];
    if (places[digit_of(from[0], digit)] == static_cast<uint32_t>(n)) continue;
    uint32_t before = 0;
    for (int value = 0; value < values; ++value) {
      const uint32_t count = places[value];
      places[value] = before;
      before += count;
    }
    for (int64_t i = 0; i < n; ++i) to[places[digit_of(from[i], digit)]++] = from[i];
    std::swap(from, to);
  }
  if (from != entries) std::copy(from, from + n, entries);
}

// Entries in the order of their ids become sorted. `spare` has room for as many.
inline void sort_entries(Entry<float>* entries, Entry<float>* spare, int64_t n) {
  if (n <= 1) return;
  if (n <= 64) {
    sort_few(entries, n);
  } else if (n < 2048) {
    std::sort(entries, entries + n);
  } else {
    sort_many(entries, spare, n);
  }
}

inline void sort_entries(Entry<double>* entries, Entry<double>*, int64_t n) { std::sort(entries, entries + n); }

}  // namespace kd::KD_ISA
