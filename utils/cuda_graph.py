"""A training step as one CUDA graph, so that the processor launches one thing a step instead of a thousand."""

import torch

from utils.engine import train_step

WARM_UP = 3  # steps; libraries choose their kernels, lazily built state (momentum, meters) gets its memory


class GraphedStep:
    """`train_step`, captured and replayed. Same arguments, same arithmetic.

    The first WARM_UP steps of a batch shape are run as they are (they are the run's real steps), then one is
    captured, and from then on batches are copied into its static inputs. A batch of another shape, the last one
    of an epoch, is run as it is. The learning rate is part of what is captured: where it has changed, the step is
    captured anew. Everything else that changes between steps lives in tensors (weights, momentum, memory,
    alpha_t, meters) that the graph reads and writes in place.
    """

    def __init__(self):
        self.graph = None
        self.captured = None  # (shape, learning rate) of the graph
        self.shape = None  # of the first batch, the one worth capturing
        self.warm = 0
        self.stream = torch.cuda.Stream()

    def __call__(self, model, objective, optimizer, autocast, meter, images, labels, index, batch) -> None:
        self.shape = self.shape or images.shape
        tensors = (images, labels, index)
        if images.shape != self.shape or self.warm < WARM_UP:
            self.warm += images.shape == self.shape
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # the one to capture on, which cannot be the default one
                train_step(model, objective, optimizer, autocast, meter, *tensors, batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        key = (images.shape, optimizer.param_groups[0]["lr"])
        if key != self.captured:
            self.graph = None  # frees the old one's memory first
            self.inputs = [t.clone() for t in tensors]
            optimizer.zero_grad(set_to_none=True)
            self.graph, self.captured = torch.cuda.CUDAGraph(), key
            with torch.cuda.graph(self.graph, stream=self.stream):
                train_step(model, objective, optimizer, autocast, meter, *self.inputs, batch)
        for static, tensor in zip(self.inputs, tensors, strict=True):
            static.copy_(tensor)
        self.graph.replay()
