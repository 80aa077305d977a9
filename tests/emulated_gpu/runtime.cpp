// CUDA without a GPU: the host's side of the CUDA runtime, preloaded under a CUDA build of PyTorch.
//
// Device memory is host memory, copies copy, and a kernel does nothing: __init__.py computes what it would have
// computed. Nothing is asynchronous. What is kept of CUDA is what a program can get wrong on the host: how much memory a
// GPU has, which GPU memory and streams belong to, which calls wait for a GPU, and the rules of stream capture. What
// PyTorch needs beyond that is in answers.cpp; functions that are in neither file do nothing.

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "emulated_gpu.h"

namespace {

struct Device {
  int capability;  // 90 for compute capability 9.0
  size_t memory, used;
};
struct Block {
  size_t size;
  int device;  // HOST: pinned host memory
};
constexpr int HOST = -1;

// Captures are numbered from 1. A number other than the present capture's means none.
struct Stream {
  int device;
  unsigned long long capture;  // in which it takes part
};
struct Event {
  unsigned long long capture;  // in which it was recorded
};
struct Graph {
  size_t num_nodes;
};
struct Capture {
  unsigned long long number;  // 0: nothing is captured
  cudaStreamCaptureMode mode;
  bool is_valid;
  Graph graph;
};

std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

std::map<char*, Block> blocks;
Capture capture{};
unsigned long long num_captures = 0;
long num_waits = 0;
std::string violations;
Stream default_stream{};  // of all devices
thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

// EMULATED_GPUS holds "capability:GiB" of each, separated by blanks.
std::vector<Device>& devices() {
  static std::vector<Device> all = [] {
    std::vector<Device> found;
    std::istringstream words(getenv("EMULATED_GPUS"));
    for (std::string word; words >> word;) {
      size_t gib = atoi(word.c_str() + word.find(':') + 1);
      found.push_back({atoi(word.c_str()), gib << 30, 0});
    }
    return found;
  }();
  return all;
}

Stream* as_stream(cudaStream_t stream) {
  bool is_default = !stream || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
  return is_default ? &default_stream : (Stream*)stream;
}

bool is_captured(cudaStream_t stream) { return capture.number && as_stream(stream)->capture == capture.number; }

cudaError_t fail(cudaError_t error) { return last_error = error; }

void violate(const std::string& what) { violations += what + "\n"; }

// A call that a capture does not allow: the capture is lost.
cudaError_t forbid(const std::string& what) {
  violate(what + " during a capture");
  capture.is_valid = false;
  return fail(cudaErrorStreamCaptureUnsupported);
}

// Whether now is not the time for calls that no thread may make during a capture, unless it has relaxed that for itself.
bool is_unsafe() {
  return capture.number && capture.mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
}

cudaError_t wait(const char* what) {
  Lock lock(mutex);
  if (is_unsafe()) return forbid(what);
  num_waits++;
  return cudaSuccess;
}

// Gives work to a stream: whether it is done now, or becomes a node of the graph under capture.
bool runs_now(const char* what, cudaStream_t stream) {
  Lock lock(mutex);
  Stream* given = as_stream(stream);
  if (given != &default_stream && given->device != current_device) violate(what + std::string(" on a foreign stream"));
  if (is_captured(stream)) {
    capture.graph.num_nodes++;
    return false;
  }
  if (capture.number) violate(what + std::string(" beside a capture: it will not be in the graph"));
  return true;
}

void* new_block(size_t size, int device) {
  size = size ? size : 1;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;  // the host need not have as much memory as the GPU
  void* start = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  blocks[(char*)start] = {size, device};
  return start;
}

void free_block(void* start) {
  munmap(start, blocks.at((char*)start).size);
  blocks.erase((char*)start);
}

const Block* find_block(const void* address) {
  auto next = blocks.upper_bound((char*)address);
  if (next == blocks.begin()) return nullptr;
  auto& [start, block] = *--next;
  return (char*)address < start + block.size ? &block : nullptr;
}

}  // namespace

extern "C" {

// --- for __init__.py and answers.cpp

long emulated_num_waits() { return num_waits; }
const char* emulated_violations() { return violations.c_str(); }
void emulated_wait() { wait("a result on the host"); }
void emulated_launch(const char* what, cudaStream_t stream) { runs_now(what, stream); }
int emulated_capability(int device) { return devices()[device].capability; }
size_t emulated_memory(int device) { return devices()[device].memory; }

// --- devices and errors

cudaError_t cudaGetDeviceCount(int* count) {
  *count = devices().size();
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= (int)devices().size()) return fail(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return wait("cudaDeviceSynchronize"); }

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    default: return "an error of the emulated GPU";
  }
}
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

// --- memory

cudaError_t cudaMalloc(void** start, size_t size) {
  Lock lock(mutex);
  if (is_unsafe()) return forbid("cudaMalloc");
  Device& device = devices()[current_device];
  *start = device.used + size <= device.memory ? new_block(size, current_device) : nullptr;
  if (!*start) return fail(cudaErrorMemoryAllocation);
  device.used += size;
  return cudaSuccess;
}
cudaError_t cudaFree(void* start) {
  Lock lock(mutex);
  if (is_unsafe()) return forbid("cudaFree");
  if (!start) return cudaSuccess;
  Block block = blocks.at((char*)start);
  devices()[block.device].used -= block.size;
  free_block(start);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** start, size_t size, unsigned) {
  Lock lock(mutex);
  *start = new_block(size, HOST);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* start) {
  Lock lock(mutex);
  free_block(start);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = devices()[current_device].memory;
  *free = *total - devices()[current_device].used;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  Lock lock(mutex);
  const Block* block = find_block(address);
  memset(attributes, 0, sizeof *attributes);
  attributes->type = cudaMemoryTypeUnregistered;
  if (block) {
    bool is_host = block->device == HOST;
    attributes->type = is_host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    attributes->device = is_host ? 0 : block->device;
    attributes->devicePointer = (void*)address;
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  if (runs_now("cudaMemcpyAsync", stream)) memmove(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  if (cudaError_t error = wait("cudaMemcpy")) return error;
  memmove(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream);
}
cudaError_t cudaMemsetAsync(void* start, int value, size_t size, cudaStream_t stream) {
  if (runs_now("cudaMemsetAsync", stream)) memset(start, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* start, int value, size_t size) { return cudaMemsetAsync(start, value, size, nullptr); }

// --- streams and events

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = (cudaStream_t) new Stream{current_device, 0};
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Lock lock(mutex);
  if (is_captured(stream)) return forbid("cudaStreamSynchronize");
  num_waits++;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  Lock lock(mutex);
  return is_captured(stream) ? forbid("cudaStreamQuery") : cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  Lock lock(mutex);
  bool is_of_capture = capture.number && ((Event*)event)->capture == capture.number;
  if (is_captured(stream) && !is_of_capture) return forbid("waiting for work outside");
  if (is_of_capture) as_stream(stream)->capture = capture.number;  // the stream joins
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = (cudaEvent_t) new Event{};
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete (Event*)event;
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  Lock lock(mutex);
  ((Event*)event)->capture = is_captured(stream) ? capture.number : 0;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t) {
  Lock lock(mutex);
  return is_unsafe() ? forbid("cudaEventQuery") : cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return wait("cudaEventSynchronize"); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}

// --- capture and graphs

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(thread_mode, *mode);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  Lock lock(mutex);
  if (as_stream(stream) == &default_stream) return forbid("the default stream");
  capture = {++num_captures, mode, true, {}};
  as_stream(stream)->capture = capture.number;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  Lock lock(mutex);
  auto of_capture = capture.is_valid ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusInvalidated;
  *status = is_captured(stream) ? of_capture : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* number,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* num_dependencies) {
  Lock lock(mutex);
  cudaStreamIsCapturing(stream, status);
  if (number) *number = is_captured(stream) ? capture.number : 0;
  if (graph) *graph = (cudaGraph_t)&capture.graph;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (num_dependencies) *num_dependencies = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  Lock lock(mutex);
  *graph = nullptr;
  if (!is_captured(stream)) return fail(cudaErrorIllegalState);
  Capture ended = std::exchange(capture, {});
  if (!ended.is_valid) return fail(cudaErrorStreamCaptureInvalidated);
  *graph = (cudaGraph_t) new Graph(ended.graph);
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = ((Graph*)graph)->num_nodes;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = (cudaGraphExec_t)graph;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t stream) {
  emulated_launch("a graph", stream);
  return cudaSuccess;
}

}  // extern "C"
