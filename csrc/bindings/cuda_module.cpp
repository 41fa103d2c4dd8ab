// The extension module with the CUDA kernels, on a GPU or, where they are emulated, on the host.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <utility>

#include "bindings/divergence.h"
#include "bindings/pairwise_l1.h"
#include "bindings/records.h"
#include "bindings/sinkhorn.h"
#include "bindings/sparse_divergence.h"
#include "bindings/topk.h"
#include "cuda/kernels.h"

#if defined(KD_EMULATED)
#include <pybind11/stl.h>

#include "cuda/divergence_on_chip.cuh"
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

struct OnDevice {
  explicit OnDevice(int) {}
};

std::string device_error() { return ""; }

py::tuple versions() { return py::make_tuple(0, 0); }

// The kernels as those of a device with so much shared memory of a block, with clusters or without.
void emulate_device(int64_t most_shared_bytes, bool clusters) { emulation::device() = {most_shared_bytes, clusters}; }

py::dict recorded() {
  py::dict found;
  for (const auto& [name, record] : emulation::records())
    found[py::str(name)] = py::make_tuple(record.loaded, record.stored, record.cluster);
  return found;
}

bool divergence_fits_on_chip(int64_t rows, int64_t vocab, int student_dtype, int teacher_dtype) {
  RowProblem problem;
  problem.rows = rows;
  problem.vocab = vocab;
  problem.student = matrix(0, vocab, student_dtype);
  problem.teacher = matrix(0, vocab, teacher_dtype);
  return cuda::fits_on_chip(problem);
}

#else

// Makes a device current while it lives. The driver's current device is PyTorch's too, so it is put back.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaError_t error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) error = cudaSetDevice(device);
    if (error != cudaSuccess)
      throw std::runtime_error("cuda:" + std::to_string(device) + " cannot be used: " + cudaGetErrorString(error));
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

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
    const OnDevice current(device.first);
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
  module.def("emulate_device", &emulate_device);
  module.def("forget_records", [] { emulation::records().clear(); });
  module.def("records", &recorded, "(bytes of rows loaded, stored, blocks of a cluster) of launches since, by name.");
  module.def("divergence_fits_on_chip", &divergence_fits_on_chip);
#endif
  module.attr("SAVED_STATISTICS") = cuda::saved_statistics;
  module.attr("SPARSE_STATISTICS") = cuda::sparse_statistics;
  module.def("divergence_forward", &divergence<Device, &on_gpu<&cuda::divergence_forward, RowProblem>>);
  module.def("divergence_backward", &divergence<Device, &on_gpu<&cuda::divergence_backward, RowProblem>>);
  module.def("divergence_fused", &divergence<Device, &on_gpu<&cuda::divergence_fused, RowProblem>>);
  module.def("topk", &topk<Device, &on_gpu<&cuda::topk, TopKProblem>>);
  module.def("sample", &sample<Device, &on_gpu<&cuda::sample, SampleProblem>>);
  module.def("pack_records", &pack_records<Device, &on_gpu<&cuda::pack_records, RecordProblem>>);
  module.def("unpack_records", &unpack_records<Device, &on_gpu<&cuda::unpack_records, RecordProblem>>);
  module.def("sparse_divergence", &sparse_divergence<Device, &on_gpu<&cuda::sparse_divergence, SparseProblem>>);
  module.def("token_statistics", &token_statistics<Device, &on_gpu<&cuda::token_statistics, RowProblem>>);
  module.def("pairwise_normalisers",
             &pairwise_normalisers<Device, &on_gpu<&cuda::pairwise_normalisers, PairNormalisers>>);
  module.def("pairwise_l1", &pairwise_l1<Device, &on_gpu<&cuda::pairwise_l1, PairProblem>, int64_t>);
  module.attr("SINKHORN_VECTORS") = cuda::sinkhorn_vectors;
  module.attr("SINKHORN_GRADIENT_VECTORS") = cuda::sinkhorn_gradient_vectors;
  module.def("sinkhorn", &sinkhorn<Device, &on_gpu<&cuda::sinkhorn, SinkhornProblem>, Address>);
  module.def("sinkhorn_gradient",
             &sinkhorn_gradient<Device, &on_gpu<&cuda::sinkhorn_gradient, SinkhornGradientProblem>, Address>);
}
