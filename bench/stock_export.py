"""What a user gets from `torch.onnx.export` on the stock transformers model: the graphs that ours is compared with.

Runs in a process of its own, since an export leaves memory and warnings behind: python -m bench.stock_export
CHECKPOINT FOLDER KIND. Writes FOLDER/model.onnx and, by the default exporter, FOLDER/model.onnx.data.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

KINDS = {
    "dynamic": "the default exporter, dynamic batch and sequence",
    "legacy": "the exporter before it (dynamo=False) with position_ids as an input, which Optimum still uses",
    "half": "the same of a model in float16",
    "past": "with keys and values of earlier tokens as inputs, as files for browsers have them",
    "fixed": "the default exporter without dynamic shapes",
}


def export_stock(checkpoint: Path, folder: Path, kind: str = "dynamic") -> Path:
    """Export `checkpoint` to `folder` in another process and return `folder`. Raises RuntimeError with its words."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "bench.stock_export",
        str(checkpoint.absolute()),
        str(folder),
        kind,
    ]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"torch.onnx.export ({kind}) failed:\n{done.stderr[-2000:]}")
    return folder


def _export(checkpoint: Path, folder: Path, kind: str) -> None:
    import torch
    from transformers import AutoModel, DynamicCache

    dtype = torch.float16 if kind == "half" else torch.float32
    loaded: Any = AutoModel.from_pretrained(checkpoint, dtype=dtype)
    model = loaded.eval()
    config = model.config
    ids = torch.ones((2, 16), dtype=torch.int64)
    names = [f"{i}.{side}" for i in range(config.num_hidden_layers) for side in ("key", "value")]

    class Hidden(torch.nn.Module):
        """Hidden states alone: the legacy exporter cannot name the fields of a model output."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, third: Any) -> Any:
            return self.model(input_ids, attention_mask, third, use_cache=False).last_hidden_state

    class WithPast(Hidden):
        """Hidden states, and keys and values out and in."""

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, third: Any) -> Any:
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(third):
                cache.update(keys, values, layer)
            output = self.model(input_ids, attention_mask, past_key_values=cache, use_cache=True)
            present = [t for layer in output.past_key_values.layers for t in (layer.keys, layer.values)]
            return output.last_hidden_state, *present

    kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    axes: dict[str, Any] = {name: {0: "batch", 1: "sequence"} for name in kwargs}
    options: dict[str, Any] = {"input_names": list(kwargs), "output_names": ["last_hidden_state"]}
    target, module = str(folder / "model.onnx"), model
    folder.mkdir(parents=True, exist_ok=True)
    if kind in ("legacy", "half"):
        kwargs["position_ids"] = torch.arange(16).expand(2, 16)
        axes |= {name: {0: "batch", 1: "sequence"} for name in ("position_ids", "last_hidden_state")}
        options["input_names"].append("position_ids")
        arguments = tuple(kwargs.values())
        torch.onnx.export(Hidden().eval(), arguments, target, dynamo=False, dynamic_axes=axes, **options)
        return
    if kind == "past":
        size = (2, config.num_key_value_heads, 3, config.head_dim)
        kwargs["attention_mask"] = torch.ones((2, 3 + 16), dtype=torch.int64)
        kwargs["third"] = tuple((torch.ones(size), torch.ones(size)) for _ in range(config.num_hidden_layers))
        axes["attention_mask"] = {0: "batch", 1: "total"}
        axes["third"] = tuple(({0: "batch", 2: "past"},) * 2 for _ in range(config.num_hidden_layers))
        options["input_names"] += [f"past_key_values.{name}" for name in names]
        options["output_names"] += [f"present.{name}" for name in names]
        module = WithPast().eval()
    else:
        model.config.use_cache = False
    torch.onnx.export(
        module,
        (),
        target,
        kwargs=kwargs,
        dynamo=True,
        dynamic_shapes=None if kind == "fixed" else axes,
        external_data=True,
        verbose=False,
        **options,
    )


if __name__ == "__main__":
    _export(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
