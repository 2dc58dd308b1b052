// What launching takes on the host: entry points, descriptors for the copy engine, and shared memory past 48 KB.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>

#include <type_traits>

#define GANTLINE_EXPORT extern "C" __attribute__((visibility("default")))

namespace gantline {

typedef CUresult (*EncodeTiled)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's encoder; null if the driver lacks it. Asked for at run time, so that the library needs no link to the driver.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &found);
    return found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(pointer) : nullptr;
  }();
  return function;
}

// A matrix of 16-bit floats copied in boxes of 128-byte rows, swizzled as the matrix units expect; what lies outside reads as zero.
template <typename T>
bool encode_panels(CUtensorMap* map, void* matrix, const cuuint64_t (&sizes)[2], const cuuint64_t (&strides)[1], const cuuint32_t (&box)[2],
                   CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B) {
  const cuuint32_t steps[2] = {1, 1};
  const auto type = std::is_same<T, __half>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode_tiled() && encode_tiled()(map, type, 2, matrix, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                          promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Once for each kernel and device.
template <auto kernel>
cudaError_t raise_shared_memory(int bytes) {
  static bool raised[64] = {};
  int device = 0;
  cudaGetDevice(&device);
  if (raised[device % 64]) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  raised[device % 64] = error == cudaSuccess;
  return error;
}

// Of a kernel of any module (a CUfunction): as much shared memory as a multiprocessor has, and the least cache.
inline int prefer_shared_memory(void* function) {
  void* pointer = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuFuncSetAttribute", &pointer, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const auto set = reinterpret_cast<CUresult (*)(CUfunction, CUfunction_attribute, int)>(pointer);
  return set(static_cast<CUfunction>(function), CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100);
}

}  // namespace gantline
