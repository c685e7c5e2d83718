"""One thread per test process: workers share the cores, and small tensors gain nothing from more."""

import torch

torch.set_num_threads(1)
