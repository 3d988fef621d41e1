"""`mnist-dist` in which rank 1 alone fails in its third step: `python alone.py ERROR FILE COMMAND...`.

The file gets the time of the failure.
"""

import os
import sys
import time
from pathlib import Path

from mnist_dist.cli import main
from mnist_dist.data.batches import Batches

error, file = sys.argv[1:3]
del sys.argv[1:3]
whole = Batches.take
taken = 0


def take(self, images, epochs=None):
    global taken
    taken += epochs is not None
    if taken == 3 and os.environ["RANK"] == "1":
        Path(file).write_text(str(time.time()))
        raise RuntimeError(error)
    return whole(self, images, epochs)


Batches.take = take
main()
