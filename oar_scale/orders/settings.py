"""The settings that an extracted order depends on, besides the model and the image."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from oar_scale.config.fingerprint import fingerprint
from oar_scale.config.schema import ExtractConfig, FirstCell, Score


@dataclass(frozen=True)
class ExtractionSettings:
    """The part of a recipe's ``extract`` section that changes an order; each field is explained in
    :class:`~oar_scale.config.schema.ExtractConfig`.

    Raises:
        ValueError: settings that contradict each other.
    """

    score: Score = "max_prob"
    guidance: float = 1.0
    tie_seed: int = 0
    order_temperature: float = 0.0
    orders_per_image: int = 1
    first_cell: FirstCell = "free"
    commit_per_step: int = 1
    cosine_steps: int | None = None
    info_gain_samples: int = 4
    info_gain_candidates: int | None = None

    def __post_init__(self) -> None:
        ExtractConfig.model_validate(dataclasses.asdict(self))

    @classmethod
    def from_recipe(cls, config: ExtractConfig) -> ExtractionSettings:
        """The settings of a recipe's ``extract`` section."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    @property
    def id(self) -> str:
        """Name of these settings in order tables: 16 hex digits.

        The first three fields are always part of the hash. Fields that were added later count only where they are not at their
        defaults, so that tables written before there was such a field keep their name.
        """
        named: dict[str, object] = {"method": "exact", "score": self.score, "guidance": self.guidance, "tie_seed": self.tie_seed}
        later = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in named}
        return fingerprint(named | {name: value for name, value in later.items() if value != getattr(type(self), name)})
