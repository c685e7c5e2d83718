import torch

# The models here are tiny: threads would only wait for each other.
torch.set_num_threads(1)
