#!/bin/bash
# Made by: moco-fast launch --torchrun --nodes 2 --out deploy/clusters/torchrun.sh --first-node node0 -- moco-v2 --data.shards shards/train --data.batch-size 1024 --eval.tasks health
# Start on every host, of which node0 is number 0: bash deploy/clusters/torchrun.sh NUMBER
# When one fails, the others end too; the same on all of them continues the run.
set -eu
rank=${1:?"the number of this host, from 0 to 1, is missing"}
export ACCELERATE_CPU_AFFINITY=1
exec torchrun --nnodes 2 --nproc_per_node 8 \
    --node_rank "$rank" --master_addr node0 --master_port 29500 \
    -m moco_fast.train moco-v2 \
    --data.shards shards/train \
    --data.batch-size 1024 \
    --eval.tasks health \
    --run.out runs/moco-fast
