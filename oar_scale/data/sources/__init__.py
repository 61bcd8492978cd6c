"""Where captioned images come from. A source is one file here and one line in :func:`open_source`.

What each of them implements is in :mod:`oar_scale.data.sources.source`, so that no source imports this registry.
"""

from __future__ import annotations

from collections.abc import Callable

from oar_scale.config.schema import Source
from oar_scale.data.sources.source import BadImage, Content, ImageSource, SourceImage


def open_source(config: Source) -> ImageSource:
    """The source a recipe names. Raises UserError where it is not there."""
    from oar_scale.data.sources.class_folders import ClassFolderImages
    from oar_scale.data.sources.folder import FolderImages
    from oar_scale.data.sources.openmoji import OpenMojiImages
    from oar_scale.data.sources.table import TableImages
    from oar_scale.data.sources.webdataset import WebDatasetImages

    sources: dict[str, Callable[..., ImageSource]] = {
        "openmoji": OpenMojiImages,
        "folder": FolderImages,
        "table": TableImages,
        "class_folders": ClassFolderImages,
        "webdataset": WebDatasetImages,
    }
    return sources[config.type](config)


__all__ = ["BadImage", "Content", "ImageSource", "SourceImage", "open_source"]
