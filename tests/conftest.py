"""Settings of the whole test run."""

import torch

# The tensors of the tests are small: on a busy machine, threads that wait for each other cost more than they save.
torch.set_num_threads(1)
