/* A CUDA driver that executes nothing: Triton loads, binds and launches kernels on it.
   It refuses what a real driver refuses: another GPU's machine code, tensor maps that break a rule, and launches with too
   much shared memory, too many registers, threads or programs, or null pointers. cuGetErrorString says which. */
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

enum { REGISTERS = 65536, MOST_THREADS = 1024, MOST_PARAMETERS = 128, WITHOUT_OPT_IN = 49152 };
enum { SCRATCH_POINTERS = 2 }; /* Triton's last two parameters, null in a kernel without scratch memory */
enum { GLOBAL_SPACE = 4 };     /* where the pointer that a parameter is points to */

/* Of GPUS in __init__.py. Shared memory in bytes. */
struct gpu {
  int capability, shared_per_program, shared, threads, programs, multiprocessors;
} stub_gpu;

struct kernel {
  char name[256];
  unsigned registers, threads[3], parameters, sizes[MOST_PARAMETERS], spaces[MOST_PARAMETERS];
  int dynamic_shared; /* that it may have */
};

/* Called at every launch that is not refused: with the kernel's registers, and its parameters' number, places, sizes, and
   spaces. */
void (*stub_watcher)(
    const char *, const CUlaunchConfig *, unsigned, unsigned, void **, const unsigned *, const unsigned *);

static int context;
static __thread char reason[512] = "refused";

static CUresult refuse(CUresult code, const char *format, ...) {
  va_list values;
  va_start(values, format);
  int n = snprintf(reason, sizeof(reason), "stub driver: ");
  vsnprintf(reason + n, sizeof(reason) - n, format, values);
  va_end(values);
  return code;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = reason; return CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char **text) { *text = "stub"; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = stub_gpu.shared_per_program; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = stub_gpu.shared; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = stub_gpu.multiprocessors; break;
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

/* Attributes of kernels in the sections .nv.info and .nv.info.<name>, as cuobjdump -elf prints them. */
enum { MAX_THREADS = 0x05, REQUIRED_THREADS = 0x10, PARAMETER = 0x17, REGISTER_COUNT = 0x2f, IN_BYTES = 0x04 };

static void read_info(struct kernel *kernel, const uint8_t *info, size_t size) {
  for (const uint8_t *at = info; at + 4 <= info + size;) {
    uint16_t length;
    const uint8_t *value = at + 4;
    memcpy(&length, at + 2, 2);
    if (at[0] != IN_BYTES) { at += 4; continue; } /* the value is in the place of the length */
    if (at[1] == REGISTER_COUNT) memcpy(&kernel->registers, value + 4, 4);
    if (at[1] == MAX_THREADS || at[1] == REQUIRED_THREADS) memcpy(kernel->threads, value, 12);
    if (at[1] == PARAMETER) {
      uint16_t ordinal;
      uint32_t packed;
      memcpy(&ordinal, value + 4, 2);
      memcpy(&packed, value + 8, 4);
      if (ordinal < MOST_PARAMETERS) {
        kernel->sizes[ordinal] = packed >> 18;
        kernel->spaces[ordinal] = packed >> 8 & 0xf;
        if (kernel->parameters <= ordinal) kernel->parameters = ordinal + 1;
      }
    }
    at = value + length;
  }
}

CUresult cuModuleLoadData(CUmodule *loaded, const void *image) {
  const Elf64_Ehdr *header = image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG)) return refuse(CUDA_ERROR_INVALID_IMAGE, "no machine code");
  int capability = header->e_ident[EI_ABIVERSION] >= 8 ? header->e_flags >> 8 & 0xff : header->e_flags & 0xff;
  if (capability / 10 != stub_gpu.capability / 10 || capability > stub_gpu.capability)
    return refuse(CUDA_ERROR_NO_BINARY_FOR_GPU, "machine code is for %d, the GPU is %d", capability, stub_gpu.capability);
  struct kernel *kernel = calloc(1, sizeof(*kernel));
  const Elf64_Shdr *sections = (const void *)((const char *)image + header->e_shoff);
  const char *names = (const char *)image + sections[header->e_shstrndx].sh_offset;
  for (int i = 0; i < header->e_shnum; i++) {
    const char *name = names + sections[i].sh_name;
    if (!strncmp(name, ".text.", 6)) snprintf(kernel->name, sizeof(kernel->name), "%s", name + 6);
    if (!strncmp(name, ".nv.info", 8)) read_info(kernel, (const uint8_t *)image + sections[i].sh_offset, sections[i].sh_size);
  }
  kernel->dynamic_shared = WITHOUT_OPT_IN;
  *loaded = (CUmodule)kernel;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule from, const char *name) {
  struct kernel *kernel = (struct kernel *)from;
  if (strcmp(kernel->name, name)) return refuse(CUDA_ERROR_NOT_FOUND, "the kernel is %s, not %s", kernel->name, name);
  *function = (CUfunction)kernel;
  return CUDA_SUCCESS;
}
static unsigned warp_registers(const struct kernel *kernel) { return (kernel->registers + 7) / 8 * 8 * 32; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  const struct kernel *kernel = (const struct kernel *)function;
  *value = 0; /* static shared memory, of which Triton uses none, and local memory */
  if (attribute == CU_FUNC_ATTRIBUTE_NUM_REGS) *value = kernel->registers;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK) {
    int threads = REGISTERS / warp_registers(kernel) * 32;
    *value = threads < MOST_THREADS ? threads : MOST_THREADS;
  }
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  struct kernel *kernel = (struct kernel *)function;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value > stub_gpu.shared_per_program)
      return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %d bytes of shared memory wanted", kernel->name, value);
    kernel->dynamic_shared = value;
  }
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache cache) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

/* CUDA Driver API, cuTensorMapEncodeTiled, "Parameters". */
CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *sizes,
    const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const unsigned bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  const char *broken = NULL;
  unsigned line = (unsigned)type < sizeof(bytes) / sizeof(*bytes) ? bytes[type] * box[0] : 0;
  memset(map, 0, sizeof(*map));
  if (rank < 1 || rank > 5) return refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: the rank is not in 1 to 5");
  if ((uintptr_t)address % 16 || address == NULL) broken = "the address is null or no multiple of 16";
  for (unsigned axis = 0; axis < rank; axis++) {
    if (sizes[axis] == 0 || sizes[axis] > (1ull << 32)) broken = "a size is not in 1 to 2^32";
    if (box[axis] == 0 || box[axis] > 256) broken = "a block is not in 1 to 256";
    if (element_strides[axis] < 1 || element_strides[axis] > 8) broken = "an element stride is not in 1 to 8";
    if (axis + 1 < rank && (strides[axis] % 16 || strides[axis] >= (1ull << 40)))
      broken = "a stride is no multiple of 16 below 2^40";
  }
  if (line == 0 || line % 16) broken = "the line of a block is no multiple of 16 bytes";
  if ((swizzle == CU_TENSOR_MAP_SWIZZLE_32B && line > 32) || (swizzle == CU_TENSOR_MAP_SWIZZLE_64B && line > 64) ||
      (swizzle == CU_TENSOR_MAP_SWIZZLE_128B && line > 128))
    broken = "the line of a block is longer than the swizzle";
  if (stub_gpu.capability < 90) broken = "GPUs before 9.0 have none";
  return broken ? refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: %s", broken) : CUDA_SUCCESS;
}

/* Programs of the launch that are resident on the GPU at once. */
static uint64_t resident(const struct kernel *kernel, unsigned warps, unsigned shared) {
  unsigned reserved = stub_gpu.capability >= 80 ? 1024 : 0, most = stub_gpu.programs;
  unsigned by_registers = REGISTERS / (warp_registers(kernel) * warps);
  unsigned by_threads = stub_gpu.threads / (32 * warps), by_shared = most;
  if (shared + reserved) by_shared = stub_gpu.shared / (shared + reserved);
  if (by_registers < most) most = by_registers;
  if (by_threads < most) most = by_threads;
  if (by_shared < most) most = by_shared;
  return (uint64_t)most * stub_gpu.multiprocessors;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  const struct kernel *kernel = (const struct kernel *)function;
  const char *name = kernel->name;
  unsigned x = config->blockDimX, y = config->blockDimY, z = config->blockDimZ, threads = x * y * z;
  uint64_t grid = (uint64_t)config->gridDimX * config->gridDimY * config->gridDimZ;
  unsigned shared = config->sharedMemBytes, warps = (threads + 31) / 32;
  if (grid == 0 || config->gridDimX > 0x7fffffff || config->gridDimY > 65535 || config->gridDimZ > 65535)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: a grid of %u, %u, %u", name, config->gridDimX, config->gridDimY, config->gridDimZ);
  if (threads == 0 || threads > MOST_THREADS) return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %u threads", name, threads);
  if (warp_registers(kernel) * warps > REGISTERS)
    return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "%s: %u registers of %u threads", name, kernel->registers, threads);
  if (kernel->threads[0] && threads > kernel->threads[0] * kernel->threads[1] * kernel->threads[2])
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %u threads, compiled for %u", name, threads, kernel->threads[0]);
  if (shared > (unsigned)kernel->dynamic_shared)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %u bytes of shared memory, allowed are %d", name, shared, kernel->dynamic_shared);
  for (unsigned i = 0; i < config->numAttrs; i++) {
    CUlaunchAttributeID id = config->attrs[i].id;
    if (id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE && config->attrs[i].value.cooperative && grid > resident(kernel, warps, shared))
      return refuse(CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE, "%s: %lu programs cannot run at once", name, (unsigned long)grid);
    if (id != CU_LAUNCH_ATTRIBUTE_COOPERATIVE && stub_gpu.capability < 90)
      return refuse(CUDA_ERROR_NOT_SUPPORTED, "%s: launch attribute %d needs 9.0", name, (int)id);
  }
  for (unsigned i = 0; i + SCRATCH_POINTERS < kernel->parameters; i++)
    if (kernel->spaces[i] == GLOBAL_SPACE && *(const uint64_t *)arguments[i] == 0)
      return refuse(CUDA_ERROR_INVALID_VALUE, "%s: parameter %u is a null pointer", name, i);
  if (stub_watcher)
    stub_watcher(name, config, kernel->registers, kernel->parameters, arguments, kernel->sizes, kernel->spaces);
  return CUDA_SUCCESS;
}
