"""GPU memory, on emulated GPUs: a GPU that trains a network can also evaluate it."""

import gc

import numpy as np
import pytest
import torch

import main
from data import loader
from data.readers import Split
from loss import build_objective
from models import MODELS, build_model
from utils import engine
from utils.records import DataRecord

pytestmark = pytest.mark.slow

ALL = "--PSKD --BYOT --DML"


def memory(words: str) -> tuple[int, int]:
    """The most bytes that training and then evaluation hold, at full width; nothing is computed."""
    args = main.parse_args(["--data_type", "synthetic", *words.split()])
    device = torch.device(args.device)

    def images(num, **training):
        split = Split(np.zeros((num, 32, 32, 3), np.uint8), np.zeros(num, np.int64))
        record = DataRecord(["a"] * 100, [0.5] * 3, [0.25] * 3, {})
        return loader.Loader(split, record, 32, device, **training)

    gc.collect()
    torch.cuda.empty_cache()
    with device:
        model = build_model(args, 100).to(memory_format=torch.channels_last)
        objective = build_objective(args, 50_000, 100)
    step = engine.TrainStep(model, objective, engine.build_optimizer(args, model), device, args.precision)
    torch.cuda.reset_peak_memory_stats(device)
    engine.train_one_epoch(step, images(3 * 128 + 80, augmentation="crop"))
    training = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    engine.predict(model, images(10_000), args.precision)
    return training, torch.cuda.max_memory_allocated(device)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("network", MODELS)
def test_evaluation_holds_no_more_memory_than_training(network, precision, gpu):
    words = f"{ALL} --device cuda:0 --classifier_type {network} --precision {precision}"
    training, evaluation = gpu(memory, words, compute=False)
    assert evaluation <= training


@pytest.mark.parametrize("network", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_the_paper_s_networks_train_and_evaluate_in_8_gib(network, gpu):
    words = f"{ALL} --device cuda:3 --classifier_type {network} --precision fp32"
    gpu(memory, words, compute=False)
