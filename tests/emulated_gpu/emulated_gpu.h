// What runtime.cpp gives to answers.cpp and to __init__.py.

#include <cuda_runtime_api.h>

extern "C" {

long emulated_num_waits();         // how often the host has waited for a GPU
const char* emulated_violations();  // what a capture does not allow, and was done: one per line

void emulated_wait();                                         // the host waits for a result
void emulated_launch(const char* what, cudaStream_t stream);  // work is given to a stream

int emulated_capability(int device);  // 90 for compute capability 9.0
size_t emulated_memory(int device);   // bytes

}  // extern "C"
