"""The training step measured: ours in every mode, with each optimisation switched off, and torchvision's beside it.

``python -m benchmarks.train_step`` is the command (:mod:`benchmarks.train_step.__main__`).
"""
