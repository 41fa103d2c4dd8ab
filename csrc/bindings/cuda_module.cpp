// The extension module with the CUDA kernels, on a GPU or, where they are emulated, on the host.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <utility>

#include "bindings/divergence.h"
#include "bindings/records.h"
#include "bindings/sparse_divergence.h"
#include "bindings/topk.h"
#include "cuda/kernels.h"

#if defined(KD_EMULATED)
#include <pybind11/stl.h>

#include "testing/faulty_kernels.h"
#else
#include <cuda_runtime_api.h>
#define KD_MODULE_NAME _cuda
#endif

namespace kd {
namespace {

// A device's number and the address of one of its streams.
using Device = std::pair<int, Address>;

#if defined(KD_EMULATED)

void make_current(int) {}

std::string device_error() { return ""; }

py::tuple versions() { return py::make_tuple(0, 0); }

#else

// The runtime that is linked in here keeps a current device of its own.
void make_current(int device) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess)
    throw std::runtime_error("cuda:" + std::to_string(device) + " cannot be used: " + cudaGetErrorString(error));
}

std::string device_error() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

py::tuple versions() {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  return py::make_tuple(driver, runtime);
}

#endif

template <auto kernels, class Problem>
void on_gpu(Device device, Problem& problem) {
  std::string error;
  {
    py::gil_scoped_release release;
    make_current(device.first);
    error = kernels(problem, reinterpret_cast<void*>(device.second));
  }
  if (!error.empty()) throw std::runtime_error("cuda:" + std::to_string(device.first) + ", " + error);
}

}  // namespace
}  // namespace kd

PYBIND11_MODULE(KD_MODULE_NAME, module) {
  using namespace kd;
  module.doc() = "CUDA kernels of kdkernels. Addresses and sizes are trusted: call through kdkernels.backends.cuda.";
  module.def("device_error", &device_error, "Why the runtime finds no device, or an empty text.");
  module.def("versions", &versions, "Of the driver and of the runtime that is linked in, as 1000 major + 10 minor.");
#if defined(KD_EMULATED)
  module.def("faulty_kernels", &emulation::faulty_kernels);
  module.def("run_faulty", &emulation::run_faulty);
#endif
  module.attr("SAVED_STATISTICS") = cuda::saved_statistics;
  module.attr("SPARSE_STATISTICS") = cuda::sparse_statistics;
  module.def("divergence_forward", &divergence<Device, &on_gpu<&cuda::divergence_forward, RowProblem>>);
  module.def("divergence_backward", &divergence<Device, &on_gpu<&cuda::divergence_backward, RowProblem>>);
  module.def("topk", &topk<Device, &on_gpu<&cuda::topk, TopKProblem>>);
  module.def("sample", &sample<Device, &on_gpu<&cuda::sample, SampleProblem>>);
  module.def("pack_records", &pack_records<Device, &on_gpu<&cuda::pack_records, RecordProblem>>);
  module.def("unpack_records", &unpack_records<Device, &on_gpu<&cuda::unpack_records, RecordProblem>>);
  module.def("sparse_divergence", &sparse_divergence<Device, &on_gpu<&cuda::sparse_divergence, SparseProblem>>);
  module.def("token_statistics", &token_statistics<Device, &on_gpu<&cuda::token_statistics, RowProblem>>);
}
