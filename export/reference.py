"""The reference: the stock transformers model in float32, one text at a time, without padding.

This is what every engine is measured against, so it shares no code with the exported encoder or with the runtime's
tokenizer: tokenization by transformers, the model by transformers, pooling and normalization from their definitions.
The only file of the product that imports torch and transformers.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from export.hub import Location
from runtime.errors import CheckpointError, is_out_of_memory, missing_extra


class ReferenceVectors(Protocol):
    """What a comparison needs of the reference: `Reference` computes it, `export.recorded` remembers it."""

    location: Location
    versions: dict[str, str]

    def tokenize(self, text: str, max_tokens: int) -> list[int]:
        """Return the ids of a rendered text."""
        ...

    def hidden(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the hidden states of one text, float32 [tokens, dim]."""
        ...

    def embed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the vector of one text, float32 [dim]."""
        ...

    def layer_states(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the last token's states, float32 [layers + 1, dim]."""
        ...


def reference_versions() -> dict[str, str]:
    """Return the versions of what computes the reference, without importing it. Raises MissingExtraError."""
    try:
        return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    except importlib.metadata.PackageNotFoundError as error:
        raise missing_extra(str(error.name), "export") from error


class Reference:
    """A checkpoint as its authors' library runs it."""

    def __init__(self, location: Location) -> None:
        """Load tokenizer and model in float32 (four bytes a parameter in memory).

        Raises MissingExtraError without torch or transformers, CheckpointError when transformers cannot load the
        folder or would leave a weight at random.
        """
        try:
            import torch
            import transformers
        except ImportError as error:
            raise missing_extra(str(error.name), "export") from error
        folder = location.folder
        self.location = location
        self._torch = torch
        self.versions = reference_versions()
        try:
            with _quiet():
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
                self._model, info = transformers.AutoModel.from_pretrained(
                    folder, dtype=torch.float32, output_loading_info=True
                )
        except Exception as error:  # transformers raises whatever its parts raise
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"transformers {transformers.__version__} cannot load {folder}: {error}",
                cure="The reference needs a checkpoint that the stock library opens.",
            ) from error
        if info["missing_keys"]:
            raise CheckpointError(
                f"transformers found no values for {len(info['missing_keys'])} weights of {folder}, the first is "
                f"{sorted(info['missing_keys'])[0]}.",
                cure="Download the checkpoint again.",
            )
        self._model.eval()

    def tokenize(self, text: str, max_tokens: int) -> list[int]:
        """Return the ids of a rendered text (prompt included), truncated to `max_tokens` by transformers itself."""
        ids: list[int] = self._tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
        return ids

    def hidden(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the final-norm hidden states of one text, float32 [tokens, dim]."""
        with self._torch.inference_mode():
            output = self._model(input_ids=self._torch.tensor([list(ids)]))
        states: NDArray[np.float32] = output.last_hidden_state[0].numpy()
        return states

    def embed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the vector of one text, float32 [dim]: the last token's hidden state divided by its length."""
        return unit(self.hidden(ids)[-1])

    def layer_states(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the last token's state after the embedding and each layer, float32 [layers + 1, dim].

        The last one is the final norm's output: transformers does not give the last layer's own.
        """
        with self._torch.inference_mode():
            output = self._model(input_ids=self._torch.tensor([list(ids)]), output_hidden_states=True)
        states: NDArray[np.float32] = self._torch.stack([state[0, -1] for state in output.hidden_states]).numpy()
        return states


def unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """Divide a vector by its Euclidean length, in float64, and round once."""
    wide = vector.astype(np.float64)
    scaled: NDArray[np.float32] = (wide / np.sqrt((wide * wide).sum())).astype(np.float32)
    return scaled


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice out of our output; its errors still come through."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
