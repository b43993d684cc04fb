#!/bin/bash
# A real single-node Slurm on loopback, with a munge of its own: up.sh STATE, then SLURM_CONF=STATE/slurm.conf; down.sh STATE.
# Needs `apt-get install slurm-wlm munge`; touches nothing outside STATE, which must have a short path (sockets).
set -euo pipefail
S=${1:?state folder}
H=$(hostname -s)
ME=$(id -un)
export PATH=$PATH:/usr/sbin
mkdir -p "$S"/{ctld,d,log,munge}
chmod 755 "$S" "$S/munge"
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
MEMORY=$(awk '/MemTotal/ {print int($2 / 1024 * 0.8)}' /proc/meminfo)
CPUS=${SLURM_TEST_CPUS:-2}
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
SlurmdPort=$(free_port)
StateSaveLocation=$S/ctld
SlurmdSpoolDir=$S/d
SlurmctldPidFile=$S/slurmctld.pid
SlurmdPidFile=$S/slurmd.pid
SlurmctldLogFile=$S/log/slurmctld.log
SlurmdLogFile=$S/log/slurmd.log
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
NodeName=$H NodeAddr=127.0.0.1 CPUs=$CPUS RealMemory=$MEMORY State=UNKNOWN
PartitionName=low Nodes=$H Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 MaxTime=INFINITE State=UP
PartitionName=high Nodes=$H PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
C
export SLURM_CONF=$S/slurm.conf
(umask 077; head -c 1024 /dev/urandom > "$S/munge/key")
munged --force --socket="$S/munge/socket" --key-file="$S/munge/key" --pid-file="$S/munge/pid" \
    --log-file="$S/munge/log" --seed-file="$S/munge/seed"
slurmctld -c
slurmd -c -N "$H"
for _ in $(seq 100); do
    [ "$(sinfo -h -o %T 2> /dev/null | sort -u)" = idle ] && exit 0
    sleep 0.1
done
echo "Slurm did not come up; see $S/log" >&2
exit 1
