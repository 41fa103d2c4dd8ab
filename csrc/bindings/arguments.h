// What Python hands over as numbers, as the kernels take it.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "problem.h"

namespace py = pybind11;

namespace kd {
namespace {

using Address = uintptr_t;

Matrix matrix(Address data, int64_t stride, int dtype) {
  return {reinterpret_cast<void*>(data), stride, static_cast<DType>(dtype)};
}

PerRow per_row(double value, Address values) { return {reinterpret_cast<const void*>(values), value}; }

EntryLists entry_lists(Address counts, Address summaries) {
  return {reinterpret_cast<int32_t*>(counts), reinterpret_cast<double*>(summaries)};
}

}  // namespace
}  // namespace kd
