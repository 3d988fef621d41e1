"""What is measured for a config on a machine; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mnist_dist.bench.records import Case
from mnist_dist.config.schema import Train
from mnist_dist.errors import ConfigError

LARGER = 4
"""How many times the global batch is taken to see what small steps cost."""
PARTS = (16, 4, 2, 1)
"""What parts of the global batch one process is given: what it has as one of so many."""
PRECISIONS = ("fp32", "bf16", "fp16")
MOST = 64
"""Processes for which something is expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The cases of each group of processes."""

    counts: tuple[int, ...]
    """Numbers of processes, the first being 1."""
    usual: int
    """How many of these `train` would start if nothing was said."""
    modelled: int
    """The most of them that have CPUs of their own: more would tell how CPUs are shared, not what a step costs."""
    base: Mapping[int, Case]
    """By number of processes: the config as it is; also what one process alone does with as many threads."""
    sizes: tuple[Case, ...]
    """One process of the modelled group alone, with parts of the batch in micro-batches of one size."""
    larger: Case | None
    """`LARGER` times the batch, for the usual number of processes."""
    precisions: tuple[Case, ...]
    possible: tuple[int, ...]
    """Numbers of processes, powers of two up to `MOST`, that can share the global batch."""

    def cases(self, ranks: int) -> tuple[Case, ...]:
        """List what a group measures, without repeats; the config as it is comes first."""
        wanted = [self.base[ranks]]
        if self.larger is not None and ranks == self.usual:
            wanted.append(self.larger)
        if ranks == 1:
            wanted += [*self.base.values(), *self.sizes, *self.precisions]
        return tuple(dict.fromkeys(wanted))


def make_plan(options: Train, *, usual: int, threads: Mapping[int, int], cpus: int | None) -> Plan:
    """Plan the measurements.

    Args:
        options: The config's section.
        usual: How many processes `train` would start.
        threads: Of each process, by number of processes: 1, and others that can share the global batch.
        cpus: That the processes share; None where they compute elsewhere.
    """
    counts = tuple(sorted(threads))
    modelled = max((ranks for ranks in counts if cpus is None or ranks * threads[ranks] <= cpus), default=1)
    if modelled == 1 and len(counts) > 1:
        modelled = counts[1]
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
        replace(base[modelled], global_batch=options.global_batch // part)
        for part in PARTS
        if options.global_batch >= part and _divides(options, options.global_batch // part, pieces, 1)
    ]
    larger = replace(base[usual], global_batch=LARGER * options.global_batch, micro_batch=options.micro_batch)
    return Plan(
        counts=counts,
        usual=usual,
        modelled=modelled,
        base=base,
        sizes=tuple(sizes),
        larger=larger if _divides(options, larger.global_batch, larger.micro_batch, usual) else None,
        precisions=tuple(replace(base[1], precision=precision) for precision in PRECISIONS),
        possible=shareable(options, MOST, asked=False)[1:],
    )


def shareable(options: Train, most: int, *, asked: bool) -> tuple[int, ...]:
    """List 1, 2, 4, ... processes up to the most.

    Args:
        options: The config's section.
        most: Included, though it may be no power of two.
        asked: The user named this number; else those are left out that cannot share the global batch.

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
