"""Bundle in, embeddings out: tokenizer, engines, embedder and the gRPC service.

Knows bundles, not checkpoints: nothing in this package imports torch, transformers, onnx, `export` or `calibration`.
"""

__version__ = "0.1.0"
