/* A CUDA driver that says yes: Triton loads, binds and launches kernels on it, and nothing is executed.
   What a real driver refuses for its arguments, it refuses as well: tensor maps that break a rule. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "cuda.h"

static int context, module;

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "refused by the stub driver"; return CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char **text) { *text = "stub"; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) { /* an H200's */
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1000000;
  }
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *current) { *current = (CUcontext)&context; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *current, CUdevice device) { return cuCtxGetCurrent(current); }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *loaded, const void *image) { *loaded = (CUmodule)&module; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule from, const char *name) {
  *function = (CUfunction)strdup(name);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache cache) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

/* CUDA Driver API, cuTensorMapEncodeTiled, "Parameters"; elements are taken for 16-bit ones. */
CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *sizes,
    const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const char *broken = NULL;
  unsigned line = 2 * box[0];
  memset(map, 0, sizeof(*map));
  if ((uintptr_t)address % 16) broken = "the address is no multiple of 16";
  for (unsigned axis = 0; axis < rank; axis++) {
    if (sizes[axis] == 0 || sizes[axis] > (1ull << 32)) broken = "a size is not in 1 to 2^32";
    if (box[axis] == 0 || box[axis] > 256) broken = "a block is not in 1 to 256";
    if (element_strides[axis] < 1 || element_strides[axis] > 8) broken = "an element stride is not in 1 to 8";
    if (axis + 1 < rank && (strides[axis] % 16 || strides[axis] >= (1ull << 40))) broken = "a stride is no multiple of 16";
  }
  if (line % 16) broken = "the line of a block is no multiple of 16 bytes";
  if ((swizzle == CU_TENSOR_MAP_SWIZZLE_32B && line > 32) || (swizzle == CU_TENSOR_MAP_SWIZZLE_64B && line > 64) ||
      (swizzle == CU_TENSOR_MAP_SWIZZLE_128B && line > 128))
    broken = "the line of a block is longer than the swizzle";
  if (broken) fprintf(stderr, "stub driver: tensor map: %s\n", broken);
  return broken ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  return CUDA_SUCCESS;
}
