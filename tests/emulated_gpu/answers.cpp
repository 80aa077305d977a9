// What PyTorch asks of CUDA, cuBLAS and cuDNN on its way to a launch: properties, descriptors, handles.

#include <cuda_runtime_api.h>
#include <cudnn_version.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "emulated_gpu.h"

extern "C" {

// --- properties: an H100's, but for capability and memory

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "emulated GPU");
  p->major = emulated_capability(device) / 10;
  p->minor = emulated_capability(device) % 10;
  p->totalGlobalMem = emulated_memory(device);
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->l2CacheSize = 50 << 20;
  p->memoryBusWidth = 5120;
  p->textureAlignment = 512;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  cudaGetDeviceProperties(&p, device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}

// --- kernels

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
static thread_local std::vector<Configuration> configurations;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void** stream) {
  Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *stream = last.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) {
  emulated_launch("a kernel", stream);
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t stream) {
  emulated_launch("a kernel", stream);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void*, void**) {
  emulated_launch("a kernel", configuration->stream);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t, unsigned) {
  *count = 2;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int, size_t) {
  *count = 2;
  return cudaSuccess;
}

// --- the driver

static int do_nothing() { return 0; }

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  void* found = dlsym(RTLD_DEFAULT, name);
  *function = found ? found : (void*)do_nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
int cuCtxGetCurrent(void** context) {
  static int some;
  *context = &some;
  return 0;
}
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = 1;
  return 0;
}

// --- cuBLAS

// Of a library, or of something that nobody reads again.
struct Handle {
  cudaStream_t stream;
  char rest[64];
};
static int new_handle(void* handle) {
  *(Handle**)handle = new Handle{};
  return 0;
}

int cublasCreate_v2(void** handle) { return new_handle(handle); }
int cublasSetStream_v2(Handle* handle, cudaStream_t stream) {
  handle->stream = stream;
  return 0;
}
int cublasGetMathMode(Handle*, int* mode) { return *mode = 0; }

int cublasLtMatmulDescCreate(void** description, int, int) { return new_handle(description); }
int cublasLtMatrixLayoutCreate(void** layout, int, uint64_t, uint64_t, int64_t) { return new_handle(layout); }
int cublasLtMatmulPreferenceCreate(void** preference) { return new_handle(preference); }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* found, int* count) {
  memset(found, 0, 64);
  *count = 1;
  return 0;
}
int cublasLtMatmul(void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*,
                   size_t, cudaStream_t stream) {
  emulated_launch("cublasLtMatmul", stream);
  return 0;
}

// --- cuDNN

size_t cudnnGetVersion() { return CUDNN_VERSION; }
size_t cudnnGetCudartVersion() { return CUDART_VERSION; }
int cudnnCreate(void** handle) { return new_handle(handle); }
int cudnnSetStream(Handle* handle, cudaStream_t stream) { return cublasSetStream_v2(handle, stream); }
int cudnnGetStream(Handle* handle, cudaStream_t* stream) {
  *stream = handle->stream;
  return 0;
}

// BatchNorm: needs no memory of its own
int cudnnCreateTensorDescriptor(void** descriptor) { return new_handle(descriptor); }
int cudnnCreateActivationDescriptor(void** descriptor) { return new_handle(descriptor); }
static int none(size_t* size) { return *size = 0; }
int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*,
                                                             size_t* size) {
  return none(size);
}
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*, void*, void*,
                                                      size_t* size) {
  return none(size);
}
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*, size_t* size) {
  return none(size);
}

// Convolutions: graphs of descriptors, for each of which there is one engine. It needs no memory of its own either.
// The numbers are those of cudnn_graph.h.
constexpr int ENGINES_FOUND = 202;                                     // an attribute
constexpr int INT64_TYPE = 3, NUMERICAL_NOTE = 11, BEHAVIOR_NOTE = 19;  // types of attributes

int cudnnBackendCreateDescriptor(int, void** descriptor) { return new_handle(descriptor); }
int cudnnBackendGetAttribute(void*, int attribute, int type, int64_t room, int64_t* count, void* values) {
  bool is_room = values && room > 0;
  bool is_note = type == NUMERICAL_NOTE || type == BEHAVIOR_NOTE;
  if (count) *count = !is_note && (is_room || attribute == ENGINES_FOUND);
  if (is_room && type == INT64_TYPE) memset(values, 0, room * sizeof(int64_t));
  return 0;
}
int cudnnBackendExecute(Handle* handle, void*, void*) {
  emulated_launch("a convolution", handle->stream);
  return 0;
}

}  // extern "C"
