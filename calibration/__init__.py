"""The texts that engines are calibrated and verified with, and the code that reads and rebuilds them.

What crosses this package's border is a list of `calibration.texts.Text`: strings with their prompt name, in a
fixed order. It deliberately knows nothing of tokenizers, tensors or engines.
"""
