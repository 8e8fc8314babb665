import gc

import hypothesis
import torch

# The tensors here are too small to gain from a second thread, and where the cores are shared it waits for its turn.
torch.set_num_threads(1)

# How long one example takes says more about the machine than about the code. `make test` tries the same examples each
# time, so that it says something about the change alone; `make fuzz` looks for new ones.
hypothesis.settings.register_profile("fxstream", deadline=None, derandomize=True)
hypothesis.settings.register_profile("fuzz", deadline=None)
hypothesis.settings.load_profile("fxstream")


def pytest_collection_finish():
    """What has been imported stays: Python need not look through it for garbage at every collection."""
    gc.collect()
    gc.freeze()
