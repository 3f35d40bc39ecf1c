"""What models are stored in: GGUF files, PowerInfer's among them, and Hugging Face folders, read through one interface (`ModelFile`)."""

from pathlib import Path

from pinfer.formats.errors import FormatError
from pinfer.formats.gguf import GGUFFile
from pinfer.formats.huggingface.folder import CONFIG, HFFolder
from pinfer.formats.model_file import ModelFile, TensorInfo
from pinfer.formats.powerinfer import NeuronMajorFile, is_neuron_major


def open_model(path: str | Path) -> ModelFile:
    """The model at `path`, by what lies there. Raises FileNotFoundError, and FormatError for what is no sound model."""
    path = Path(path)
    if path.is_dir() or path.name == CONFIG:
        return HFFolder.open(path)
    if path.suffix in (".safetensors", ".json") and path.is_file():
        raise FormatError(f"{path}: this is one file of a model; name the folder that it lies in")
    file = GGUFFile.open(path)
    return NeuronMajorFile(file) if is_neuron_major(file) else file


__all__ = ["ModelFile", "TensorInfo", "open_model"]
