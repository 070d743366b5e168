// Whether a GPU can run this library, which holds machine code for some architectures and PTX for later ones.
#include "device.cuh"

namespace wanda {
namespace {

__global__ void nothing_kernel() {}

}  // namespace
}  // namespace wanda

// CUDA's message on why that GPU cannot run a kernel of this library, or an empty string.
extern "C" __attribute__((visibility("default"))) const char* wanda_cuda_why_not(int device) {
  int current = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, wanda::nothing_kernel);
  cudaSetDevice(current);
  // Clears the error, which a later launch would otherwise report as its own.
  cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
