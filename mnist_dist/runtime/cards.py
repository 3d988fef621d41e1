"""The GPUs of a group: check that each rank has its own, and exchange what they support."""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed
from accelerate.utils.environment import check_cuda_p2p_ib_support

from mnist_dist.errors import ConfigError

WITHOUT_DIRECT_LINKS = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")
"""What `accelerate launch` sets for GPUs of the RTX 40 series under a driver with which NCCL's direct links fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """The GPU of one rank."""

    name: str
    identity: str
    """The machine's name and the GPU's UUID, which the parts of a divided GPU (MIG) share."""
    native_bf16: bool
    has_direct_links: bool
    """Whether NCCL may use P2P and InfiniBand on this machine, by Accelerate's own check."""

    @classmethod
    def current(cls, local_rank: int) -> Card:
        """Read the current GPU; the first rank of a machine starts nvidia-smi for Accelerate's check, once for all."""
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return cls(
            name=properties.name,
            identity=f"{socket.gethostname()} GPU-{properties.uuid}",
            native_bf16=torch.cuda.is_bf16_supported(including_emulation=False),
            has_direct_links=local_rank > 0 or check_cuda_p2p_ib_support(),
        )


def settle(card: Card, ranks: int) -> bool:
    """Compare the ranks' GPUs, and turn NCCL's direct links off on all ranks if one machine needs that. Every rank.

    Call it before the first collective on GPUs: it uses gloo, since NCCL hangs if two ranks share a GPU, and reads
    its variables when it starts. Variables that are set already stay as they are.

    Returns:
        Whether every rank's GPU computes bf16 natively.

    Raises:
        ConfigError: Two ranks share a GPU; on every rank.
    """
    digest = int.from_bytes(hashlib.sha256(card.identity.encode()).digest()[:7])
    mine = torch.tensor([digest, card.native_bf16, card.has_direct_links], dtype=torch.int64)
    table = [torch.empty_like(mine) for _ in range(ranks)]
    torch.distributed.all_gather(table, mine)
    digests, native_bf16, direct_links = torch.stack(table).T.tolist()
    _refuse_sharing(digests, card if digests.count(digest) > 1 else None)
    if not all(direct_links):
        os.environ |= {name: "1" for name in WITHOUT_DIRECT_LINKS if name not in os.environ}
    return all(native_bf16)


def _refuse_sharing(digests: list[int], card: Card | None) -> None:
    """Raise if two ranks share a GPU. `card` is this rank's GPU if it is shared."""
    shared = next((digest for digest in digests if digests.count(digest) > 1), None)
    if shared is None:
        return
    ranks = [rank for rank, digest in enumerate(digests) if digest == shared]
    which = f" ({card.name}, {card.identity})" if card is not None else ""
    raise ConfigError(
        f"Ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]} share one GPU{which}, and NCCL takes one rank a GPU: "
        f"start as many processes on each machine as it has GPUs, with each seeing its own or all of them, or use "
        f"--device cpu."
    )
