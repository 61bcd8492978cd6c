"""The results of stages that are done again: they are set aside until the new ones are complete.

    ROOT/previous/redo.json                   which stages, and what is being moved or removed at the moment
    ROOT/previous/checkpoints/pretrain/...    their results under their old names (markers of local stages: LOCAL/previous/...)

Of stages whose results lie in the local folder (evaluation, report) the marker alone is set aside. Where such a stage was finished anew,
its files are the new ones: then the earlier marker is removed with the new one, and it has to be done again.

Moving is a second name and the removal of the first: on a disk it costs nothing, in S3 the server copies, and no byte passes this host.
``redo.json`` is written before each move and tells a later driver how to finish one that was interrupted; each can be repeated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from oar_scale.errors import DamagedJson
from oar_scale.registry import Stage, stage_of_name
from oar_scale.run.context import Run
from oar_scale.storage import Missing, open_storage, read_json, write_json
from oar_scale.storage.background import in_order

FOLDER, JOURNAL = "previous", "redo.json"
_THREADS = 16


@dataclass(frozen=True)
class Redo:
    """The content of ``redo.json``: names of stages."""

    stages: tuple[str, ...] = ()
    """That are done again, and whose earlier results are set aside."""
    moving: tuple[str, ...] = ()
    """Whose results are just being set aside."""
    removing: tuple[str, ...] = ()
    """Whose new results are just being removed: they are done again once more, or those of before are put back."""
    put_back: bool = False
    """Whether, then, what is set aside is put back."""
    drop: bool = False
    """Whether what is set aside is just being removed, as the new results are complete."""

    @property
    def interrupted(self) -> bool:
        """Whether a move has begun and not ended."""
        return bool(self.moving or self.removing or self.put_back or self.drop)


def read_redo(run: Run) -> Redo | None:
    """What is set aside; None: nothing is."""
    try:
        stored = read_json(run.at(FOLDER, JOURNAL))
    except Missing:
        return None
    try:
        stages, moving, removing = (tuple(stored[name]) for name in ("stages", "moving", "removing"))
        if unknown := [name for name in (*stages, *moving, *removing) if stage_of_name(name) is None]:
            raise ValueError(f"there is no stage {unknown[0]!r}")
        return Redo(stages, moving, removing, put_back=bool(stored["put_back"]), drop=bool(stored["drop"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedJson(run.at(FOLDER, JOURNAL), f"{error!r}") from error


def results(run: Run, stage: Stage) -> dict[str, int]:
    """The bytes of all objects that a stage has left in the run's storage, without its marker."""
    sizes: dict[str, int] = {}
    for name in stage.outputs:
        output, folder = run.at(name), run.at(name.rpartition("/")[0])
        if output.endswith(".safetensors"):
            sizes |= {uri: size for uri, size in open_storage(folder).sizes(folder).items() if uri == output}
        else:
            sizes |= open_storage(output).sizes(output)
    return sizes


def set_aside(run: Run, again: list[Stage]) -> None:
    """Move what stages have left aside; of those that have something there already, the newer results are removed instead."""
    earlier = read_redo(run) or Redo()
    new = [stage for stage in again if stage.name not in earlier.stages]
    moving = tuple(
        stage.name for stage in new if open_storage(run.marker(stage.name)).exists(run.marker(stage.name)) or results(run, stage)
    )
    removing = tuple(stage.name for stage in again if stage not in new)
    if not moving and not removing:
        return
    _write(run, Redo((*earlier.stages, *moving), moving, removing))
    finish(run)


def put_back(run: Run, redo: Redo) -> None:
    """Remove the new results, and put back those of before."""
    _write(run, Redo(redo.stages, removing=redo.stages, put_back=True))
    finish(run)


def drop(run: Run, redo: Redo) -> None:
    """Remove what is set aside."""
    _write(run, Redo(redo.stages, drop=True))
    finish(run)


def finish(run: Run) -> None:
    """Do what ``redo.json`` says is being done, from the beginning or from where it was interrupted."""
    redo = read_redo(run)
    if redo is None or not redo.interrupted:
        return
    named = {name: stage for name in (*redo.moving, *redo.removing) if (stage := stage_of_name(name))}  # also those of no recipe any more
    stages = named | {stage.name: stage for stage in run.recipe.stages()}
    # Markers go first, the last stage's before those it needs: a kill on the way leaves no finished stage that rests on what is gone.
    for name in reversed(redo.moving):
        _move(run.marker(name), _marker_aside(run, name))
    for name in reversed(redo.removing):
        if stages[name].local and open_storage(run.marker(name)).exists(run.marker(name)):
            _delete([_marker_aside(run, name)])  # the new attempt has written over its files: the earlier ones are to be made again
        _delete([run.marker(name)])
    for name in redo.moving:
        _move_all(run, list(results(run, stages[name])), back=False)
    for name in redo.removing:
        _delete(results(run, stages[name]))
    if redo.put_back:
        _write(run, Redo(redo.stages, put_back=True))  # from here on nothing new is left that could be removed
        _move_all(run, _aside(run), back=True)
        for name in redo.stages:
            _move(_marker_aside(run, name), run.marker(name))
    if redo.drop:
        _delete([*_aside(run), *(_marker_aside(run, name) for name in redo.stages)])
    if redo.put_back or redo.drop:
        _delete([run.at(FOLDER, JOURNAL)])
    else:
        _write(run, Redo(redo.stages))


def _write(run: Run, redo: Redo) -> None:
    write_json(run.at(FOLDER, JOURNAL), vars(redo))


def _aside(run: Run) -> list[str]:
    """All results that are set aside, without markers."""
    own = (run.at(FOLDER, JOURNAL), run.at(FOLDER, "stages") + "/")
    return [uri for uri in open_storage(run.at()).list(run.at(FOLDER)) if not uri.startswith(own)]


def _marker_aside(run: Run, name: str) -> str:
    here = run.marker(name)
    base = run.local() if here.startswith(run.local()) and not here.startswith(run.at()) else run.at()
    return base + f"/{FOLDER}" + here.removeprefix(base)


def _move_all(run: Run, uris: list[str], *, back: bool) -> None:
    root, aside = run.at(), run.at(FOLDER)
    old, new = (aside, root) if back else (root, aside)
    deque(in_order(lambda uri: _move(uri, new + uri.removeprefix(old)), uris, _THREADS), maxlen=0)


def _move(uri: str, target: str) -> None:
    """Move an object; nothing happens if it is absent, as it is when this is done a second time."""
    storage = open_storage(uri)
    try:
        storage.copy(uri, target)
    except Missing:
        return
    storage.delete(uri)


def _delete(uris: Iterable[str]) -> None:
    deque(in_order(lambda uri: open_storage(uri).delete(uri), list(uris), _THREADS), maxlen=0)
