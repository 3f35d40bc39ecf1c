"""Folders of every family, made once, and what tests of folders share."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from pinfer.formats import open_model
from pinfer.formats.errors import FormatError
from pinfer.formats.model_config import check_tensors, model_config
from tests.hf_models import make_folder

IDS = [1, 17, 300, 42, 42, 260, 99, 401, 7, 311, 28, 133, 8, 9, 10, 11]
_FOLDERS = TemporaryDirectory(prefix="folders-")  # gone with the interpreter


@cache
def folder_of(name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A family's folder, to be read alone."""
    return make_folder(name, Path(_FOLDERS.name) / str(dtype) / name, dtype=dtype)


def refused(folder: Path, *said: str) -> str:
    """The one typed error of a folder, which names what `said` names."""
    with pytest.raises(FormatError) as caught, open_model(folder) as file:
        check_tensors(file, model_config(file))
    text = str(caught.value)
    for one in said:
        assert one in text, text
    assert "\n" not in text
    return text


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
