"""Publishing all or nothing: a model is written into a folder beside OUT, and one rename puts it there.

The folder, `.OUT.partial`, has one name for each OUT and is locked by the run that uses it. So a second run onto the
same OUT is refused, and the next run after a killed one finds what that left and removes it. The states of a
publication:

====================  ===============================================  ==========================================
state                 what lies where                                  what the next run does after a kill
====================  ===============================================  ==========================================
writing               everything in the folder                         removes the folder
committing            a journal in the folder; data files move to      removes the data files that moved, by the
                      names beside OUT that nothing uses               journal, and the folder
committed             the model's file is at OUT: one os.replace       removes the replaced model's data files, by
                                                                       the journal, and the folder
====================  ===============================================  ==========================================

A model and its data file cannot be renamed together. So a new data file never takes the name of one that exists: it
is called `OUT.data` where that is free, else `OUT.1.data` and so on. Before the rename of the model's file the old
model has its old data, after it the new model has its new data.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from hyperclone_onnx.errors import BadRequest, CannotWrite, HypercloneError
from hyperclone_onnx.publishing.journal import Journal, data_files
from hyperclone_onnx.publishing.locked_folder import LockedFolder, clear, partial_folder, take_folder
from hyperclone_onnx.system.signals import deferred_signals
from hyperclone_onnx.system.stamps import stamp

LARGEST_REFERRING = 256 << 20
"""A model file with its weights elsewhere is smaller than this; a larger one is not read for the names of its data."""

_finished: list[Path] = []
"""The outputs that this command has published."""

_open: list[Path] = []
"""The outputs that are being prepared: a model within a folder is prepared while the folder is."""


def finished() -> Path | None:
    """The output that this command published last, None where there is none. It stays there, whatever happens now."""
    return _finished[-1] if _finished else None


def forget() -> None:
    """Begin a new command: it has published nothing yet."""
    _finished.clear()


# -- names ------------------------------------------------------------------------------------------------


def data_name(path: Path, suffix: str = ".data") -> str:
    """The name of the data file for a model written at `path`.

    For a path that `publication` gave, a name that nothing beside OUT has: ``big.onnx.data``, or ``big.onnx.1.data``
    and so on. For any other path ``big.onnx.data``.
    """
    folder = path.parent
    if folder.name != partial_folder(path).name:
        return f"{path.name}{suffix}"
    pattern = data_files(path.name)
    matches = [pattern.fullmatch(path.name) for path in folder.parent.iterdir()]
    taken = {int(match["number"] or 0) for match in matches if match}
    number = next(n for n in range(len(taken) + 1) if n not in taken)
    return f"{path.name}{f'.{number}' if number else ''}{suffix}"


# -- before anything is written ---------------------------------------------------------------------------


def check_output(out: Path, sources: Iterable[Path]) -> None:
    """Refuse an output that cannot be written or would harm the source.

    Raises:
        BadRequest: OUT is a file of the source, a folder or no file at all (a device), or the source lies where OUT
            is prepared.
        CannotWrite: the folder of OUT does not exist or cannot be written.
    """
    folder = out.parent
    _check_folder(out, folder)
    if out.is_dir():
        raise BadRequest(f"{out}: a folder; name the file to write")
    with suppress(FileNotFoundError):
        mode = out.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise BadRequest(f"{out}: no regular file; choose another output")
    for source in sources:
        if out.resolve() == source or _is_same(out, source):
            raise BadRequest(f"{out}: this would overwrite the source {source}; choose another output")
        if source.is_relative_to(partial_folder(out).resolve()):
            raise BadRequest(f"{out}: the source {source} lies in a folder that is cleared for it; move it elsewhere")
        if source.parent == folder.resolve() and data_files(out.name).fullmatch(source.name):
            raise BadRequest(f"{out}: this would overwrite the source {source}; choose another output")
    if out.with_name(data_name(out)).is_dir():
        raise BadRequest(f"{out}: {data_name(out)} beside it is a folder; choose another output")


def _check_folder(out: Path, folder: Path) -> None:
    if not folder.is_dir():
        raise CannotWrite(f"{out}: its folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise CannotWrite(f"{out}: no permission to write in {folder}")


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths are one file: hard links, and names whose case does not matter, included."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def _reclaim(out: Path, folder: Path) -> None:
    """Complete or undo what a killed run began. This run holds the lock, so the other one is dead."""
    journal = Journal.read(folder)
    if journal is not None:
        journal.settle(out, keep={path.name for path in _data_of(out)})
    clear(folder)


# -- publishing -------------------------------------------------------------------------------------------


@contextmanager
def _place_for(out: Path, *, beside: bool = False) -> Iterator[LockedFolder]:
    """The locked folder for OUT, removed at the end, also after an error.

    A file that goes `beside` a model is no result by itself: publishing it does not count as `finished`.

    Raises:
        CannotWrite: another run has it, or something in the block could not be written.
    """
    place: LockedFolder | None = None
    try:
        with deferred_signals():
            place = take_folder(out)
            if not beside:
                _open.append(out)
            _reclaim(out, place.folder)
        yield place
    except HypercloneError:
        raise
    except OSError as problem:
        where = f": {problem.filename}" if problem.filename else ""
        raise CannotWrite(f"{out}: cannot be written ({problem.strerror or problem}{where})") from problem
    finally:
        with deferred_signals():
            if place is not None:
                if not beside:
                    _open.pop()
                place.remove()


@contextmanager
def publication(out: Path, *, durable: bool | None = None, beside: Mapping[Path, str] | None = None) -> Iterator[Path]:
    """A place to write a model so that OUT appears only when all is right.

    Yields the path to write, in a temporary folder beside OUT and with OUT's own name; its data file is to be called
    `data_name` of that path. When the block ends without an error, the data files and then the model are renamed into
    place; otherwise nothing is left, and OUT is what it was.

    Args:
        out: the file to publish.
        durable: whether to wait until the bytes are on the disk (fsync), so that a power cut cannot lose them. By
            default only where a model is replaced: there is something to lose.
        beside: small files that come with the model, whole texts by path. They are prepared first, and take their
            places right after the model: without the model none of them appears.

    Raises:
        CannotWrite: OUT cannot be written, or another run is writing it; or OUT is written and a file beside it is
            not, which the text says.
    """
    with ExitStack() as stack:
        texts: dict[Path, Path] = {}
        for path, text in (beside or {}).items():
            texts[path] = stack.enter_context(_place_for(path, beside=True)).folder / path.name
            texts[path].write_text(text, encoding="utf-8")
        place = stack.enter_context(_place_for(out))
        yield place.folder / out.name
        _publish(out, place, durable, texts)


def _publish(out: Path, place: LockedFolder, durable: bool | None, texts: Mapping[Path, Path]) -> None:
    folder = place.folder
    model = folder / out.name
    data = [path for path in sorted(folder.iterdir()) if path.is_file() and path != model and path.name[0] != "."]
    if os.path.lexists(out) if durable is None else durable:
        for path in (*data, model):
            _sync(path)
    for path in data:
        if os.path.lexists(out.with_name(path.name)):
            raise CannotWrite(f"{out}: {path.name} beside it has appeared meanwhile; choose another output")
    old = _data_of(out)
    journal = Journal(stamp(model), {path.name: stamp(path) for path in data}, {path.name: stamp(path) for path in old})
    with deferred_signals():
        if data or old:
            journal.write(folder)
        try:
            for path in data:
                path.rename(out.with_name(path.name))
            os.replace(model, out)
        except BaseException:
            place.keep = not journal.settle(out)
            raise
        if len(_open) == 1:
            _finished.append(out)
        place.keep = not journal.settle(out)
        for beside, written in texts.items():
            try:
                os.replace(written, beside)
            except OSError as problem:
                why = f"cannot be written ({problem.strerror or problem})"
                raise CannotWrite(f"{out} is written and complete, but {beside} {why}") from problem
        if durable or old:
            with suppress(OSError):  # OUT is there and whole: a power cut could only take back its name
                _sync(out.parent)


def _data_of(out: Path) -> list[Path]:
    """The data files that the model at OUT refers to, as far as they have names that data files of OUT have."""
    pattern = data_files(out.name)
    named = [path for path in out.parent.iterdir() if pattern.fullmatch(path.name) and path.is_file()]
    if not named or out.is_symlink() or not out.is_file() or out.stat().st_size > LARGEST_REFERRING:
        return []
    import onnx  # here, because every command imports this module, and this takes longer than all the rest of it

    try:
        model = onnx.load(out, load_external_data=False)
    except Exception:  # no model that could be read: it refers to nothing
        return []
    locations = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data}
    return [path for path in named if path.name in locations and not path.is_symlink()]


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; some file systems cannot say."""
    if os.name == "nt":
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(opened)


@contextmanager
def publication_folder(out: Path) -> Iterator[Path]:
    """A folder to fill so that OUT, a folder that does not exist yet or is empty, appears only when all is right.

    Yields a temporary folder beside OUT with OUT's own name. When the block ends without an error it is renamed;
    otherwise nothing is left.

    Raises:
        BadRequest: OUT is a file, or a folder that is not empty.
        CannotWrite: it cannot be written, or another run is writing it.
    """
    target = _folder_target(out)
    with _place_for(target) as place:
        folder = place.folder / target.name
        folder.mkdir()
        yield folder
        for leftover in list(folder.rglob(partial_folder(Path("*")).name)):  # of a model within that left some behind
            shutil.rmtree(leftover)
        with deferred_signals():
            if os.name == "nt" and target.is_dir():
                target.rmdir()
            folder.rename(target)  # an empty folder is replaced; one that holds something makes this an error
            if len(_open) == 1:
                _finished.append(out)


def _folder_target(out: Path) -> Path:
    """The folder that is to appear, by a path that ends in its name."""
    try:
        if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
            raise BadRequest(f"{out}: exists already; name a folder to make")
    except OSError as problem:
        raise CannotWrite(f"{out}: cannot be looked into ({problem.strerror or problem})") from problem
    target = out.resolve() if out.is_symlink() or out.name in ("", "..") else out.parent.resolve() / out.name
    if not target.name:
        raise BadRequest(f"{out}: exists already; name a folder to make")
    _check_folder(out, target.parent)
    return target


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it appears whole or not at all.

    Raises:
        CannotWrite: it cannot be written.
    """
    with publication(path) as written:
        written.write_text(text, encoding="utf-8")
