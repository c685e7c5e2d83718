"""What tensors cost: how many numbers they hold."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """The most numbers that tensors made inside of it have held at one time, and how many were made."""

    def __init__(self):
        super().__init__()
        self.most, self.made, self._held = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, tuple | list) else [result]:
            if isinstance(leaf, torch.Tensor):
                storage, size = StorageWeakRef(leaf.untyped_storage()), leaf.untyped_storage().nbytes() // 4
                self.made += 0 if storage in self._held else size
                self._held[storage] = size
        self._held = {storage: size for storage, size in self._held.items() if not storage.expired()}
        self.most = max(self.most, sum(self._held.values()))
        return result
