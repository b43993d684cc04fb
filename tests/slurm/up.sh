#!/bin/bash
# A real Slurm on loopback, two nodes on this machine, with a munge of its own: up.sh STATE, then use
# SLURM_CONF=STATE/slurm.conf, then down.sh STATE.
# Needs `apt-get install slurm-wlm munge`; touches nothing outside STATE, which must have a short path (sockets).
set -euo pipefail
S=${1:?state folder}
H=$(hostname -s)
ME=$(id -un)
export PATH=$PATH:/usr/sbin
mkdir -p "$S"/{ctld,log,munge}
chmod 755 "$S" "$S/munge"
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
MEMORY=$(awk '/MemTotal/ {print int($2 / 1024 * 0.8)}' /proc/meminfo)
NODES="$H localhost" # names that resolve, since tasks meet at the first node's
cat > "$S/slurm.conf" <<C
ClusterName=test
SlurmctldHost=$H(127.0.0.1)
SlurmUser=$ME
SlurmdUser=$ME
AuthType=auth/munge
AuthInfo=socket=$S/munge/socket
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort=$(free_port)
StateSaveLocation=$S/ctld
SlurmdSpoolDir=$S/d_%n
SlurmctldPidFile=$S/slurmctld.pid
SlurmdPidFile=$S/slurmd_%n.pid
SlurmctldLogFile=$S/log/slurmctld.log
SlurmdLogFile=$S/log/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,sched_min_interval=100000
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
MinJobAge=3600
ReturnToService=2
MpiDefault=none
RebootProgram=/bin/true
$(for node in $NODES; do
    echo "NodeName=$node NodeHostname=$H NodeAddr=127.0.0.1 Port=$(free_port) CPUs=2 RealMemory=$((MEMORY / 2)) State=UNKNOWN"
done)
PartitionName=low Nodes=${NODES// /,} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 MaxTime=INFINITE State=UP
PartitionName=cancelled Nodes=${NODES// /,} PriorityTier=1 PreemptMode=CANCEL GraceTime=30 MaxTime=INFINITE State=UP
PartitionName=high Nodes=${NODES// /,} PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
C
export SLURM_CONF=$S/slurm.conf
(umask 077; head -c 1024 /dev/urandom > "$S/munge/key")
munged --force --socket="$S/munge/socket" --key-file="$S/munge/key" --pid-file="$S/munge/pid" \
    --log-file="$S/munge/log" --seed-file="$S/munge/seed"
slurmctld -c
for node in $NODES; do slurmd -c -N "$node"; done
for _ in $(seq 100); do
    [ "$(sinfo -h -o %T 2> /dev/null | sort -u)" = idle ] && exit 0
    sleep 0.1
done
echo "Slurm did not come up; see $S/log" >&2
exit 1
