"""What models are stored in: GGUF files and Hugging Face folders, read through one interface (`ModelFile`)."""

from pathlib import Path

from pinfer.formats.gguf import GGUFFile
from pinfer.formats.huggingface.folder import CONFIG, HFFolder
from pinfer.formats.model_file import ModelFile, TensorInfo


def open_model(path: str | Path) -> ModelFile:
    """The model at `path`, by what lies there. Raises FileNotFoundError, and FormatError for what is no sound model."""
    path = Path(path)
    return HFFolder.open(path) if path.is_dir() or path.name == CONFIG else GGUFFile.open(path)


__all__ = ["ModelFile", "TensorInfo", "open_model"]
