// The record: a truncated teacher of one token as bytes.
//
// A token with `count` > 0 entries of a vocabulary of V has a record of record_bytes(format, count)
// bytes; a token without entries has none. All integers are little endian, all bit fields start at
// the least significant bit of their byte and follow each other without gaps:
//
//   uint16               the head mass h = sum p as logit(h) = (code - 32767) / 1024, kept within +-32; 65535: h = 1
//   uint16               4, 6, 8 bits only: the range R of the distances in 1/128 nat (bits 4-15), the shape (bits 0-3)
//   count * bits         codes of the distances d of log p from the row's largest
//   count * l            the low bits of the ids, l = floor(log2(V / count))
//   count + (V - 1 >> l) the high bits of the ids in unary (Elias-Fano): bit (id >> l) + i is set for entry i
//
// followed by zeros up to a whole byte. Entries come in ascending order of their ids.
//
// With u the code and N = 2^bits - 1, d = R/128 * u (16 N + a (u - N)) / (16 N^2), where a = shape - 3:
// a parabola from 0 to R with its finest steps at the top for a > 0. Of bfloat16 records d is a
// bfloat16. The largest entry has the code 0. Decoding divides by the sum: p = h exp(-d) / sum exp(-d).
//
// Codes of values are computed in integers and by single operations of float, so that they are the
// same on every machine, whether or not its compiler contracts a * b + c; the code of the head mass
// rounds a number in double, whose last bits differ between machines, to 1/1024.
#pragma once

#include <cmath>

#include "math/elementary.h"

namespace kd::KD_ISA::math {

struct RecordFormat {
  int64_t vocab;  // 1 to 2^24
  int bits;       // per value: 4, 6, 8, or 16 for bfloat16
};

constexpr int record_shapes = 16;
constexpr int record_flattest = -3;        // the shape's a of code 0
constexpr int record_ranges = 4095;        // the largest code of a range
constexpr float record_range_unit = 128;   // codes of a range per nat
constexpr int record_head_unit = 1024;     // codes of the head mass per unit of its logit
constexpr int record_head_middle = 32767;  // the code of h = 1/2
constexpr int record_no_tail = 65535;

KD_INLINE int64_t record_header(RecordFormat format) { return format.bits == 16 ? 2 : 4; }

// Bits of an id that are stored as they are.
KD_INLINE int record_low_bits(RecordFormat format, int64_t count) {
  int bits = 0;
  while (format.vocab >> (bits + 1) >= count) ++bits;
  return bits;
}

// Of a token with `count` entries, 0 <= count <= vocab.
KD_INLINE int64_t record_bytes(RecordFormat format, int64_t count) {
  if (count <= 0) return 0;
  const int low = record_low_bits(format, count);
  const int64_t bits = count * (format.bits + low + 1) + ((format.vocab - 1) >> low);
  return record_header(format) + (bits + 7) / 8;
}

KD_INLINE int trailing_zeros(uint64_t word) {
#if defined(__CUDA_ARCH__)
  return __ffsll(static_cast<long long>(word)) - 1;
#else
  return __builtin_ctzll(word);
#endif
}

#if defined(__BYTE_ORDER__)
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "records are read and written in whole words");
#endif

// 64 bits from the byte at `offset` on; zeros stand for what lies beyond the `size` bytes there are.
KD_INLINE uint64_t load_word(const uint8_t* bytes, int64_t size, int64_t offset) {
  uint64_t word = 0;
  if (offset + 8 <= size) {
    std::memcpy(&word, bytes + offset, 8);
  } else {
    for (int i = 0; offset + i < size; ++i) word |= static_cast<uint64_t>(bytes[offset + i]) << (8 * i);
  }
  return word;
}

// 56 bits, which lie in one word whatever bit they start at.
constexpr int window_bits = 56;

KD_INLINE uint64_t load_window(const uint8_t* bytes, int64_t size, int64_t bit) {
  return (load_word(bytes, size, bit >> 3) >> (bit & 7)) & ((uint64_t(1) << window_bits) - 1);
}

// Reads fields of one width that lie one behind the other.
struct FieldReader {
  const uint8_t* bytes;
  int64_t size;
  int64_t bit;
  int width;
  int per_window = width ? window_bits / width : window_bits;
  int left = 0;  // fields in the window
  uint64_t window = 0;

  KD_INLINE uint32_t next() {
    if (left == 0) {
      window = load_window(bytes, size, bit);
      left = per_window;
      bit += per_window * width;
    }
    const uint64_t field = window & ((uint64_t(1) << width) - 1);
    window >>= width;
    --left;
    return static_cast<uint32_t>(field);
  }
};

// Writes fields one behind the other.
struct BitWriter {
  uint8_t* next;
  uint64_t pending = 0;
  int pending_bits = 0;

  // At most 32 bits, and no others set in `value`.
  KD_INLINE void put(uint64_t value, int width) {
    pending |= value << pending_bits;
    pending_bits += width;
    if (pending_bits >= 32) {
      std::memcpy(next, &pending, 4);
      next += 4;
      pending >>= 32;
      pending_bits -= 32;
    }
  }

  KD_INLINE void put_zeros(int64_t width) {
    for (; width > 32; width -= 32) put(0, 32);
    put(0, static_cast<int>(width));
  }

  KD_INLINE void finish() {
    for (; pending_bits > 0; pending_bits -= 8, pending >>= 8) *next++ = static_cast<uint8_t>(pending);
  }
};

// How codes of 4, 6 or 8 bits and distances belong together in a row. Distances are counted in
// "units", R / (16 N^2), of which the distance of a code is a whole number below 2^24.
struct Quantiser {
  int32_t top;        // N
  int32_t curvature;  // a
  int32_t slope;      // (16 - a) N

  KD_INLINE Quantiser(int bits, int shape)
      : top((1 << bits) - 1), curvature(shape + record_flattest), slope((16 - curvature) * top) {}

  // Exact, for codes as integers or as floats.
  template <class Number>
  KD_INLINE Number units(Number code) const {
    return code * (static_cast<Number>(slope) + static_cast<Number>(curvature) * code);
  }

  // The code nearest to so many units, but for the rounding of the square root.
  KD_INLINE int32_t nearest(int32_t units) const {
    const float root = std::sqrt(static_cast<float>(slope * slope + 4 * curvature * units));
    return static_cast<int32_t>(static_cast<float>(2 * units) / (static_cast<float>(slope) + root) + 0.5f);
  }

  static KD_INLINE int32_t whole_range(int bits) { return 16 * ((1 << bits) - 1) * ((1 << bits) - 1); }
};

// A distance in nats as units, to nearest.
KD_INLINE int32_t distance_units(float distance, float half_units_per_nat, int32_t whole_range) {
  const int32_t half_units = static_cast<int32_t>(distance * half_units_per_nat);
  const int32_t units = (half_units + 1) >> 1;
  return units < whole_range ? units : whole_range;
}

// exp(-distance) within 6%, which is enough to weigh errors with: a straight line between powers of two.
KD_INLINE float distance_weight(float distance) {
  return bit_cast<float>(0x3F800000 - static_cast<int32_t>(distance * 12102203.0f));  // 2^23 log2(e)
}

// What the weights of errors are multiplied by: an error is below 14 N units, so that a weighted square stays below 2^25.
KD_INLINE float error_weight_unit(int bits) { return bits == 8 ? 2 : bits == 6 ? 32 : 512; }

// The weighted square of the error that the nearest code makes.
KD_INLINE int32_t weighted_error(const Quantiser& quantiser, int32_t units, float weight) {
  const float code = static_cast<float>(quantiser.nearest(units));
  const float error = static_cast<float>(units) - quantiser.units(code);
  return static_cast<int32_t>(error * error * weight);
}

// The shape with the smallest weighted squared error; of equals the first.
KD_INLINE int best_shape(const float* log_probs, int64_t count, float largest, int bits, float reach,
                         float half_units_per_nat) {
  constexpr int block = 64;
  const int32_t whole_range = Quantiser::whole_range(bits);
  const float weight_unit = error_weight_unit(bits);
  uint64_t errors[record_shapes] = {};
  for (int64_t start = 0; start < count; start += block) {
    const int n = static_cast<int>(count - start < block ? count - start : block);
    int32_t units[block];
    float weights[block];
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const float distance = largest - log_probs[start + i];
      const float kept = distance < reach ? distance : reach;
      units[i] = distance_units(kept, half_units_per_nat, whole_range);
      weights[i] = distance_weight(kept) * weight_unit;
    }
    for (int shape = 0; shape < record_shapes; ++shape) {
      const Quantiser quantiser(bits, shape);
      int32_t sum = 0;  // a block's is below 2^31
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < n; ++i) sum += weighted_error(quantiser, units[i], weights[i]);
      errors[shape] += static_cast<uint64_t>(sum);
    }
  }
  int best = 0;
  for (int shape = 1; shape < record_shapes; ++shape)
    if (errors[shape] < errors[best]) best = shape;
  return best;
}

KD_INLINE uint32_t bfloat16_bits(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

KD_INLINE void put_uint16(uint8_t* bytes, int32_t value) {
  bytes[0] = static_cast<uint8_t>(value);
  bytes[1] = static_cast<uint8_t>(value >> 8);
}

// The code of the head mass from the logarithms of what is in the head and of what is not.
KD_INLINE int32_t head_code(double log_head, double log_tail) {
  if (log_tail == -INFINITY) return record_no_tail;
  const double code = std::floor((log_head - log_tail) * record_head_unit + 0.5);
  const double limit = record_head_middle;
  return record_head_middle + static_cast<int32_t>(code < -limit ? -limit : code > limit ? limit : code);
}

// The code of the range that holds this distance, if one does.
KD_INLINE int32_t range_code(float distance) {
  const float longest = distance * record_range_unit;
  int32_t range = longest < record_ranges ? static_cast<int32_t>(longest) : record_ranges;
  if (range < record_ranges && (static_cast<float>(range) < longest || range == 0)) ++range;
  return range;
}

// Writes the record of `count` >= 1 entries: ids ascending and within the vocabulary, log_probs
// finite. A log_tail_mass of -inf says that the entries have all the mass; they do if they are the
// whole vocabulary.
KD_INLINE void encode_record(const int32_t* ids_ascending, const float* log_probs, float log_tail_mass, int64_t count,
                             RecordFormat format, uint8_t* record) {
  float largest = log_probs[0], smallest = log_probs[0];
  for (int64_t i = 1; i < count; ++i) {
    largest = log_probs[i] > largest ? log_probs[i] : largest;
    smallest = log_probs[i] < smallest ? log_probs[i] : smallest;
  }
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += exp(static_cast<double>(log_probs[i]) - static_cast<double>(largest));
  const double log_tail = count == format.vocab ? -INFINITY : static_cast<double>(log_tail_mass);
  put_uint16(record, head_code(static_cast<double>(largest) + log(sum), log_tail));

  BitWriter writer{record + record_header(format)};
  if (format.bits == 16) {
    for (int64_t i = 0; i < count; ++i) writer.put(bfloat16_bits(largest - log_probs[i]), 16);
  } else {
    const int32_t range = range_code(largest - smallest);
    const int32_t whole_range = Quantiser::whole_range(format.bits);
    const float reach = static_cast<float>(range) / record_range_unit;
    const float half_units_per_nat = static_cast<float>(2 * whole_range) / reach;
    const int shape = best_shape(log_probs, count, largest, format.bits, reach, half_units_per_nat);
    const Quantiser quantiser(format.bits, shape);
    put_uint16(record + 2, range << 4 | shape);
    for (int64_t i = 0; i < count; ++i) {
      const float distance = largest - log_probs[i];
      const float kept = distance < reach ? distance : reach;
      const int32_t units = distance_units(kept, half_units_per_nat, whole_range);
      writer.put(static_cast<uint32_t>(quantiser.nearest(units)), format.bits);
    }
  }

  const int low = record_low_bits(format, count);
  for (int64_t i = 0; i < count; ++i)
    writer.put(static_cast<uint32_t>(ids_ascending[i]) & ((uint32_t(1) << low) - 1), low);
  int32_t high = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t gap = (ids_ascending[i] >> low) - high;
    high += gap;
    if (gap < 32) {
      writer.put(uint64_t(1) << gap, gap + 1);
    } else {
      writer.put_zeros(gap);
      writer.put(1, 1);
    }
  }
  writer.put_zeros(((format.vocab - 1) >> low) - high);
  writer.finish();
}

// What the code of the head mass says.
struct HeadMass {
  double log_head;
  double log_tail;

  explicit KD_INLINE HeadMass(int code) : log_head(0), log_tail(-INFINITY) {
    if (code == record_no_tail) return;
    const double logit = static_cast<double>(code - record_head_middle) / record_head_unit;
    const double rest = std::log1p(std::exp(logit < 0 ? logit : -logit));
    log_head = (logit < 0 ? logit : 0) - rest;
    log_tail = (logit < 0 ? 0 : -logit) - rest;
  }
};

// Nats per unit of the distances of a record of 4, 6 or 8 bits, whose second number is `scale`.
KD_INLINE double nats_per_unit(int scale, int bits) {
  return static_cast<double>(scale >> 4) / record_range_unit / Quantiser::whole_range(bits);
}

// Reads the record of `count` entries: ids ascending, log p over the full vocabulary, the logarithm
// of the mass of the rest. False: malformed (an id outside the vocabulary or not above the one
// before it, not `count` ids, no largest entry, a distance that is none, a tail without ids); what
// was written is then undefined. Reads record_bytes(format, count) bytes at most, whatever they
// hold, and writes `count` entries at most. Without entries there is nothing to read.
KD_INLINE bool decode_record(const uint8_t* record, RecordFormat format, int64_t count, int32_t* ids, float* log_probs,
                             float* log_tail_mass) {
  *log_tail_mass = 0;
  if (count <= 0 || count > format.vocab) return count == 0;
  const int64_t size = record_bytes(format, count);
  const int low = record_low_bits(format, count);
  const int64_t header = record_header(format);
  const int64_t codes = header * 8;
  const int64_t lows = codes + count * format.bits;
  const int64_t highs = lows + count * low;

  // To the end of the record: the bits of padding must be zero.
  int64_t found = 0;
  bool valid = true;
  for (int64_t bit = highs; bit < size * 8; bit += window_bits) {
    uint64_t window = load_window(record, size, bit);
    const int64_t position = bit - highs;
    for (; window && found < count; window &= window - 1, ++found)
      ids[found] = static_cast<int32_t>((position + trailing_zeros(window) - found) << low);
    valid &= window == 0;
  }
  if (found != count || !valid) return false;
  FieldReader low_fields{record, size, lows, low};
  int32_t before = -1;
  for (int64_t i = 0; i < count; ++i) {
    ids[i] |= static_cast<int32_t>(low_fields.next());
    valid &= ids[i] > before;
    before = ids[i];
  }
  valid &= before < format.vocab;

  double per_unit = 1;
  bool anchored = false;
  FieldReader code_fields{record, size, codes, format.bits};
  if (format.bits == 16) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t code = code_fields.next();
      valid &= code < 0x7F80;
      anchored |= code == 0;
      log_probs[i] = bit_cast<float>(code << 16);
    }
  } else {
    const int scale = record[2] | record[3] << 8;
    const Quantiser quantiser(format.bits, scale & (record_shapes - 1));
    per_unit = nats_per_unit(scale, format.bits);
    for (int64_t i = 0; i < count; ++i) {
      const int32_t code = static_cast<int32_t>(code_fields.next());
      anchored |= code == 0;
      log_probs[i] = static_cast<float>(code);
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) log_probs[i] = quantiser.units(log_probs[i]);
  }
  const int head = record[0] | record[1] << 8;
  if (!valid || !anchored || (count == format.vocab && head != record_no_tail)) return false;

  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += exp(static_cast<double>(log_probs[i]) * -per_unit);
  const HeadMass mass(head);
  *log_tail_mass = static_cast<float>(mass.log_tail);
  const double log_scale = mass.log_head - log(sum);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    log_probs[i] = static_cast<float>(log_scale - static_cast<double>(log_probs[i]) * per_unit);
  return true;
}

}  // namespace kd::KD_ISA::math
