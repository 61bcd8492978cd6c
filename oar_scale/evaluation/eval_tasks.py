"""The heavy part of an evaluation, cut into tasks that a few processes share.

A task is one model and some images. It carries all it needs as plain values, opens the model itself on the device of its process, and
its result does not depend on the process it runs in or on how many there are: noise and ties are numbered by image.

    likelihood    a few forward passes an image (float32), and the model's own orders by two scores
    sampling      one image for a caption, cell by cell, and what an extractor sees in it (EfficientNet-Lite0)
    edits         completions of some images, and what leaky ones know (``edit_examples``)
    brute force   the confidence order of one image, with and without the cache
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing.queues import SimpleQueue
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oar_scale.config.schema import Score
from oar_scale.data.hashing import derived_seed
from oar_scale.errors import UserError
from oar_scale.evaluation.extractors import ExtractorSpec
from oar_scale.evaluation.features import picture_features
from oar_scale.evaluation.likelihood import nll_table, prediction_table
from oar_scale.evaluation.pictures import decode_pictures
from oar_scale.generation.sampling import generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel, load_model
from oar_scale.orders.analysis import kendall_distance
from oar_scale.orders.extraction import brute_force_orders, extract_orders
from oar_scale.orders.order_files import OrderFiles, folder_files
from oar_scale.orders.policies import OrderRequest, sampling_order
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.registry import ModelName
from oar_scale.runtime.child_process import end_with_parent
from oar_scale.tokenizers.vq import load_vq

Ints = NDArray[np.int64]
Precision = Literal["bf16", "fp32"]
OWN_SCORES: tuple[Score, ...] = ("max_prob", "gt_logprob")
_DEVICE = "OAR_EVALUATION_DEVICE"
T = TypeVar("T")


class EvalTask(Protocol):
    """Some work that can be sent to another process."""

    def run(self) -> object:
        """Do the work on the device of this process."""
        ...


@dataclass(frozen=True)
class EvalTarget:
    """A model and the images or captions it is to work on."""

    model: ModelName
    uri: str
    """Its file, local."""
    cond_inputs_S: NDArray[np.generic]
    """What the model is conditioned on for each, as ``model.condition`` takes it."""
    first: int = 0
    """Number of the first image among all that are evaluated."""

    def open(self, precision: Precision = "fp32") -> AnyOrderModel:
        """Load the model, on the device of this process."""
        return load_model(self.uri).to(here(), torch.bfloat16 if precision == "bf16" else torch.float32)

    @property
    def cond_inputs(self) -> Tensor:
        """:attr:`cond_inputs_S` as a tensor, on the CPU."""
        return torch.from_numpy(self.cond_inputs_S)

    @property
    def images(self) -> Ints:
        """The number of each image."""
        return np.arange(self.first, self.first + len(self.cond_inputs_S))


@dataclass(frozen=True)
class LikelihoodTask:
    """NLL of held-out images."""

    target: EvalTarget
    codes_SN: Ints
    orders: dict[str, Ints]
    """Orders [S, N] to measure, by name."""
    other_cond_inputs_S: NDArray[np.generic] | None = None
    """Captions of other images; measured in random orders where given."""
    own: ExtractionSettings | None = None
    """Also measure along the orders that the model itself finds with these settings, by ``max_prob`` and by ``gt_logprob``, unguided."""
    precision: Precision = "bf16"
    """Of the extraction; the likelihoods themselves are always float32."""

    def run(self) -> Likelihoods:
        """Find the model's own orders where wanted, and measure the likelihood under all orders in float32."""
        codes, cond_inputs = torch.from_numpy(self.codes_SN).to(here()), self.target.cond_inputs
        orders = {name: torch.from_numpy(order) for name, order in self.orders.items()}
        if self.own is not None:
            finder = self.target.open(self.precision)
            condition = condition_of(finder, cond_inputs)
            for score in OWN_SCORES:
                settings = replace(self.own, score=score, guidance=1.0, orders_per_image=1)
                orders[f"own {score}"] = extract_orders(finder, codes, condition, settings, self.target.images).order_BN
        model, batch = self.target.open(), len(codes)
        generated_SN = orders.pop("own max_prob", None)  # measured with its predictions, in one pass
        table = nll_table(model, codes, cond_inputs, orders, batch)
        if generated_SN is not None:
            predictions = prediction_table(model, codes, cond_inputs, generated_SN, batch)
            table |= {"own max_prob": predictions.pop("nll")} | predictions
        if self.other_cond_inputs_S is not None:
            other = nll_table(model, codes, torch.from_numpy(self.other_cond_inputs_S), {"random": orders["random"]}, batch)
            table["shuffled captions"] = other["random"]
        return Likelihoods(self.target.model, self.target.first, {name: nll.numpy() for name, nll in table.items()})


@dataclass(frozen=True)
class Likelihoods:
    """Figures of S images, each [S]: NLL by order, under ``shuffled captions``, and those of ``likelihood.prediction_table``."""

    model: ModelName
    first: int
    nll: dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class SamplingTask:
    """Sample an image for each caption."""

    target: EvalTarget
    vq: str
    settings: SampleSettings
    seed: int
    precision: Precision = "bf16"
    order: str | None = None
    """An order policy; None: the model chooses."""
    files: OrderFiles = field(default_factory=lambda: folder_files(""))
    """What the policy rests on."""
    model_uri: str = ""
    """Where the model's file comes from: its order head lies beside it."""
    features: ExtractorSpec = field(default_factory=ExtractorSpec)
    """What looks at the pictures."""

    def run(self) -> Drawn:
        """Sample the images and compute the features of their pictures."""
        model = self.target.open(self.precision)
        # The seed leaves the model out: all models draw with the same noise.
        seed, images = derived_seed("drawing", self.seed), self.target.images
        request = OrderRequest(model, torch.from_numpy(images), seed, self.files, self.model_uri, self.settings.steps)
        order = sampling_order(self.order, request)
        drawn = generate(model, condition_of(model, self.target.cond_inputs), self.settings, seed, order, images_B=images)
        features_SF = picture_features(decode_pictures(load_vq(self.vq).to(here()), drawn.codes_BN), self.features, here())
        codes_SN, order_SN = (each_BN.cpu().numpy() for each_BN in (drawn.codes_BN, drawn.order_BN))
        return Drawn(self.target.model, self.target.first, codes_SN, order_SN, features_SF)


@dataclass(frozen=True)
class Drawn:
    """Sampled images: codes, the orders they were placed in, and the features of the decoded pictures."""

    model: ModelName
    first: int
    codes_SN: Ints
    order_SN: Ints
    features_SF: NDArray[np.float32]


@dataclass(frozen=True)
class BruteForceTask:
    """Exact extraction against a fresh forward pass for every candidate, both in float32; for score ``info_gain`` by ``max_prob``."""

    target: EvalTarget
    codes_SN: Ints
    stored_SN: NDArray[np.uint16]
    """The orders that the pool extracted, in the recipe's precision."""
    settings: ExtractionSettings
    numbers_S: Ints
    """The images' numbers in the pool, from which random numbers of their orders come."""

    def run(self) -> BruteForce:
        """Find the orders by extraction and by brute force, and compare them."""
        model, codes = self.target.open(), torch.from_numpy(self.codes_SN).to(here())
        condition, numbers_S = condition_of(model, self.target.cond_inputs), self.numbers_S
        exact = found = extract_orders(model, codes, condition, self.settings, numbers_S)
        checked = self.settings
        if checked.score == "info_gain":  # by brute force it would take a pass for each hypothesis and cell
            checked = replace(checked, score="max_prob", orders_per_image=1)
            exact = extract_orders(model, codes, condition, checked, numbers_S)
        brute = brute_force_orders(model, codes, condition, checked, numbers_S)
        differs_SN = exact.order_BN != brute.order_BN
        # Up to its first other cell an image has the same prefix in both, so there the two scores answer the same question.
        gap_SN = (exact.score_BN - brute.score_BN).abs().masked_fill(~differs_SN | (differs_SN.cumsum(1) != 1), 0.0)
        stored = float(kendall_distance(self.stored_SN, found.order_BN.cpu().numpy()).mean())
        return BruteForce(len(codes), int((~differs_SN.any(1)).sum()), float(gap_SN.max()), stored)


@dataclass(frozen=True)
class BruteForce:
    """How exact extraction compares with brute force on some images."""

    images: int
    equal: int
    gap: float
    """Largest difference of scores where the two first choose different cells; 0 when all orders are equal."""
    stored_distance: float
    """Mean Kendall distance of the stored orders to the exact ones."""


@dataclass(frozen=True)
class Results:
    """What the tasks returned, in the order of the tasks."""

    outcomes: Sequence[object]

    def of(self, kind: type[T]) -> list[T]:
        """All outcomes of one kind."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, kind)]


def run_eval_tasks(tasks: Sequence[EvalTask], devices: Sequence[str], threads: int, on_done: Callable[[], None]) -> Results:
    """Run all tasks, in this process or in as many fresh ones as there are devices, of ``threads`` threads each.

    Args:
        devices: that of each process, ``cpu`` or ``cuda:0``; a single ``cpu`` is this process's.

    Raises:
        UserError: a process was killed.
        Exception: whatever a task raises; those that have not begun are then left undone.
    """
    outcomes: list[object] = [None] * len(tasks)
    if list(devices) == ["cpu"]:
        for index, task in enumerate(tasks):
            outcomes[index] = task.run()
            on_done()
    else:
        fresh = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
        given = fresh.SimpleQueue()
        for device in devices:
            given.put(device)
        pool = ProcessPoolExecutor(min(len(devices), len(tasks)), fresh, _start_process, (threads, given))
        try:
            index_of = {pool.submit(_run, task): index for index, task in enumerate(tasks)}
            for future in as_completed(index_of):
                outcomes[index_of[future]] = future.result()
                on_done()
        except BrokenProcessPool as error:
            raise UserError(
                "a process of the evaluation was killed, perhaps for lack of memory: run it again, with fewer parallel.workers if need be"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return Results(outcomes)


def _start_process(threads: int, devices: SimpleQueue[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once; the parent process reports it
    end_with_parent()
    torch.set_num_threads(threads)
    os.environ[_DEVICE] = devices.get()


def here() -> torch.device:
    """The device that this process computes on."""
    return torch.device(os.environ.get(_DEVICE, "cpu"))


def _run(task: EvalTask) -> object:
    return task.run()


@torch.no_grad()
def condition_of(model: AnyOrderModel, cond_inputs_S: Tensor) -> Tensor:
    """What a model that was opened here is conditioned on."""
    return model.condition(cond_inputs_S.to(here()))
