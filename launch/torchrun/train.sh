#!/usr/bin/env bash
# Trains on several machines with torchrun. Start it on each of them, at about the same time:
#
#   NODES=2 PROCESSES=8 NODE_RANK=0 HEAD=host-a:29400 launch/torchrun/train.sh train --resume --run-dir runs/a
#
# NODES      machines                               PROCESSES  processes on each: one a GPU
# NODE_RANK  0 on the machine HEAD, then 1, 2, ...  HEAD       HOST:PORT of machine 0, as the others reach it
# MAX_RESTARTS  how often the processes are started again after a failure (3)
#
# `--resume` makes a restart continue from the newest checkpoint. Say --run-dir: torchrun takes --run for itself.
# The run's folder should be on a disk that all machines share; else the machine with the first address (in the order
# of their text) has rank 0, which alone reads and writes it.
set -euo pipefail
: "${NODES:?set NODES}" "${PROCESSES:?set PROCESSES}" "${NODE_RANK:?set NODE_RANK}" "${HEAD:?set HEAD, e.g. host-a:29400}"

# A group of another size than this is refused: no silent run of one process.
export MNIST_DIST_WORLD_SIZE=$((NODES * PROCESSES))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(((n = $(nproc) / PROCESSES) > 0 ? n : 1))}"
# Modules in the working folder must not hide installed ones. (In a checkout that is not installed: PYTHONSAFEPATH='')
export PYTHONSAFEPATH="${PYTHONSAFEPATH-1}"
# Without this, restarted ranks connect to the address of the dead store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Without this, SIGUSR2 kills torchrun and leaves the ranks behind.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2

# This machine's address towards the others. Its own name is often 127.0.1.1: then use the route's address.
host=$(getent ahostsv4 "${HEAD%:*}" | awk 'NR == 1 {print $1}')
case $host in 127.0.0.1) ;; 127.*) host=192.0.2.1 ;; esac
route=$(ip -o -4 route get "$host")
address=$(sed 's/.* src \([^ ]*\).*/\1/' <<<"$route")

# is_host: else every machine waits a minute to find out who is.
exec torchrun --nnodes "$NODES" --nproc-per-node "$PROCESSES" --max-restarts "${MAX_RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id mnist-dist \
  --rdzv-conf is_host="$([ "$NODE_RANK" = 0 ] && echo true || echo false)" --local-addr "$address" \
  -m mnist_dist "$@"
