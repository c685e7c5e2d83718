"""One thread per test process and all it starts: workers share the cores, and small tensors gain nothing from more."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import torch

torch.set_num_threads(1)
