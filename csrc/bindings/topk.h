// How Python calls the family `topk`; see bindings/divergence.h.
#pragma once

#include "bindings/arguments.h"

namespace kd {
namespace {

template <class Place, void (*run)(Place, TopKProblem&)>
void topk(Place place, bool compute_double, int64_t rows, int64_t vocab, Address source, int64_t stride, int dtype,
          double temperature, double softcap, int64_t k, Address ids, Address log_probs, Address log_tail_mass) {
  TopKProblem problem;
  problem.rows = rows;
  problem.vocab = vocab;
  problem.compute_double = compute_double;
  problem.source = matrix(source, stride, dtype);
  problem.temperature = temperature;
  problem.softcap = softcap;
  problem.k = k;
  problem.ids = reinterpret_cast<int64_t*>(ids);
  problem.log_probs = reinterpret_cast<void*>(log_probs);
  problem.log_tail_mass = reinterpret_cast<void*>(log_tail_mass);
  run(place, problem);
}

template <class Place, void (*run)(Place, SampleProblem&)>
void sample(Place place, bool compute_double, int64_t rows, int64_t vocab, Address source, int64_t stride, int dtype,
            double temperature, double proposal_temperature, double softcap, int64_t draws, Address uniforms,
            Address ids, Address weights, Address entropy) {
  SampleProblem problem;
  problem.rows = rows;
  problem.vocab = vocab;
  problem.compute_double = compute_double;
  problem.source = matrix(source, stride, dtype);
  problem.temperature = temperature;
  problem.proposal_temperature = proposal_temperature;
  problem.softcap = softcap;
  problem.draws = draws;
  problem.uniforms = reinterpret_cast<const double*>(uniforms);
  problem.ids = reinterpret_cast<int64_t*>(ids);
  problem.weights = reinterpret_cast<void*>(weights);
  problem.entropy = reinterpret_cast<void*>(entropy);
  run(place, problem);
}

}  // namespace
}  // namespace kd
