"""GPUs for tests on machines without one.

PyTorch's CUDA path is the real one: its allocator, streams, graphs, and its checks of devices and types. Underneath,
`runtime.cpp` plays CUDA with the host's memory and kernels that do nothing, and `Compute` then computes each
operation's result on the CPU, in the same memory. What this cannot show: speed, the arithmetic of CUDA's own kernels,
races between streams, NCCL and Triton.
"""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SOURCES = Path(__file__).parent
LIBRARY = "libcuda.so.1"
aten = torch.ops.aten


class Unavailable(Exception):
    """Why GPUs cannot be emulated here."""


# --- building


def build(directory: Path) -> Path:
    """Compile the library for the installed PyTorch.

    Raises:
        Unavailable: no compiler, or a PyTorch that was not built for CUDA 13.
    """
    if not (torch.version.cuda or "").startswith("13."):
        raise Unavailable(f"needs a PyTorch that was built for CUDA 13, not {torch.__version__}")
    if not shutil.which("g++"):
        raise Unavailable("needs g++")
    packages = Path(torch.__file__).parent.parent
    # CUDA's headers, of packages that PyTorch requires (Triton's have the folder `crt`), or of a toolkit
    headers = (
        "nvidia/cu13/include",
        "nvidia/cudnn/include",
        "triton/backends/nvidia/include",
        "/usr/local/cuda/include",
    )
    includes = [f"-I{packages / folder}" for folder in headers]
    objects = [directory / "runtime.o", directory / "answers.o"]
    for file in objects:
        run("g++", "-std=c++17", "-fPIC", "-w", *includes, "-c", SOURCES / f"{file.stem}.cpp", "-o", file)
    libraries = sorted((packages / "torch/lib").glob("lib*.so"))
    needed = set(re.findall(r" U (\w+)", run("nm", "--dynamic", "--undefined-only", *libraries)))
    defined = set(re.findall(r" T (\w+)", run("nm", *objects)))
    stubs, library = directory / "stubs.c", directory / LIBRARY
    stubs.write_text(stub_functions(needed - defined))
    run("gcc", "-shared", "-fPIC", "-w", stubs, *objects, "-lstdc++", f"-Wl,-soname,{LIBRARY}", "-o", library)
    return library


def run(*command) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed: {result.stderr[:2000]}")
    return result.stdout


def stub_functions(names: set[str]) -> str:
    """C code for functions of CUDA's libraries that are not written by hand: a product is a launch on the stream of its
    handle, a copy would be needed, and all others do nothing."""
    is_cuda = re.compile(r"__cuda|cuda[A-Z]|cublas|cudnn|cu(?!File)[A-Z]").match
    is_product = re.compile(r"cublas\w*(gemm|gemv|dot|Gemm|Dot)|cudnnBatchNorm").match
    lines = ["#include <stdlib.h>", "int emulated_launch(const char *, void *);"]
    for name in sorted(filter(is_cuda, names)):
        body = "return 0;"
        if is_product(name):
            body = f'emulated_launch("{name}", *handle); return 0;'
        elif "Memcpy" in name or "Memset" in name:
            body = "abort();"
        lines.append(f"int {name}(void **handle) {{ {body} }}")
    return "\n".join(lines)


# --- using


@contextlib.contextmanager
def process(library: Path, gpus: str) -> Iterator[Callable]:
    """Gives `call(function, *args, compute=True)`, which calls a function of a module in a process that has GPUs.

    Args:
        gpus: "capability:GiB" of each, separated by blanks, such as "90:80" for compute capability 9.0.
    """
    before = dict(os.environ)
    os.environ |= {"LD_PRELOAD": str(library), "EMULATED_GPUS": gpus}
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # of these it would hide some
    try:
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _install)
        pool.submit(torch.cuda.is_available).result()
    finally:
        os.environ.clear()
        os.environ |= before
    with pool:
        yield lambda function, *args, compute=True: pool.submit(_call, function, args, compute).result()


def _install() -> None:
    faulthandler.enable()  # if the library ends the process, where
    torch.cuda.CUDAGraph = Graph
    # that this PyTorch has no kernels for it
    warnings.filterwarnings("ignore", message=r"\s*.*(compute|CUDA) capability")


def _call(function: Callable, args, compute: bool):
    with Compute() if compute else contextlib.nullcontext():
        return function(*args)


def num_waits() -> int:
    """How often this process has waited for a GPU."""
    return ctypes.CDLL(LIBRARY).emulated_num_waits()


def violations() -> str:
    """What CUDA does not allow during a capture, and was done in this process: one per line."""
    library = ctypes.CDLL(LIBRARY)
    library.emulated_violations.restype = ctypes.c_char_p
    return library.emulated_violations().decode()


# --- computing


def on_gpu(x) -> bool:
    device = x.device if isinstance(x, torch.Tensor) else x
    return isinstance(device, torch.device) and device.type == "cuda"


def on_host(x):
    """A tensor on a GPU -> one on the CPU in the same memory, which it does not keep alive; a GPU -> the CPU."""
    if not on_gpu(x):
        return x
    if isinstance(x, torch.device):
        return torch.device("cpu")
    storage = x.untyped_storage()
    num_bytes = storage.nbytes()
    memory = torch.empty(0, dtype=torch.uint8)
    if num_bytes:
        memory = torch.frombuffer((ctypes.c_char * num_bytes).from_address(storage.data_ptr()), dtype=torch.uint8)
    return torch.empty(0, dtype=x.dtype).set_(memory.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps):
    results = aten.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    return *results, torch.empty(0)  # cuDNN's own memory


def batch_norm_backward(x, grad, weight, running_mean, running_var, mean, invstd, eps, reserve):
    wanted = [True, True, True]
    return aten.native_batch_norm_backward(grad, x, weight, running_mean, running_var, mean, invstd, True, eps, wanted)


HOST_FUNCTIONS = {
    aten.cudnn_batch_norm.default: batch_norm,
    aten.cudnn_batch_norm_backward.default: batch_norm_backward,
}
NOT_COMPUTED = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
    aten.record_stream, aten.resize_, aten.set_,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_}


def depends_on_data(func, args) -> bool:
    """Whether the host needs a value from the GPU to know the shape of the result or the result itself."""
    if func is aten._local_scalar_dense.default:
        return False  # a copy, which the library does and counts
    if func.overloadpacket in INDEXING:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        is_fill = len(args) > 2 and args[2].numel() == 1 and len(args[1]) == 1
        is_allowed = on_gpu(args[0])  # PyTorch refuses an index on a GPU for a tensor on the CPU
        return bool(masks) and is_allowed and not is_fill
    return not {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}.isdisjoint(func.tags)


class Compute(TorchDispatchMode):
    """Computes what CUDA's kernels would have computed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        gpu_values = list(filter(on_gpu, tree_leaves((args, kwargs))))
        if not gpu_values:
            return func(*args, **kwargs)
        is_capturing = torch.cuda.is_current_stream_capturing()
        if depends_on_data(func, args) and not is_capturing:
            ctypes.CDLL(LIBRARY).emulated_wait()
            result = func(*tree_map(on_host, args), **tree_map(on_host, kwargs))
            if func._schema.is_mutable:
                return args[0]
            device = gpu_values[0].device
            return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, result)
        result = func(*args, **kwargs)  # checks and memory; its kernels do nothing
        if func.is_view or func.overloadpacket in NOT_COMPUTED:
            return result
        operation = tree_map(on_host, (args, kwargs, result))
        if is_capturing:
            Graph.recording.append((func, *operation))
        else:
            compute(func, *operation)
        return result


@torch.no_grad()
def compute(func, args, kwargs, result) -> None:
    """Write what `func` computes on the CPU into `result`."""
    computed = HOST_FUNCTIONS.get(func, func)(*args, **kwargs)
    for old, new in zip(tree_leaves(result), tree_leaves(computed), strict=True):
        # What is empty on the CPU (statistics of BatchNorm that is not training, cuDNN's own memory), nothing reads.
        if isinstance(old, torch.Tensor) and new.numel() and old.data_ptr() != new.data_ptr():
            assert old.shape == new.shape, f"{func}: {old.shape} on a GPU, {new.shape} on the CPU"
            old.copy_(new)


class Graph(torch.cuda.CUDAGraph):
    """A CUDA graph that repeats the operations of its capture, on the memory that they had."""

    num_made = 0
    recording: list

    def capture_begin(self, *args, **kwargs):
        Graph.recording = self.operations = []
        Graph.num_made += 1
        super().capture_begin(*args, **kwargs)

    def replay(self):
        super().replay()
        for operation in self.operations:
            compute(*operation)
