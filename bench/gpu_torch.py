"""The torch side of the GPU check: a Qwen3 encoder as a torch user would write it for speed, and its clock.

Needs torch and numpy alone, so that it runs where nothing of f2rt is installed. Attention is torch's own
scaled_dot_product_attention, causal and grouped, without a mask (right padding needs none); then last-token pooling and
normalization. It does less than transformers does for the same vectors, so it is the harder baseline. The tests compare
it with transformers.

    python -m bench.gpu_torch --size 0.6B --dtype float16 --mode compiled --seconds 60

prints one line of JSON for each batch shape. `--prepare` runs every shape once instead: what torch compiles is then in
its cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

ROWS, TOKENS = (1, 8, 64), (32, 128, 512)
SHAPES = [(rows, tokens) for rows in ROWS for tokens in TOKENS]
MODES = ("eager", "compiled")
DTYPES = ("float16", "bfloat16")
_SAME = 0.9999  # cosine of a replayed and a plain run
_WARM_RUNS, _WARM_S = 3, 0.3
_LEAST, _MOST, MOST_S = 5, 300, 1.5  # timed runs, and their time for one shape

Run = Callable[[NDArray[np.int64]], NDArray[np.float32]]
Task = Callable[[Run, int, int, int, float], dict[str, Any]]


@dataclass(frozen=True)
class Encoder:
    """The shape of an encoder; the same numbers as export.synth's, which a test compares."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    head_dim: int = 128

    @property
    def parameters(self) -> int:
        """Number of weights."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = self.hidden * (2 * q + 2 * kv + 3 * self.mlp + 2) + 2 * self.head_dim
        return self.vocabulary * self.hidden + self.layers * layer + self.hidden


SIZES = {
    "mini": Encoder(16_000, 256, 4, 4, 2, 320),
    "0.6B": Encoder(151_936, 1024, 28, 16, 8, 3072),
    "4B": Encoder(151_936, 2560, 36, 32, 8, 9728),
}
_EPSILON, _THETA = 1e-6, 1e6


class Norm(nn.Module):
    """RMSNorm, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPSILON)
        return self.weight * scaled.to(x.dtype)


class Attention(nn.Module):
    """Causal attention with normalized and rotated heads."""

    def __init__(self, shape: Encoder) -> None:
        super().__init__()
        self._dim = shape.head_dim
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, q, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.o_proj = nn.Linear(q, shape.hidden, bias=False)
        self.q_norm, self.k_norm = Norm(shape.head_dim), Norm(shape.head_dim)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Attend; x [B, S, hidden], cos and sin [S, head_dim]."""

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.view(*y.shape[:-1], -1, self._dim)

        q = _rotate(self.q_norm(heads(self.q_proj(x))).transpose(1, 2), cos, sin)
        k = _rotate(self.k_norm(heads(self.k_proj(x))).transpose(1, 2), cos, sin)
        v = heads(self.v_proj(x)).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        projected: torch.Tensor = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return projected


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Encoder) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.down_proj = nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return down(silu(gate(x)) * up(x))."""
        grown: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return grown


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Encoder) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(shape.hidden), Norm(shape.hidden)
        self.self_attn, self.mlp = Attention(shape), Mlp(shape)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Return the residual stream after the layer."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        stream: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return stream


class Model(nn.Module):
    """Token ids int64 [B, S], all rows S long, to unit vectors float32 [B, hidden]. Weight names as in checkpoints."""

    def __init__(self, shape: Encoder) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden)
        self._dim = shape.head_dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed; the last token is pooled."""
        x = self.embed_tokens(ids)
        inverse = _THETA ** (-torch.arange(0, self._dim, 2, device=ids.device, dtype=torch.float32) / self._dim)
        angles = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)[:, None] * inverse
        both = torch.cat((angles, angles), dim=-1)
        cos, sin = both.cos().to(x.dtype), both.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return functional.normalize(self.norm(x[:, -1]).float(), dim=-1)


def load(shape: Encoder, dtype: torch.dtype, device: str, checkpoint: Path | None = None) -> Model:
    """Return the model on the device, with random weights, or those of a checkpoint folder (needs safetensors)."""
    with torch.device("meta"):
        model = Model(shape).to(dtype)
    model = model.to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, 0.02, generator=generator)
        if checkpoint is not None:
            from safetensors.torch import load_file

            weights = dict(model.named_parameters())
            for file in sorted(checkpoint.glob("*.safetensors")):
                for name, value in load_file(file).items():
                    weights.pop(name).copy_(value)
            assert not weights, f"the checkpoint lacks {sorted(weights)[0]}"
    return model


def runner(model: Model, device: str, mode: str) -> Run:
    """Return a function of one batch, host to host: ids int64 [B, S] in, vectors float32 [B, hidden] out."""
    call: Callable[[torch.Tensor], torch.Tensor] = model
    if mode == "compiled":
        # Anew for every shape. Layer by layer, because all layers share one kernel set: 28 times less to compile than
        # the model as a whole, and the same speed once the model is one CUDA graph.
        torch._dynamo.reset()
        for layer in model.layers:
            layer.compile(dynamic=False)
        if device == "cuda":
            call = Captured(model)

    def run(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.inference_mode():
            vectors: NDArray[np.float32] = call(torch.from_numpy(ids).to(device)).cpu().numpy()
        return vectors

    return run


class Captured:
    """A model as one CUDA graph for one batch shape, captured at the first call."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ids = self._vectors = torch.empty(0)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the model's output for ids int64 [B, S]; the next call overwrites it."""
        if self._graph is None:
            self._capture(ids)
        assert self._graph is not None
        self._ids.copy_(ids)
        self._graph.replay()
        return self._vectors

    def _capture(self, ids: torch.Tensor) -> None:
        self._ids = ids.clone()
        side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and takes the memory that a capture must not ask for
            for _ in range(_WARM_RUNS):
                self._model(self._ids)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._vectors = self._model(self._ids)
        self._graph = graph
        self._require_same(ids.flip(0, 1))

    def _require_same(self, ids: torch.Tensor) -> None:
        """Raise RuntimeError when a replay on other ids is not what the model gives: that would be no baseline."""
        least = functional.cosine_similarity(self(ids).double(), self._model(ids).double()).min().item()
        if not least > _SAME:
            raise RuntimeError(f"the CUDA graph gives other vectors than the model: cosine {least:.6f}")


def clock(run: Run, rows: int, tokens: int, vocabulary: int, seconds: float) -> dict[str, Any]:
    """Time a run on random ids; every call starts and ends on the host. Warms up first; five runs at the least."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, tokens))
    start = time.perf_counter()
    warm = 0
    while warm < _WARM_RUNS or time.perf_counter() - start < min(_WARM_S, seconds / 4):
        run(ids)
        warm += 1
    warm_s = time.perf_counter() - start
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _LEAST or (time.perf_counter() < end and len(times) < _MOST):
        begin = time.perf_counter()
        run(ids)
        times.append(1e3 * (time.perf_counter() - begin))
    middle = float(np.median(times))
    return {
        "rows": rows,
        "tokens": tokens,
        "median_ms": round(middle, 4),
        "min_ms": round(min(times), 4),
        "p90_ms": round(float(np.quantile(times, 0.9)), 4),
        "texts_per_s": round(1e3 * rows / middle, 2),
        "tokens_per_s": round(1e3 * rows * tokens / middle, 1),
        "runs": len(times),
        "warm_up_s": round(warm_s, 2),
    }


def once(run: Run, rows: int, tokens: int, vocabulary: int, seconds: float) -> dict[str, Any]:
    """Run one shape once, in place of `clock`: what torch compiles for it is then in its cache."""
    start = time.perf_counter()
    run(np.zeros((rows, tokens), np.int64))
    return {"rows": rows, "tokens": tokens, "warm_up_s": round(time.perf_counter() - start, 2)}


def measure(
    size: str, dtype: str, mode: str, device: str, seconds: float, task: Task = clock
) -> Iterator[dict[str, Any]]:
    """Yield the times of one contestant, shape by shape; a shape that cannot run says why."""
    shape = SIZES[size]
    end = time.perf_counter() + seconds
    needed = 2 * shape.parameters * 1.3
    if device == "cuda" and not torch.cuda.is_available():
        yield {"skipped": f"torch {torch.__version__} cannot use CUDA here"}
        return
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if needed > free:
            reason = f"no memory: about {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
            yield from ({"rows": r, "tokens": t, "skipped": reason} for r, t in SHAPES)
            return
    model = load(shape, getattr(torch, dtype), device)
    for index, (rows, tokens) in enumerate(SHAPES):
        left = end - time.perf_counter()
        if left <= 0:
            yield {"rows": rows, "tokens": tokens, "skipped": "out of time"}
            continue
        try:
            share = min(MOST_S, left / (len(SHAPES) - index) / 2)
            yield task(runner(model, device, mode), rows, tokens, shape.vocabulary, share)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            yield {"rows": rows, "tokens": tokens, "skipped": f"no memory: {str(error).splitlines()[0]}"}
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _is_out_of_memory(error: RuntimeError) -> bool:
    """While a CUDA graph is captured, torch says it in another class than its own."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def main() -> None:
    """Run one contestant and print its lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--prepare", action="store_true", help="run every shape once")
    options = parser.parse_args()
    task = once if options.prepare else clock
    for line in measure(options.size, options.dtype, options.mode, options.device, options.seconds, task):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
