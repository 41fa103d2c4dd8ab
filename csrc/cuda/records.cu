// The `records` family on NVIDIA GPUs: a warp per record, see csrc/math/records.h. The bytes are those of the CPU: codes are
// computed by the same functions, and what is added up over entries in several lanes is integers, or rounded to the head's
// code.
#include "math/records.h"

#include <cmath>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/reductions.cuh"

namespace kd::cuda {
namespace {

namespace math = KD_ISA::math;

constexpr float mass_slack = 0.05f;  // by how much log-probabilities of low precision may be too large
constexpr int warps_per_block = 4;

__device__ __forceinline__ int lane_number() { return static_cast<int>(threadIdx.x) % warp_lanes; }

// The row of this warp, which may lie past the last one.
__device__ __forceinline__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * warps_per_block + static_cast<int>(threadIdx.x) / warp_lanes;
}

// Fields of a record that many lanes write at once into what was zeros; neighbours share words.
struct SharedWriter {
  uint32_t* words;
  int64_t record;  // its first bit, from the first of the words on

  // At most 32 bits, and no others set in `value`.
  __device__ __forceinline__ void put(int64_t bit, uint32_t value) const {
    const int64_t place = record + bit;
    const uint64_t shifted = static_cast<uint64_t>(value) << (place & 31);
    const uint32_t low = static_cast<uint32_t>(shifted), high = static_cast<uint32_t>(shifted >> 32);
    if (low) atomicOr(words + (place >> 5), low);
    if (high) atomicOr(words + (place >> 5) + 1, high);
  }
};

struct ShapeError {
  uint64_t error;
  int shape;
};

// The better of two shapes; of equals the first.
struct Better {
  __device__ __forceinline__ ShapeError operator()(ShapeError a, ShapeError b) const {
    return a.error < b.error || (a.error == b.error && a.shape < b.shape) ? a : b;
  }
  __device__ __forceinline__ ShapeError shuffled(ShapeError value, int distance) const {
    return {__shfl_xor_sync(full_warp, value.error, distance), __shfl_xor_sync(full_warp, value.shape, distance)};
  }
};

// math::best_shape with two lanes for each shape, which share its entries.
__device__ __forceinline__ int best_shape(const float* log_probs, int64_t count, float largest, int bits, float reach,
                                          float half_units_per_nat) {
  static_assert(2 * math::record_shapes == warp_lanes);
  const int shape = lane_number() % math::record_shapes;
  const math::Quantiser quantiser(bits, shape);
  const int32_t whole_range = math::Quantiser::whole_range(bits);
  const float weight_unit = math::error_weight_unit(bits);
  uint64_t error = 0;
  for (int64_t i = lane_number() / math::record_shapes; i < count; i += 2) {
    const float distance = largest - log_probs[i];
    const float kept = distance < reach ? distance : reach;
    const int32_t units = math::distance_units(kept, half_units_per_nat, whole_range);
    error += static_cast<uint64_t>(math::weighted_error(quantiser, units, math::distance_weight(kept) * weight_unit));
  }
  error += __shfl_xor_sync(full_warp, error, math::record_shapes);
  return over_warp(ShapeError{error, shape}, Better{}).shape;
}

// math::encode_record by a warp.
__device__ __forceinline__ void encode(const int64_t* ids, const float* log_probs, float log_tail_mass, int64_t count,
                                       math::RecordFormat format, const SharedWriter& writer) {
  const int lane = lane_number();
  float largest = -INFINITY, falling = -INFINITY;
  for (int64_t i = lane; i < count; i += warp_lanes) {
    largest = merged_max(largest, log_probs[i]);
    falling = merged_max(falling, -log_probs[i]);
  }
  largest = over_warp(largest, Largest<float>{});
  const float smallest = -over_warp(falling, Largest<float>{});
  double sum = 0;
  for (int64_t i = lane; i < count; i += warp_lanes)
    sum += math::exp(static_cast<double>(log_probs[i]) - static_cast<double>(largest));
  sum = over_warp(sum, Add<double>{});
  if (lane == 0) {
    const double log_tail = count == format.vocab ? -static_cast<double>(INFINITY) : static_cast<double>(log_tail_mass);
    writer.put(0, static_cast<uint32_t>(math::head_code(static_cast<double>(largest) + math::log(sum), log_tail)));
  }

  const int64_t codes = math::record_header(format) * 8;
  if (format.bits == 16) {
    for (int64_t i = lane; i < count; i += warp_lanes)
      writer.put(codes + i * 16, math::bfloat16_bits(largest - log_probs[i]));
  } else {
    const int32_t range = math::range_code(largest - smallest);
    const int32_t whole_range = math::Quantiser::whole_range(format.bits);
    const float reach = static_cast<float>(range) / math::record_range_unit;
    const float half_units_per_nat = static_cast<float>(2 * whole_range) / reach;
    const int shape = best_shape(log_probs, count, largest, format.bits, reach, half_units_per_nat);
    const math::Quantiser quantiser(format.bits, shape);
    if (lane == 0) writer.put(16, static_cast<uint32_t>(range << 4 | shape));
    for (int64_t i = lane; i < count; i += warp_lanes) {
      const float distance = largest - log_probs[i];
      const int32_t units = math::distance_units(distance < reach ? distance : reach, half_units_per_nat, whole_range);
      writer.put(codes + i * format.bits, static_cast<uint32_t>(quantiser.nearest(units)));
    }
  }

  const int low = math::record_low_bits(format, count);
  const int64_t lows = codes + count * format.bits, highs = lows + count * low;
  for (int64_t i = lane; i < count; i += warp_lanes) {
    writer.put(lows + i * low, static_cast<uint32_t>(ids[i]) & ((uint32_t(1) << low) - 1));
    writer.put(highs + (ids[i] >> low) + i, 1);
  }
}

__global__ void pack_kernel(RecordProblem problem) {
  const int64_t row = row_of_warp(), count = row < problem.rows ? problem.counts[row] : 0;
  if (row >= problem.rows) return;
  const int64_t* const ids = problem.ids + row * problem.width;
  const float* const log_probs = problem.log_probs + row * problem.width;
  bool valid = true;
  for (int64_t i = lane_number(); i < count; i += warp_lanes)
    valid &= ids[i] >= 0 && ids[i] < problem.vocab && (i == 0 || ids[i] > ids[i - 1]) && log_probs[i] <= mass_slack;
  valid = __all_sync(full_warp, valid);
  if (lane_number() == 0) problem.faults[row] = !valid;
  if (!valid || count == 0) return;
  const SharedWriter writer{reinterpret_cast<uint32_t*>(problem.data), 8 * problem.offsets[row]};
  encode(ids, log_probs, problem.log_tail_mass[row], count, {problem.vocab, problem.bits}, writer);
}

// What math::decode_record reads of a record, field by field.
struct Fields {
  const uint8_t* record;
  int64_t size;

  __device__ __forceinline__ uint32_t at(int64_t bit, int width) const {
    return static_cast<uint32_t>(math::load_window(record, size, bit)) & ((uint32_t(1) << width) - 1);
  }
};

// The ids of a record of `count` > 0 entries: whether they are well formed.
__device__ __forceinline__ bool decode_ids(const Fields& fields, math::RecordFormat format, int64_t count,
                                           int64_t* ids) {
  constexpr int width = 32;  // bits of the unary part that a lane reads at once
  const int lane = lane_number(), low = math::record_low_bits(format, count);
  const int64_t lows = math::record_header(format) * 8 + count * format.bits, highs = lows + count * low;
  int64_t found = 0;
  // To the end of the record: the bits of padding must be zero.
  for (int64_t start = highs; start < fields.size * 8; start += warp_lanes * width) {
    const int64_t bit = start + lane * width;
    uint32_t window =
        bit < fields.size * 8 ? static_cast<uint32_t>(math::load_window(fields.record, fields.size, bit)) : 0;
    const int up_to_lane = sum_up_to_lane(__popc(window));
    int64_t entry = found + up_to_lane - __popc(window);
    found += __shfl_sync(full_warp, up_to_lane, warp_lanes - 1);
    for (; window && entry < count; window &= window - 1, ++entry) {
      const int64_t high = bit - highs + __ffs(static_cast<int>(window)) - 1 - entry;
      ids[entry] = high << low | fields.at(lows + entry * low, low);
    }
  }
  if (found != count) return false;
  __syncwarp();  // the ids are written
  bool valid = true;
  for (int64_t i = lane; i < count; i += warp_lanes) valid &= ids[i] < format.vocab && (i == 0 || ids[i] > ids[i - 1]);
  return __all_sync(full_warp, valid);
}

// The values of a record, and the logarithm of the mass of the rest.
__device__ __forceinline__ bool decode_values(const Fields& fields, math::RecordFormat format, int64_t count,
                                              float* log_probs, float& log_tail_mass) {
  const int lane = lane_number();
  const int scale = format.bits == 16 ? 0 : static_cast<int>(fields.at(16, 16));
  const math::Quantiser quantiser(format.bits == 16 ? 8 : format.bits, scale & (math::record_shapes - 1));
  const double per_unit = format.bits == 16 ? 1 : math::nats_per_unit(scale, format.bits);
  const int64_t codes = math::record_header(format) * 8;
  bool valid = true, anchored = false;
  double sum = 0;
  for (int64_t i = lane; i < count; i += warp_lanes) {
    const uint32_t code = fields.at(codes + i * format.bits, format.bits);
    valid &= code < 0x7F80;
    anchored |= code == 0;
    const float distance =
        format.bits == 16 ? math::bit_cast<float>(code << 16) : quantiser.units(static_cast<float>(code));
    log_probs[i] = distance;
    sum += math::exp(static_cast<double>(distance) * -per_unit);
  }
  const int head = static_cast<int>(fields.at(0, 16));
  valid = __all_sync(full_warp, valid) && (count < format.vocab || head == math::record_no_tail);
  anchored = __any_sync(full_warp, anchored);
  if (!valid || !anchored) return false;
  const math::HeadMass mass(head);
  log_tail_mass = static_cast<float>(mass.log_tail);
  const double log_scale = mass.log_head - math::log(over_warp(sum, Add<double>{}));
  for (int64_t i = lane; i < count; i += warp_lanes)
    log_probs[i] = static_cast<float>(log_scale - static_cast<double>(log_probs[i]) * per_unit);
  return true;
}

__global__ void unpack_kernel(RecordProblem problem) {
  const int64_t row = row_of_warp(), count = row < problem.rows ? problem.counts[row] : 0;
  if (row >= problem.rows) return;
  int64_t* const ids = problem.decoded_ids + row * problem.width;
  float* const log_probs = problem.decoded_log_probs + row * problem.width;
  const math::RecordFormat format{problem.vocab, problem.bits};
  const Fields fields{problem.data + problem.offsets[row], math::record_bytes(format, count)};
  float log_tail_mass = 0;
  const bool valid = count == 0 || (decode_ids(fields, format, count, ids) &&
                                    decode_values(fields, format, count, log_probs, log_tail_mass));
  if (lane_number() == 0) {
    problem.decoded_log_tail_mass[row] = log_tail_mass;
    problem.faults[row] = !valid;
  }
  for (int64_t i = count + lane_number(); i < problem.width; i += warp_lanes)
    ids[i] = -1, log_probs[i] = -static_cast<float>(INFINITY);
}

std::string run(const char* name, void (*kernel)(RecordProblem), const RecordProblem& problem, void* stream) {
  const int64_t blocks = (problem.rows + warps_per_block - 1) / warps_per_block;
  return launch(name, kernel, static_cast<unsigned>(blocks), warps_per_block * warp_lanes, 0,
                static_cast<LaunchStream>(stream), problem);
}

}  // namespace

std::string pack_records(const RecordProblem& problem, void* stream) {
  return run("pack_records", pack_kernel, problem, stream);
}

std::string unpack_records(const RecordProblem& problem, void* stream) {
  return run("unpack_records", unpack_kernel, problem, stream);
}

}  // namespace kd::cuda
