"""Held-out images under fixed orders: what a model in training is judged by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oar_scale.data.hashing import permutations
from oar_scale.data.manifest import read_manifest
from oar_scale.data.shards import read_token_shard
from oar_scale.model import AnyOrderModel, load_model
from oar_scale.orders.extraction import extract_orders
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.storage import join
from oar_scale.tokenizers.prompts import PromptEncoder, check_features, conditioning_inputs
from oar_scale.training.job import TrainingJob
from oar_scale.training.process import TrainingProcess

HELDOUT_IMAGES = 256


class HeldoutImages:
    """Held-out negative log-likelihood under fixed orders, each rank its share of the images.

    Attributes:
        orders: ``nll_random``, ``nll_raster``, ``nll_stored`` -> the order of each of this rank's images [S, N].
        captions: all of the images' captions, this rank's or not.
    """

    def __init__(self, job: TrainingJob, prompts: PromptEncoder, process: TrainingProcess) -> None:
        """Read the run's held-out images. Raises UserError where their prompts are not those of ``prompts``."""
        rank, world, device = process.rank, process.world, process.device
        folder = join(job.root, "tokens", "heldout")
        manifest = read_manifest(folder)
        check_features(manifest.features, prompts, folder)
        shards = [read_token_shard(join(folder, shard.name), job.cache, shard) for shard in manifest.shards]
        codes = torch.cat([torch.from_numpy(shard.view(0).astype("int64")) for shard in shards])[:HELDOUT_IMAGES]
        encoded_prompts = prompts.encode([prompt for shard in shards for prompt in shard.prompts(prompts.field)][:HELDOUT_IMAGES])
        self.captions = [caption for shard in shards for caption in shard.captions][:HELDOUT_IMAGES]
        self.prompts, self._process = prompts, process
        # A rank without images computes with another rank's: under ZeRO-3 each forward pass is collective.
        self._counts = rank < len(codes)
        mine = torch.arange(len(codes))[rank::world] if self._counts else torch.tensor([rank % len(codes)])
        self._share = -(-len(codes) // world)
        self._codes, self.encoded_prompts = (t[mine].to(device) for t in (codes, encoded_prompts))
        raster = torch.arange(codes.shape[1], device=device).expand_as(self._codes)
        makers: dict[str, Callable[[], Tensor]] = {
            "random": lambda: torch.from_numpy(permutations("heldout order", codes.shape[1], mine.numpy())).to(device),
            "raster": lambda: raster,
            "stored": lambda: self._preferred(job, mine, device),
        }
        # Random ones always: averages, the best checkpoints and whoever watches are judged by them.
        wanted = ("raster",) if job.recipe.model.layout == "raster" else tuple(dict.fromkeys(("random", *job.training.evaluate_orders)))
        # A raster model's only order goes by the name that every other part of a run looks for.
        names = {"raster": "nll_random"} if job.recipe.model.layout == "raster" else {name: f"nll_{name}" for name in wanted}
        self.orders = {names[name]: makers[name]() for name in wanted}

    @torch.no_grad()
    def nll(self, model: AnyOrderModel, order: str = "nll_random", batch: int = 64) -> float:
        """Return the mean negative log-likelihood in nats per code over all ranks' images. Collective.

        Args:
            order: a name of ``orders``.
        """
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self._codes.device)
        for start in range(0, self._share, batch):  # as many rounds on every rank
            counts = self._counts and start < len(self._codes)
            part = slice(start, start + batch) if counts else slice(0, 1)
            condition_bTD = model.condition(conditioning_inputs(self.prompts, self.encoded_prompts[part], model.dtype))
            nll_bN = model.nll(self._codes[part], self.orders[order][part], condition_bTD).double()
            if counts:
                total += torch.stack([nll_bN.sum(), nll_bN.new_tensor(nll_bN.numel())])
        self._process.all_reduce(total)
        return float(total[0] / total[1])

    def _preferred(self, job: TrainingJob, mine: Tensor, device: torch.device, batch: int = 64) -> Tensor:
        """The orders that the stage's first model prefers for this rank's images, extracted as those of the training images were."""
        model = load_model(job.start_from).to(device)
        settings = ExtractionSettings.from_recipe(job.recipe.extract)
        batches = []
        for start in range(0, len(self._codes), batch):
            part = slice(start, start + batch)
            condition_bTD = model.condition(conditioning_inputs(self.prompts, self.encoded_prompts[part], model.dtype))
            orders = extract_orders(model, self._codes[part], condition_bTD, settings, mine[part].numpy())
            batches.append(orders.order_BN.long())
        return torch.cat(batches).to(device)
