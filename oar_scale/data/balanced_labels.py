"""The labels of a sample of images that is compared with a data set: of each class as many, in an order that a seed decides about.

Published distances on ImageNet rest on 50,000 images, 50 of each of 1000 classes (or of classes at random).
"""

from __future__ import annotations

import numpy as np

from oar_scale.data.prompt_files import GivenPrompt
from oar_scale.errors import UserError


def balanced_labels(classes: int, images: int, seed: int) -> list[GivenPrompt]:
    """Prompts of ``images`` pictures, numbered from 0: each label as often as every other.

    The seed decides about the order of the labels, and about the noise of the pictures. Consecutive pictures are of all classes, so
    any part of them is about as varied as the whole.

    Raises:
        UserError: the images cannot be shared out evenly.
    """
    if images % classes:
        fit = max(1, round(images / classes)) * classes
        raise UserError(f"--images {images}: not a multiple of the model's {classes} classes. Nearest that is: {fit}.")
    labels = np.random.default_rng([seed % 2**64, 50_000]).permutation(np.repeat(np.arange(classes), images // classes))
    return [GivenPrompt(str(label), number, seed, f"picture {number}") for number, label in enumerate(labels.tolist())]
