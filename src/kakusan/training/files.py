"""Files that are written whole or not at all, and errors that name the file.

A file or folder is first written beside its place under a name that starts with a dot, forced to
the disk, and then renamed; a process killed at any instant leaves the old file or the new one. A
folder that is replaced is first removed, so names of folders should be new.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from kakusan.errors import KakusanError


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary place to write to, which becomes `path` (a file or a folder) at the end.

    Arguments:
        path: The final place; what stands there is replaced.

    Raises:
        KakusanError: If the disk is full or the place cannot be written; nothing is left behind.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        for part in (*draft.rglob("*"), draft) if draft.is_dir() else (draft,):
            _sync(part)
        if draft.is_dir() and path.exists():
            shutil.rmtree(path)
        os.replace(draft, path)
        _sync(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise said(error, path) from error
    finally:
        with contextlib.suppress(OSError):  # the error that matters is on its way already
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink(missing_ok=True)


def said(error: Exception, path: Path) -> KakusanError:
    """What went wrong when writing a file, as a sentence."""
    code = getattr(error, "errno", None)
    # the safetensors library wraps the system's error and keeps only its words
    if code == errno.ENOSPC or "No space left" in str(error) or "os error 28" in str(error):
        return KakusanError(
            f"no space left on the disk while writing {path}; what was there before is untouched: "
            "free some space and run the command again"
        )
    return KakusanError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    with whole(path) as draft:
        draft.write_text(json.dumps(value, indent=2) + "\n")


def write_table(path: Path, table: Any) -> Path:
    """Writes a pyarrow table as .csv or, by any other ending, as Parquet; whole or not at all."""
    import pyarrow.csv
    import pyarrow.parquet

    with whole(path) as draft, draft.open("wb") as handle:
        if path.suffix.lower() == ".csv":
            pyarrow.csv.write_csv(table, handle)
        else:
            pyarrow.parquet.write_table(table, handle)
    return path


def write_tensors(
    path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None
) -> None:
    """Writes tensors as safetensors with words beside them, whole or not at all."""
    with whole(path) as draft:
        save_tensors(draft, tensors, header)


def save_tensors(
    path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None
) -> None:
    """Writes tensors in place; for use inside `whole`."""
    own = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    path.touch()
    usual = path.stat().st_mode
    safetensors.torch.save_file(own, path, header)
    path.chmod(usual)  # the library's files are their owner's alone


def read_json(path: Path) -> Any:
    """Reads JSON; a missing or damaged file is named."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise KakusanError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise KakusanError(f"{path} is damaged or unreadable: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads safetensors; a missing or damaged file is named."""
    if not path.is_file():
        raise KakusanError(f"{path} is missing")
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise KakusanError(f"{path} is damaged or unreadable: {error}") from None


def checksum(path: Path) -> int:
    """The CRC-32 of a file: finds damage, not malice."""
    crc = 0
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc
