"""What orders are worth to train on: a short fine-tuning on the orders of each method, each from the same model, on the same few shards.

Everything happens in a folder of its own that looks like a run's, by the worker that trains runs, in one process without Ray.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from oar_scale.config.locations import escape_location
from oar_scale.data.manifest import ShardInfo, read_manifest, write_manifest
from oar_scale.errors import UserError
from oar_scale.evaluation.distances import Kid, kid
from oar_scale.evaluation.eval_tasks import EvalTarget, LikelihoodTask, SamplingTask
from oar_scale.evaluation.features import picture_features
from oar_scale.evaluation.likelihood import random_orders
from oar_scale.generation.settings import SampleSettings
from oar_scale.json_object import JsonObject
from oar_scale.model import model_id
from oar_scale.orders.order_table import OrderTable, table_name, write_orders
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.results.estimates import estimate
from oar_scale.run.artifacts import prompt_encoder, read_pictures, read_tokens
from oar_scale.run.context import Run
from oar_scale.run.gpu_node import device_here
from oar_scale.runtime.child_process import end_with_parent
from oar_scale.storage import fetch, join, open_storage
from oar_scale.tokenizers.prompts import cond_inputs_of
from oar_scale.training.job import TrainingJob

OWN_TABLES = {"order": None, "orders_of": "own", "distinct_orders": None, "any_view_share": None}
"""Fields of ``finetune`` with which each image follows its own order of the tables, whatever the recipe's fine-tuning follows: in the one
view that has some there, also where all of the run's views have orders."""


@dataclass(frozen=True)
class TrainingOutcome:
    """The quality of a model that was trained on the orders of one method."""

    nll_own_S: NDArray[np.float64]
    """Nats per code of each held-out image along the model's own ``max_prob`` order, the one that it generates in."""
    nll_random_S: NDArray[np.float64]
    families_S: NDArray[np.int64]
    """The same number for images of one family, which count as one to the standard errors."""
    kid: Kid

    def figures(self, exact: TrainingOutcome) -> JsonObject:
        """Means, and differences to what came of the exact orders: the images are the same, so their differences are paired."""
        figures: JsonObject = {"kid_efflite0": self.kid.mean, "kid_efflite0_std": self.kid.std}
        pairs = {"own_max_prob": (self.nll_own_S, exact.nll_own_S), "random": (self.nll_random_S, exact.nll_random_S)}
        for name, (here_S, exact_S) in pairs.items():
            figures[f"heldout_nll_{name}"] = asdict(estimate(here_S, self.families_S))
            figures[f"heldout_nll_{name}_above_exact"] = asdict(estimate(here_S - exact_S, self.families_S))
        return figures


class ShortTraining:
    """Fine-tunes a run's any-order model on given orders of its first shards, and returns the results."""

    def __init__(self, run: Run, model_file: str, shards: Sequence[ShardInfo], keys: Sequence[str], steps: int, folder: str) -> None:
        """
        Args:
            shards: of the training images.
            keys: of all their samples.
            folder: an empty local folder.
        """
        self.run, self.model_file, self.shards, self.keys, self.folder = run, model_file, shards, list(keys), folder
        recipe = run.recipe
        short = {
            "steps": steps,
            "warmup_steps": max(1, steps // 10),
            "evaluate_every": steps,
            "evaluate_orders": ("random",),
            "sample_every": 0,
            "checkpoint_every": steps,
            "mix": (),
            **OWN_TABLES,
        }
        self.recipe = recipe.model_copy(
            update={
                "finetune": recipe.finetune.model_copy(update=short),
                "extract": recipe.extract.model_copy(update={"views": 1, "mirror": False}),
                "parallel": recipe.parallel.model_copy(update={"workers": 1}),
                "storage": recipe.storage.model_copy(update={"cache_dir": escape_location(run.cache), "scratch_dir": None}),
            }
        )
        self._copy_inputs()
        prompts, evaluate = prompt_encoder(run), recipe.evaluate
        heldout = read_tokens(run, "heldout", max(evaluate.nll_images, evaluate.feature_images), prompts.field)
        device = device_here(recipe.parallel.gpus_per_worker > 0)
        self.codes_SN, self.families_S = heldout.codes_SN, heldout.families_S
        self.cond_inputs_S = cond_inputs_of(prompts, heldout.prompts, device).numpy()
        self.drawn = min(evaluate.feature_images, len(heldout.keys))
        pictures = read_pictures(run, "heldout", heldout.keys[: self.drawn])
        self.reference_SF = picture_features(pictures)

    def __call__(self, order_SN: NDArray[np.integer]) -> TrainingOutcome:
        """Train on these orders of the samples; the likelihoods of held-out images, and the distance of drawings to them."""
        with tempfile.TemporaryDirectory(dir=self.folder) as root:  # of its own: no training goes on from another's checkpoint
            for name in ("tokens", "tokenizers"):
                os.symlink(join(self.folder, name), join(root, name))
            self._write_tables(order_SN.astype(np.uint16), join(root, "orders", "train"))
            result = join(root, "ordered.safetensors")
            self._train(TrainingJob(self.recipe, "finetune", root, root, self.model_file, result), len(order_SN))
            return self._value(result)

    def _train(self, job: TrainingJob, images: int) -> None:
        worker = multiprocessing.get_context("spawn").Process(target=_train, args=(job,))
        worker.start()
        worker.join()
        if worker.exitcode:
            raise UserError(f"the training on {images} orders ended with exit code {worker.exitcode}; its error is printed above.")

    def _copy_inputs(self) -> None:
        for split in ("train", "heldout"):
            source = self.run.at("tokens", split)
            manifest = read_manifest(source)
            shards = tuple(self.shards) if split == "train" else manifest.shards
            for shard in shards:
                self._copy(join(source, shard.name), "tokens", split, shard.name)
            write_manifest(join(self.folder, "tokens", split), manifest.model_copy(update={"shards": shards}))
        tokenizers = self.run.at("tokenizers")
        for uri in open_storage(tokenizers).list(tokenizers):
            self._copy(uri, "tokenizers", uri.rpartition("/")[2])

    def _copy(self, uri: str, *names: str) -> None:
        target = join(self.folder, *names)
        open_storage(target).write(target, open_storage(uri).read(uri))

    def _write_tables(self, order_SN: NDArray[np.uint16], folder: str) -> None:
        start = 0
        for shard in self.shards:
            part = slice(start, start + shard.samples)
            keys, start = self.keys[part], part.stop
            table = OrderTable(
                keys, [0] * len(keys), order_SN[part], np.zeros(order_SN[part].shape, np.float32), model_id(self.model_file), "comparison"
            )
            write_orders(join(folder, table_name(shard.name)), table)

    def _value(self, model_file: str) -> TrainingOutcome:
        recipe, run = self.run.recipe, self.run
        count, cells = min(recipe.evaluate.nll_images, len(self.codes_SN)), self.codes_SN.shape[1]
        orders = {"random": random_orders(count, cells, recipe.seed).numpy()}
        own = ExtractionSettings(tie_seed=recipe.extract.tie_seed)
        target = EvalTarget("ordered", model_file, self.cond_inputs_S[:count])
        nll = LikelihoodTask(target, self.codes_SN[:count], orders, own=own, precision=recipe.parallel.precision).run().nll
        drawing = SamplingTask(
            EvalTarget("ordered", model_file, self.cond_inputs_S[: self.drawn]),
            fetch(run.vq_uri, run.cache),
            SampleSettings.from_recipe(recipe.sample),
            recipe.seed,
            recipe.parallel.precision,
        )
        distance = kid(drawing.run().features_SF, self.reference_SF, paired=True, seed=recipe.seed)
        return TrainingOutcome(nll["own max_prob"], nll["random"], self.families_S[:count], distance)


def _train(job: TrainingJob) -> None:
    """Runs in a process of its own, which is the only worker."""
    end_with_parent()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    from oar_scale.distributed.worker import train

    train(job)
