// The `divergence` family on NVIDIA GPUs: a block per row, the same formulas as the CPU (csrc/math/divergence.h).
//
// Forward reads both rows once, with online normalisers per thread; mixture and power forms read them again, from the end to
// the start, where the caches still hold them. It leaves what the backward wants per row: maxima, log-sums, and the constants
// H_s and H_t of the gradients. Backward reads each logit once and writes each gradient once; it may write over the logits.
#include "cuda/divergence.h"

#include "cuda/launch.cuh"
#include "cuda/reductions.cuh"
#include "cuda/rows.cuh"
#include "math/divergence.h"

namespace kd::cuda {
namespace {

namespace math = KD_ISA::math;

constexpr double log2_e = 1.4426950408889634074;
constexpr double log_2 = 0.69314718055994530942;

template <class Real>
__device__ __forceinline__ Real of_row(const PerRow& per_row, int64_t row) {
  return per_row.values ? static_cast<const Real*>(per_row.values)[row] : static_cast<Real>(per_row.value);
}

// One side of a row and its online softmax. Logits are softcapped and clamped as they are loaded.
template <class Real>
struct Stream {
  Row<Real> row;
  Real temperature;
  Real scale;  // log2(e) / temperature
  Real max = static_cast<Real>(logit_floor);
  Real sum = 0;
  Real log_sum = 0;  // log2 of the row's sum

  __device__ __forceinline__ Stream(const Matrix& matrix, int64_t number, double softcap, const PerRow& temperatures)
      : row(matrix, number, softcap),
        temperature(of_row<Real>(temperatures, number)),
        scale(static_cast<Real>(log2_e) / temperature) {}

  __device__ __forceinline__ Real prepared(Real logit) const {
    if (row.softcap != Real(0)) logit = row.softcap * math::tanh(logit / row.softcap);
    return logit < static_cast<Real>(logit_floor) ? static_cast<Real>(logit_floor) : logit;
  }

  __device__ __forceinline__ void load(const Columns& columns, bool whole, Real* out) const {
    row.load(columns, whole, out);
#pragma unroll
    for (int i = 0; i < entries; ++i) out[i] = prepared(out[i]);
  }

  // Raises the maximum to that of the step; returns by how much (log2, <= 0) what was relative to it falls.
  __device__ __forceinline__ Real raise(const Real* block) {
    Real highest = max;
#pragma unroll
    for (int i = 0; i < entries; ++i) highest = merged_max(highest, block[i]);
    const Real shift = (max - highest) * scale;
    max = highest;
    sum *= math::exp2(shift);
    return shift;
  }

  // From the gradient of a clamped and softcapped logit to that of the logit itself.
  __device__ __forceinline__ Real through_clamp_and_softcap(Real gradient, Real logit) const {
    if (row.softcap != Real(0)) {
      const Real ratio = logit / row.softcap;
      gradient *= Real(1) - ratio * ratio;
    }
    return logit <= static_cast<Real>(logit_floor) ? Real(0) : gradient;
  }

  __device__ __forceinline__ Real log_probability(Real logit) const { return (logit - max) * scale - log_sum; }  // log2
};

template <class Real>
struct MaxCombine {
  __device__ __forceinline__ Real operator()(Real a, Real b) const { return merged_max(a, b); }
  __device__ __forceinline__ Real shuffled(Real value, int distance) const {
    return __shfl_xor_sync(full_warp, value, distance);
  }
};

template <class Real, Kind kind>
__global__ void __launch_bounds__(512) forward_kernel(RowProblem problem, bool adjacent, Real* statistics) {
  using Traits = math::Traits<kind>;
  constexpr bool forward_sum = kind == Kind::forward_kl || kind == Kind::jeffreys;
  constexpr bool reverse_sum = kind == Kind::reverse_kl || kind == Kind::jeffreys;
  KD_SHARED(Real, first_scratch, warp_lanes);
  KD_SHARED(Real, second_scratch, warp_lanes);
  const int64_t row = blockIdx.x;
  Real* const divergence = static_cast<Real*>(problem.divergence);
  Real* const cross_entropy = static_cast<Real*>(problem.cross_entropy);
  if (problem.active && !problem.active[row]) {
    if (threadIdx.x == 0) {
      divergence[row] = 0;
      if (problem.labels) cross_entropy[row] = 0;
    }
    return;
  }
  Stream<Real> student(problem.student, row, problem.student_softcap, problem.student_temperature);
  Stream<Real> teacher(problem.teacher, row, problem.teacher_softcap, problem.teacher_temperature);
  const Real a = static_cast<Real>(problem.a), b = static_cast<Real>(problem.b);
  Real forward = 0, reverse = 0, hard = 0;
  const bool hard_apart = problem.labels && student.temperature != Real(1);
  for_steps(problem.vocab, adjacent, [&](const Columns& columns, bool whole) {
    Real s[entries], t[entries];
    student.load(columns, whole, s);
    teacher.load(columns, whole, t);
    const Real old_student_sum = student.sum, old_teacher_sum = teacher.sum, old_max = student.max;
    const Real student_shift = student.raise(s), teacher_shift = teacher.raise(t);
    if constexpr (forward_sum) forward = (forward + old_teacher_sum * (teacher_shift - student_shift)) * math::exp2(teacher_shift);
    if constexpr (reverse_sum) reverse = (reverse + old_student_sum * (student_shift - teacher_shift)) * math::exp2(student_shift);
    if (hard_apart) hard *= math::exp2((old_max - student.max) * static_cast<Real>(log2_e));
#pragma unroll
    for (int i = 0; i < entries; ++i) {
      if (!whole && !columns.valid(i)) continue;
      const Real x = (s[i] - student.max) * student.scale, y = (t[i] - teacher.max) * teacher.scale;
      const Real exp_x = math::exp2(x), exp_y = math::exp2(y);
      student.sum += exp_x;
      teacher.sum += exp_y;
      if constexpr (forward_sum) forward += exp_y * (y - x);
      if constexpr (reverse_sum) reverse += exp_x * (x - y);
      if (hard_apart) hard += math::exp2((s[i] - student.max) * static_cast<Real>(log2_e));
    }
  });
  // The threads' states become the row's.
  const auto row_max = [&](Real own, SharedView<Real> scratch) { return over_block(own, scratch, MaxCombine<Real>{}); };
  const Real max_s = row_max(student.max, first_scratch), max_t = row_max(teacher.max, second_scratch);
  const Real shift_s = (student.max - max_s) * student.scale, shift_t = (teacher.max - max_t) * teacher.scale;
  if constexpr (forward_sum) forward = (forward + teacher.sum * (shift_t - shift_s)) * math::exp2(shift_t);
  if constexpr (reverse_sum) reverse = (reverse + student.sum * (shift_s - shift_t)) * math::exp2(shift_s);
  if (hard_apart) hard *= math::exp2((student.max - max_s) * static_cast<Real>(log2_e));
  const auto total = [&](Real own, SharedView<Real> scratch) {
    __syncthreads();
    return over_block(own, scratch, Add<Real>{});
  };
  const Real sum_s = total(student.sum * math::exp2(shift_s), first_scratch);
  const Real sum_t = total(teacher.sum * math::exp2(shift_t), second_scratch);
  student.max = max_s, teacher.max = max_t;
  student.log_sum = math::log(sum_s) * static_cast<Real>(log2_e);
  teacher.log_sum = math::log(sum_t) * static_cast<Real>(log2_e);
  if constexpr (forward_sum) forward = (total(forward, first_scratch) / sum_t - (teacher.log_sum - student.log_sum)) * Real(log_2);
  if constexpr (reverse_sum) reverse = (total(reverse, second_scratch) / sum_s - (student.log_sum - teacher.log_sum)) * Real(log_2);
  const Real hard_sum = hard_apart ? total(hard, first_scratch) : sum_s;

  Real value, constant_s, constant_t;
  if constexpr (kind == Kind::forward_kl) {
    value = forward, constant_s = -1, constant_t = forward;
  } else if constexpr (kind == Kind::reverse_kl) {
    value = reverse, constant_s = reverse, constant_t = -1;
  } else if constexpr (kind == Kind::jeffreys) {
    value = a * forward + (1 - a) * reverse, constant_s = (1 - a) * reverse - a, constant_t = a * forward - (1 - a);
  } else {
    Real sum_student = 0, sum_teacher = 0, sum_value = 0;
    Online<Real> affinity{static_cast<Real>(-1e30), 0};
    for_steps(problem.vocab, adjacent, [&](const Columns& columns, bool whole) {
      Real s[entries], t[entries];
      student.load(columns, whole, s);
      teacher.load(columns, whole, t);
#pragma unroll
      for (int i = 0; i < entries; ++i) {
        if (!whole && !columns.valid(i)) continue;
        const Real log_q = student.log_probability(s[i]) * Real(log_2), log_p = teacher.log_probability(t[i]) * Real(log_2);
        if constexpr (kind == Kind::renyi) {
          affinity = merged<Real>(affinity, {a * log_p + (1 - a) * log_q, 1}, static_cast<Real>(log2_e));
        } else if constexpr (Traits::logs_for_terms) {
          constexpr bool own = kind == Kind::alpha_beta;
          const auto power = [&](Real x, Real y) { return math::exp(math::cross_exponent<kind>(x, y, a, b)); };
          const auto h = math::power_terms<kind, Real>(own ? power(log_p, log_p) : math::exp(log_p),
                                                       own ? power(log_q, log_q) : math::exp(log_q), power(log_p, log_q), a, b);
          sum_student += h.student, sum_teacher += h.teacher;
        } else {
          const auto h = math::terms<kind, Real>(math::exp(log_p), math::exp(log_q), log_p, log_q, a);
          sum_student += h.student, sum_teacher += h.teacher, sum_value += h.value;
        }
      }
    });
    if constexpr (kind == Kind::renyi) {
      __syncthreads();
      const Real highest = row_max(affinity.max, first_scratch);
      const Real sum = total(affinity.sum * math::exp(affinity.max - highest), second_scratch);
      constant_s = constant_t = highest + math::log(sum);
      value = constant_s / (a - 1);
    } else {
      constant_s = total(sum_student, first_scratch), constant_t = total(sum_teacher, second_scratch);
      value = math::value_from_sums<kind, Real>(constant_s, constant_t, total(sum_value, first_scratch), a, b);
    }
  }
  if (threadIdx.x != 0) return;
  divergence[row] = value;
  Real* const kept = statistics + row * saved_statistics;
  kept[0] = student.max, kept[1] = student.log_sum, kept[2] = teacher.max, kept[3] = teacher.log_sum;
  kept[4] = constant_s, kept[5] = constant_t;
  if (problem.labels) {
    const Real log_hard = math::log(hard_sum);
    kept[6] = log_hard;
    cross_entropy[row] = log_hard - (student.prepared(student.row.load_one(problem.labels[row])) - student.max);
  }
}


// Of a thread: the gradients of its entries of a step. The names are those of csrc/math/divergence.h.
template <class Real, Kind kind>
__global__ void __launch_bounds__(512) backward_kernel(RowProblem problem, bool adjacent, const Real* statistics) {
  using Traits = math::Traits<kind>;
  const int64_t row = blockIdx.x;
  const Stored<Real> to_student(problem.grad_student, row), to_teacher(problem.grad_teacher, row);
  if (problem.active && !problem.active[row]) {
    for_steps(problem.vocab, adjacent, [&](const Columns& columns, bool whole) {
      const Real zeros[entries] = {};
      to_student.store(columns, whole, zeros);
      to_teacher.store(columns, whole, zeros);
    });
    return;
  }
  Stream<Real> student(problem.student, row, problem.student_softcap, problem.student_temperature);
  Stream<Real> teacher(problem.teacher, row, problem.teacher_softcap, problem.teacher_temperature);
  const Real* const kept = statistics + row * saved_statistics;
  student.max = kept[0], student.log_sum = kept[1], teacher.max = kept[2], teacher.log_sum = kept[3];
  const Real constant_s = kept[4], constant_t = kept[5];
  const Real a = static_cast<Real>(problem.a), b = static_cast<Real>(problem.b);
  const Real upstream = of_row<Real>(problem.grad_divergence, row);
  const Real student_factor = upstream / student.temperature, teacher_factor = upstream / teacher.temperature;
  const bool hard = problem.labels && to_student.data;
  const Real hard_factor = hard ? of_row<Real>(problem.grad_cross_entropy, row) : Real(0);
  const Real log_hard = hard ? kept[6] * static_cast<Real>(log2_e) : Real(0);
  const int64_t label = hard ? problem.labels[row] : -1;
  for_steps(problem.vocab, adjacent, [&](const Columns& columns, bool whole) {
    Real s[entries], t[entries], g_s[entries], g_t[entries];
    student.load(columns, whole, s);
    teacher.load(columns, whole, t);
#pragma unroll
    for (int i = 0; i < entries; ++i) {
      const Real log_q = student.log_probability(s[i]) * Real(log_2), log_p = teacher.log_probability(t[i]) * Real(log_2);
      const Real p = math::exp(log_p), q = math::exp(log_q);
      Real h_s, h_t;
      if constexpr (kind == Kind::renyi) {
        const Real r = math::exp(a * log_p + (1 - a) * log_q - constant_s);
        h_s = q - r, h_t = a / (a - 1) * (r - p);
      } else {
        if constexpr (Traits::logs_for_terms) {
          constexpr bool own = kind == Kind::alpha_beta;
          const auto power = [&](Real x, Real y) { return math::exp(math::cross_exponent<kind>(x, y, a, b)); };
          const auto h = math::power_terms<kind, Real>(own ? power(log_p, log_p) : p, own ? power(log_q, log_q) : q,
                                                       power(log_p, log_q), a, b);
          h_s = h.student, h_t = h.teacher;
        } else {
          const auto h = math::terms<kind, Real>(p, q, log_p, log_q, a);
          h_s = h.student, h_t = h.teacher;
        }
        h_s -= q * constant_s, h_t -= p * constant_t;
      }
      g_s[i] = student_factor * h_s;
      g_t[i] = teacher_factor * h_t;
      if (hard)
        g_s[i] += hard_factor * (math::exp2((s[i] - student.max) * static_cast<Real>(log2_e) - log_hard) -
                                 (columns.at(i) == label ? Real(1) : Real(0)));
      g_s[i] = student.through_clamp_and_softcap(g_s[i], s[i]);
      g_t[i] = teacher.through_clamp_and_softcap(g_t[i], t[i]);
    }
    to_student.store(columns, whole, g_s);
    to_teacher.store(columns, whole, g_t);
  });
}

unsigned threads_for(int64_t vocab) {
  for (unsigned threads = 32; threads < 512; threads *= 2)
    if (static_cast<int64_t>(threads) * entries * 2 >= vocab) return threads;
  return 512;
}

bool aligned(const Matrix& matrix) {
  const int64_t bytes = dtype_bytes(matrix.dtype);
  return !matrix.data || (reinterpret_cast<uint64_t>(matrix.data) % 16 == 0 && matrix.stride * bytes % 16 == 0);
}

bool adjacent(const RowProblem& problem) {
  return aligned(problem.student) && aligned(problem.teacher) && aligned(problem.grad_student) &&
         aligned(problem.grad_teacher);
}

template <class Real, Kind kind>
struct Call {
  static std::string forward(const RowProblem& problem, void* statistics, void* stream) {
    return launch("divergence_forward", forward_kernel<Real, kind>, static_cast<unsigned>(problem.rows),
                  threads_for(problem.vocab), 0, static_cast<LaunchStream>(stream), problem, adjacent(problem),
                  static_cast<Real*>(statistics));
  }
  static std::string backward(const RowProblem& problem, const void* statistics, void* stream) {
    return launch("divergence_backward", backward_kernel<Real, kind>, static_cast<unsigned>(problem.rows),
                  threads_for(problem.vocab), 0, static_cast<LaunchStream>(stream), problem, adjacent(problem),
                  static_cast<const Real*>(statistics));
  }
};

// choose(Call<Real, kind>) for the problem's compute type and kind.
template <class Choose>
std::string dispatch(const RowProblem& problem, const Choose& choose) {
  const auto of_kind = [&](auto real) {
    using Real = decltype(real);
    switch (static_cast<Kind>(problem.kind)) {
      case Kind::forward_kl: return choose(Call<Real, Kind::forward_kl>{});
      case Kind::reverse_kl: return choose(Call<Real, Kind::reverse_kl>{});
      case Kind::jeffreys: return choose(Call<Real, Kind::jeffreys>{});
      case Kind::jsd: return choose(Call<Real, Kind::jsd>{});
      case Kind::skew_forward_kl: return choose(Call<Real, Kind::skew_forward_kl>{});
      case Kind::skew_reverse_kl: return choose(Call<Real, Kind::skew_reverse_kl>{});
      case Kind::total_variation: return choose(Call<Real, Kind::total_variation>{});
      case Kind::alpha: return choose(Call<Real, Kind::alpha>{});
      case Kind::renyi: return choose(Call<Real, Kind::renyi>{});
      case Kind::alpha_beta: return choose(Call<Real, Kind::alpha_beta>{});
    }
    return std::string("divergence: no such kind");
  };
  return problem.compute_double ? of_kind(double()) : of_kind(float());
}

}  // namespace

std::string divergence_forward(const RowProblem& problem, void* statistics, void* stream) {
  return dispatch(problem, [&](auto call) { return decltype(call)::forward(problem, statistics, stream); });
}

std::string divergence_backward(const RowProblem& problem, const void* statistics, void* stream) {
  return dispatch(problem, [&](auto call) { return decltype(call)::backward(problem, statistics, stream); });
}

}  // namespace kd::cuda
