// Whether a GPU can run this library: it holds machine code for some architectures, and PTX for what came after them.
#include "device.cuh"

namespace wanda {
namespace {

__global__ void nothing_kernel() {}

}  // namespace
}  // namespace wanda

// CUDA's own words on why that GPU cannot run a kernel of this library; empty where it can.
extern "C" __attribute__((visibility("default"))) const char* wanda_cuda_why_not(int device) {
  int current = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, wanda::nothing_kernel);
  cudaSetDevice(current);
  cudaGetLastError();  // forget it: a later launch would report it as its own
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
