"""Checkpoint in, bundle out: checks, ONNX graphs, and the proof against PyTorch.

`hub -> checkpoint, weights -> encoder -> graph -> pipeline` makes a bundle; `reference, parity -> report` proves it.
Only `reference` needs torch and transformers.
"""
