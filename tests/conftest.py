"""Settings of the whole suite."""

import os

# Small models on several threads wait for one another more than they compute, above all beside other processes. The
# suite uses the cores by running files side by side (pytest-xdist) instead. Before torch is imported: OpenMP reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
