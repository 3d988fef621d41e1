"""From image files to batches: sources, store, sampler, transforms.

Everything but `transforms` works without torch; import that module by its name.
"""

from mnist_dist.data.dataset import Dataset, Split, open_dataset
from mnist_dist.data.sampler import Sampler

__all__ = ["Dataset", "Sampler", "Split", "open_dataset"]
