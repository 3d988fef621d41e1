"""The cases that `bench` measures for a config on a machine. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mnist_dist.bench.records import Case
from mnist_dist.config.schema import Train
from mnist_dist.errors import ConfigError

LARGER = 4
"""The global batch times this shows what small steps cost."""
PARTS = (16, 4, 2, 1)
"""One process alone trains on the global batch divided by each of these."""
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cases:
    """The cases of each group of processes."""

    counts: tuple[int, ...]
    """Numbers of processes, the first being 1."""
    usual: int
    """How many of these `train` starts by default."""
    grouped: int
    """The largest number whose processes have CPUs of their own; the exchange is reported for it."""
    base: Mapping[int, Case]
    """The config as it is, by number of processes; one process alone measures each of them too."""
    sizes: tuple[Case, ...]
    """One process alone, with the threads of the group and parts of the batch in micro-batches of one size."""
    larger: Case | None
    """`LARGER` times the batch, with the usual number of processes."""
    precisions: tuple[Case, ...]

    def of_group(self, ranks: int) -> tuple[Case, ...]:
        """Return what a group measures, without repeats; the config as it is comes first."""
        wanted = [self.base[ranks]]
        if self.larger is not None and ranks == self.usual:
            wanted.append(self.larger)
        if ranks == 1:
            wanted += [*self.base.values(), *self.sizes, *self.precisions]
        return tuple(dict.fromkeys(wanted))


def plan_cases(options: Train, *, usual: int, threads: Mapping[int, int], cpus: int | None) -> Cases:
    """Return the cases to measure.

    Args:
        options: The config's section.
        usual: How many processes `train` starts.
        threads: Of each process, by number of processes: 1, and others that can share the global batch.
        cpus: Shared by the processes; `None` if they compute elsewhere.
    """
    counts = tuple(sorted(threads))
    grouped = max((ranks for ranks in counts if cpus is None or ranks * threads[ranks] <= cpus), default=1)
    if grouped == 1 and len(counts) > 1:
        grouped = counts[1]
    pieces = options.split_batch(1)[0] if options.reduction == "exact" else options.micro_batch
    base = {
        ranks: Case(
            global_batch=options.global_batch,
            micro_batch=pieces,
            precision=options.precision,
            threads=threads[ranks],
        )
        for ranks in counts
    }
    usual = usual if usual in counts else 1
    sizes = [
        replace(base[grouped], global_batch=options.global_batch // part)
        for part in PARTS
        if options.global_batch >= part and _divides(options, options.global_batch // part, pieces, 1)
    ]
    larger = replace(base[usual], global_batch=LARGER * options.global_batch, micro_batch=options.micro_batch)
    return Cases(
        counts=counts,
        usual=usual,
        grouped=grouped,
        base=base,
        sizes=tuple(sizes),
        larger=larger if _divides(options, larger.global_batch, larger.micro_batch, usual) else None,
        precisions=tuple(replace(base[1], precision=precision) for precision in PRECISIONS),
    )


def shareable(options: Train, most: int, *, asked: bool) -> tuple[int, ...]:
    """Return 1, 2, 4, ... processes up to the most.

    Args:
        options: The config's section.
        most: Included even if it is no power of two.
        asked: The user named this number. Numbers that cannot share the global batch are left out.

    Raises:
        ConfigError: The number that was asked for cannot share the global batch.
    """
    counts = sorted({*(1 << power for power in range(most.bit_length()) if 1 << power <= most), most})
    options.split_batch(most if asked else 1)
    return tuple(ranks for ranks in counts if _divides(options, options.global_batch, options.micro_batch, ranks))


def _divides(options: Train, global_batch: int, micro_batch: int | None, ranks: int) -> bool:
    changed = options.model_copy(update={"global_batch": global_batch, "micro_batch": micro_batch})
    try:
        changed.split_batch(ranks)
    except ConfigError:
        return False
    return True
