"""Where weights come from: a training run as ordered checkpoints, and the recorder that writes them."""
