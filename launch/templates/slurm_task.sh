# From here on, the same in every script: one array task trains one cell, resumes what is there, and asks for its own
# restart. SLURM's exit codes judge nothing: WORKDIR/DONE does.
set -uo pipefail
task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # SLURM_JOB_ID of one of the tasks is the id of the whole array
restarts=$((${RECSCALE_RESTARTS:-0} + ${SLURM_RESTART_COUNT:-0}))
cell=?

say() { printf '%(%F %T)T  %s  %s: %s\n' -1 "$task" "$cell" "$1"; }
fail() {
  say "$1"
  exit "${2:-1}"
}

# cancel, preemption and requeue tell every process of the job, this shell and srun too. srun passes the signal on and
# waits for the tasks; a shell that died here could not ask for the restart.
stopped=
trap 'stopped=1; say "told to stop"' TERM

# Submits this task once more, for sites without scontrol on their nodes or where a job must not requeue itself.
submit_again() {
  local next
  next=$(env -u SLURM_RESTART_COUNT sbatch --parsable --array="$SLURM_ARRAY_TASK_ID" --dependency="afterany:$task" \
    --export="ALL,RECSCALE_RESTARTS=$((restarts + 1))" "$script") || return 1
  printf '{"job": "%s", "of": "%s", "task": %d}\n' "${next%%;*}" "$SLURM_ARRAY_JOB_ID" "$SLURM_ARRAY_TASK_ID" >>"$jobs"
  say "$1; submitted again as job ${next%%;*}"
}

start_again() { # WHY STATUS
  local state
  ((restarts < max_restarts)) || fail "$1; restarted $restarts times already, submit the sweep again to go on" "$2"
  state=$(squeue --noheader --jobs="$task" --format="%T %r" 2>/dev/null) || state=RUNNING
  # A job that is being ended for its time limit is gone unless asked for; to ask for one that is being cancelled would
  # bring it back.
  if [[ $state != RUNNING* && $state != *TimeLimit ]]; then
    say "$1; SLURM is ending this job itself ($state)"
  elif command -v scontrol >/dev/null && scontrol requeue "$task"; then
    say "$1; requeued, restart $((restarts + 1)) of at most $max_restarts"
  else
    submit_again "$1" || fail "$1; neither scontrol nor sbatch starts it again here, submit the sweep again to go on" "$2"
  fi
  exit "$2"
}

# A line that was cut or changed must not become a command.
echo "$digest  $manifest" | sha256sum --check --status - 2>/dev/null ||
  fail "$manifest is gone, cut short or changed; submit the sweep again, which writes it anew"
line=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$manifest")
[[ -n $line ]] || fail "no line $((SLURM_ARRAY_TASK_ID + 1)) in $manifest"
eval "$line" # cell=... workdir=... command=(...)
cd "$directory" || fail "$directory is not there on $(hostname)"
if [[ -e $workdir/DONE ]]; then
  say "done before"
  exit 0
fi
mkdir -p "$workdir" && : >>"$workdir/log" || fail "$workdir/log cannot be written on $(hostname)"
rm -f "$workdir/FAILED" # of an earlier start

setup
unset RECSCALE_COORD RECSCALE_NPROC RECSCALE_PROC # of another launcher: they would overrule srun
# A port of this job's own: what jax derives from the job id is shared by all steps of a job, and two of them collide.
# Below 32768: above it the system hands ports to outgoing connections.
export JAX_COORDINATOR_PORT=$((20000 + SLURM_JOB_ID % 12000))
say "starts on ${SLURM_JOB_NODELIST:-$(hostname)}, restart $restarts"

for wait in 30 30 30 0; do
  srun "${srun_options[@]}" "$python" "${command[@]}" >>"$workdir/log" 2>&1
  status=$?
  # A worker that was killed with its node cannot give its lease back: after a restart, wait until it expires.
  if [[ $status != 75 || $restarts == 0 || $wait == 0 ]]; then break; fi
  sleep "$wait"
  if [[ $stopped ]]; then break; fi
done

if [[ -e $workdir/DONE ]]; then
  say "done"
  exit 0
fi
case $status in
  0) fail "exit status 0 and yet no $workdir/DONE, see $workdir/log" ;;
  42) start_again "saved its state" 42 ;;
  75)
    say "another worker is on it, nothing to do"
    exit 0
    ;;
esac
# Ended by a signal that it could not catch: kill -9, a lost host, no memory. 137 of one process is the cause even where
# another one had time to note that its peer was gone.
if ((status == 137)) || { ((status > 128)) && [[ ! -e $workdir/FAILED ]]; }; then
  rm -f "$workdir/FAILED"
  echo "$status" >>"$manifest.kills.$task"
  if (($(wc -l <"$manifest.kills.$task") <= max_kills)); then start_again "killed (exit status $status)" "$status"; fi
fi
if [[ ! -s $workdir/FAILED ]]; then # it ended before it could say why, or was never started
  reason=$(tail -n 50 "$workdir/log" | grep -vE "^(srun: error: .* Exited with|srun: [^e]|slurmstepd)" | tail -n 1)
  printf 'exit status %s: %s\n' "$status" "$reason" >"$workdir/FAILED"
fi
fail "failed with exit status $status: $(head -n 1 "$workdir/FAILED")" "$status"
