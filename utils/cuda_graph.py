"""A training step as one CUDA graph: one launch per step instead of about a thousand."""

import math
import sys

import torch

from utils.compile import FirstShape
from utils.errors import first_line, is_out_of_memory, tell

WARM_UP = 3  # steps in which libraries choose kernels and lazily built state (momentum, meters) gets its memory


class GraphedStep:
    """A TrainStep, captured and replayed after its transform. Same arguments, same arithmetic.

    The first WARM_UP steps of the first batch's shape run as they are (they are the run's real steps), then one is
    captured, and from then on batches are copied into its static inputs. The learning rate is part of what is captured:
    when it changes, the step is captured again. Everything else that changes between steps lives in tensors (weights,
    momentum, the losses' buffers, meters, fp16's scale) that the graph reads and writes in place. If capturing fails,
    one line says so and all steps run as they are.
    """

    def __init__(self, step):
        self.step, self.meter, self.objective, self.scaler = step, step.meter, step.objective, step.scaler
        self.has_first_shape = FirstShape()
        self.num_before = WARM_UP  # steps to run before one is captured; infinite where capturing failed
        self.captured_lr = None
        self.stream = torch.cuda.Stream()

    def __call__(self, images, labels, index, batch_size: int) -> None:
        images, labels = self.step.transform(images, labels)
        batch = (images, labels, index)
        if self.has_first_shape((images.shape, labels.shape)) and self._is_captured(batch, batch_size):
            for static, tensor in zip(self.inputs, batch, strict=True):
                static.copy_(tensor)
            self.graph.replay()
        else:
            self._run(*batch, batch_size)

    def _is_captured(self, batch, batch_size: int) -> bool:
        """Whether there is a graph for the present learning rate; makes it when it is time."""
        if self.num_before > 0:
            self.num_before -= 1
            return False
        lr = self.step.optimizer.param_groups[0]["lr"]
        if lr != self.captured_lr:
            try:
                self._capture(batch, batch_size)
            except RuntimeError as e:
                if is_out_of_memory(e):
                    raise
                cause = first_line(e.__context__ or e)  # closing the graph raises another error
                tell(f"note: the step could not be captured ({cause}): running without", sys.stderr)
                self.num_before = math.inf
                return False
            self.captured_lr = lr
        return True

    def _run(self, *batch) -> None:
        """The step after its transform, on the stream for capturing, which cannot be the default one."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step.update(*batch)
        torch.cuda.current_stream().wait_stream(self.stream)

    def _capture(self, tensors, batch_size: int) -> None:
        self.graph = None  # frees the old one's memory first
        self.inputs = [t.clone() for t in tensors]
        self.step.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.step.update(*self.inputs, batch_size)
        self.graph = graph
