#!/usr/bin/env bash
# Runs on several machines under Slurm, and resumes automatically after preemption and after the time limit:
#   sbatch examples/slurm.sh runs/mine --config your.yaml
# The first argument is the output_dir, on a shared disk. The others are passed to fundamentallm.train.
#SBATCH --job-name=fundamentallm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1       # one launcher per machine, which starts one process per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300       # signals this script five minutes before the time limit
#SBATCH --requeue                 # also after a machine failed
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

output_dir=${1:?give the output_dir first}
shift
machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_IP=${machines%%$'\n'*} MAIN_PORT=$((20000 + SLURM_JOB_ID % 10000))
export PROCESSES=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:-1}))
export ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-accelerate_configs/multi_node.yaml}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240   # seconds for the run to save; the launcher's default is 30

# One launcher per machine. It restarts crashed processes within the job.
# shellcheck disable=SC2016  # expanded on the machines
srun --kill-on-bad-exit=0 bash -c 'exec accelerate launch --config_file "$ACCELERATE_CONFIG" \
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_IP" --main_process_port "$MAIN_PORT" --max_restarts 3 \
    -m fundamentallm.train "$@"' fundamentallm --output_dir "$output_dir" "$@" &
step=$!

# Before the time limit or a preemption, the run finishes its step and saves.
trap 'kill -TERM "$step"' USR1 TERM
code=0
while kill -0 "$step" 2>/dev/null; do
    wait "$step" && code=0 || code=$?   # a signal interrupts wait
done

# After a signal, launchers return 1 whatever their processes return. status.json has the run's own exit code.
if grep -q '"exit_code": 75' "$output_dir/status.json"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
