#!/bin/bash
# Stops what up.sh started with the same STATE: its jobs, then its daemons, each by its own pid file.
S=${1:?state folder}
export SLURM_CONF=$S/slurm.conf
scancel --full --signal=KILL --user="$(id -un)" 2> /dev/null
scancel --user="$(id -un)" 2> /dev/null
for _ in $(seq 50); do
    [ -z "$(squeue -h -t RUNNING,COMPLETING 2> /dev/null)" ] && break
    sleep 0.1
done
for file in "$S"/slurmd_*.pid "$S/slurmctld.pid" "$S/munge/pid"; do
    [ -f "$file" ] && kill "$(cat "$file")"
done
exit 0
