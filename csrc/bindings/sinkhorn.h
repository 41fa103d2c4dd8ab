// How Python calls the family `sinkhorn`; see bindings/divergence.h.
#pragma once

#include "bindings/arguments.h"

namespace kd {
namespace {

void fill(SinkhornProblem& problem, bool compute_double, int64_t batch, int64_t rows, int64_t columns, Address cost,
          Address a, Address b, Address row_lengths, Address column_lengths, Address start, double epsilon,
          double tolerance, double row_reach, double column_reach, double epsilon_start, double epsilon_decay,
          int64_t max_iterations, Address f, Address g, Address iterations, Address f_history, Address g_history) {
  problem.batch = batch;
  problem.rows = rows;
  problem.columns = columns;
  problem.compute_double = compute_double;
  problem.cost = reinterpret_cast<const void*>(cost);
  problem.a = reinterpret_cast<const void*>(a);
  problem.b = reinterpret_cast<const void*>(b);
  problem.row_lengths = reinterpret_cast<const int64_t*>(row_lengths);
  problem.column_lengths = reinterpret_cast<const int64_t*>(column_lengths);
  problem.start = reinterpret_cast<const double*>(start);
  problem.epsilon = epsilon;
  problem.tolerance = tolerance;
  problem.row_reach = row_reach;
  problem.column_reach = column_reach;
  problem.epsilon_start = epsilon_start;
  problem.epsilon_decay = epsilon_decay;
  problem.max_iterations = max_iterations;
  problem.f = reinterpret_cast<double*>(f);
  problem.g = reinterpret_cast<double*>(g);
  problem.iterations = reinterpret_cast<int64_t*>(iterations);
  problem.f_history = reinterpret_cast<double*>(f_history);
  problem.g_history = reinterpret_cast<double*>(g_history);
}

// `Scratch`: on a GPU the address of doubles to work on, else nothing.
template <class Place, void (*run)(Place, SinkhornProblem&), class... Scratch>
void sinkhorn(Place place, bool compute_double, int64_t batch, int64_t rows, int64_t columns, Address cost, Address a,
              Address b, Address row_lengths, Address column_lengths, Address start, double epsilon, double tolerance,
              double row_reach, double column_reach, double epsilon_start, double epsilon_decay, int64_t max_iterations,
              Address f, Address g, Address iterations, Address f_history, Address g_history, Address distance,
              Address value, Address error, Address status, Scratch... scratch) {
  SinkhornProblem problem;
  fill(problem, compute_double, batch, rows, columns, cost, a, b, row_lengths, column_lengths, start, epsilon,
       tolerance, row_reach, column_reach, epsilon_start, epsilon_decay, max_iterations, f, g, iterations, f_history,
       g_history);
  problem.distance = reinterpret_cast<void*>(distance);
  problem.value = reinterpret_cast<void*>(value);
  problem.error = reinterpret_cast<void*>(error);
  problem.status = reinterpret_cast<int32_t*>(status);
  if constexpr (sizeof...(Scratch) == 1) problem.scratch = (reinterpret_cast<double*>(scratch), ...);
  run(place, problem);
}

template <class Place, void (*run)(Place, SinkhornGradientProblem&), class... Scratch>
void sinkhorn_gradient(Place place, bool compute_double, int64_t batch, int64_t rows, int64_t columns, Address cost,
                       Address a, Address b, Address row_lengths, Address column_lengths, Address start, double epsilon,
                       double tolerance, double row_reach, double column_reach, double epsilon_start,
                       double epsilon_decay, int64_t max_iterations, Address f, Address g, Address iterations,
                       Address f_history, Address g_history, int gradient, double solver_tolerance,
                       Address grad_distance, Address grad_value, Address grad_f, Address grad_g, Address grad_cost,
                       Address grad_a, Address grad_b, Scratch... scratch) {
  SinkhornGradientProblem problem;
  fill(problem, compute_double, batch, rows, columns, cost, a, b, row_lengths, column_lengths, start, epsilon,
       tolerance, row_reach, column_reach, epsilon_start, epsilon_decay, max_iterations, f, g, iterations, f_history,
       g_history);
  problem.gradient = static_cast<TransportGradient>(gradient);
  problem.solver_tolerance = solver_tolerance;
  problem.grad_distance = reinterpret_cast<const void*>(grad_distance);
  problem.grad_value = reinterpret_cast<const void*>(grad_value);
  problem.grad_f = reinterpret_cast<const double*>(grad_f);
  problem.grad_g = reinterpret_cast<const double*>(grad_g);
  problem.grad_cost = reinterpret_cast<void*>(grad_cost);
  problem.grad_a = reinterpret_cast<void*>(grad_a);
  problem.grad_b = reinterpret_cast<void*>(grad_b);
  if constexpr (sizeof...(Scratch) == 1) problem.scratch = (reinterpret_cast<double*>(scratch), ...);
  run(place, problem);
}

}  // namespace
}  // namespace kd
