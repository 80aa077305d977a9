"""A training step as one CUDA graph: one launch per step instead of about a thousand."""

import sys

import torch

from utils.errors import OUT_OF_MEMORY, first_line, tell

WARM_UP = 3  # steps in which libraries choose kernels and lazily built state (momentum, meters) gets its memory


class GraphedStep:
    """A TrainStep, captured and replayed after its transform. Same arguments, same arithmetic.

    The first WARM_UP steps of a batch shape run as they are (they are the run's real steps), then one is captured,
    and from then on batches are copied into its static inputs. A batch of another shape, such as the last one of an
    epoch, runs as it is. The learning rate is part of what is captured: when it changes, the step is captured again.
    Everything else that changes between steps lives in tensors (weights, momentum, the losses' buffers, meters, fp16's
    scale) that the graph reads and writes in place. If capturing fails, one line says so and all steps run as they are.
    """

    def __init__(self, step):
        self.step, self.meter, self.objective, self.scaler = step, step.meter, step.objective, step.scaler
        self.captured_lr = None
        self.shapes = None  # of the first batch, the one worth capturing
        self.warm = 0
        self.failed = False
        self.stream = torch.cuda.Stream()

    def __call__(self, images, labels, index, batch_size: int) -> None:
        images, labels = self.step.transform(images, labels)
        shapes = (images.shape, labels.shape)
        self.shapes = self.shapes or shapes
        if self.failed or shapes != self.shapes or self.warm < WARM_UP:
            self.warm += shapes == self.shapes
            self._run(images, labels, index, batch_size)
            return
        lr = self.step.optimizer.param_groups[0]["lr"]
        if lr != self.captured_lr:
            try:
                self._capture((images, labels, index), batch_size)
            except RuntimeError as e:
                if any(text in str(error) for error in (e, e.__context__) for text in OUT_OF_MEMORY):
                    raise
                cause = first_line(e.__context__ or e)  # closing the graph raises another error
                tell(f"note: the step could not be captured ({cause}): running without", sys.stderr)
                self.failed = True
                self._run(images, labels, index, batch_size)
                return
            self.captured_lr = lr
        for static, tensor in zip(self.inputs, (images, labels, index), strict=True):
            static.copy_(tensor)
        self.graph.replay()

    def _run(self, *batch) -> None:
        """The step after its transform, on the stream for capturing, which cannot be the default one."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step.update(*batch)
        torch.cuda.current_stream().wait_stream(self.stream)

    def _capture(self, tensors, batch_size: int) -> None:
        self.graph = None  # frees the old one's memory first
        self.inputs = [t.clone() for t in tensors]
        self.step.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.step.update(*self.inputs, batch_size)
        self.graph = graph
