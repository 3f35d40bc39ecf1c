"""From a model file's metadata to a `ModelConfig`, and the check that its tensors fit it.

Key names, defaults and conventions follow llama.cpp's loaders of the same architectures, and
PowerInfer's for opt and bamboo. What would change the result and is not implemented (shared experts,
attention to later tokens) is an error, never ignored.
"""

from pinfer.formats.model_config.families import READERS, model_config
from pinfer.formats.model_config.tensors import check_tensors, expected_tensors, optional_tensors

__all__ = ["READERS", "check_tensors", "expected_tensors", "model_config", "optional_tensors"]
