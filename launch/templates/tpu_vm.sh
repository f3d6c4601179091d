#!/bin/bash
# Cell: $cell
# Start-up script of a TPU slice: every worker of it runs this as root, at each boot, until the cell is done. Rendered by
# launch/tpu_vm.py.
set -u
name=$name
project=$project
zone=$zone
checkout=$checkout
runs=$runs
run=$run
venv=$venv
log=$log
restarts=$restarts
export HOME=/root PYTHONUNBUFFERED=1
$exports
say() { printf '%(%F %T)T  %s: %s\n' -1 "$$name" "$$1" | tee -a "$$log"; }

# Says why this was the end, and deletes the slice, which costs money as long as it is there. Where its service account
# may not, who watches from outside does. After a status of 0 only worker 0 acts: it is the one that writes DONE.
finish() { # WHY STATUS
  say "$$1"
  if (($$2 != 0)) && mountpoint -q "$$runs" && mkdir -p "$$run" && [[ ! -e $$run/FAILED ]]; then
    echo "worker $$worker: $$1" >"$$run/FAILED"
  fi
  keep_log
  if (($$2 != 0)) || [[ $$worker == 0 ]]; then
    gcloud compute tpus queued-resources delete "$$name" --project="$$project" --zone="$$zone" --force --quiet --async
  fi
  exit "$$2"
}

keep_log() { [[ ! -d $$run ]] || cp "$$log" "$$run/log.$$worker"; }

get_code() {
  [[ -e $$checkout/.complete ]] && return
  mkdir -p "$$checkout" && cd "$$checkout" && $get_code && touch .complete
}

mount_runs() {
  mountpoint -q "$$runs" && return
  mkdir -p "$$runs" && $mount
}

install_gcsfuse() {
  local repository=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  curl -fsS "$$repository/doc/apt-key.gpg" -o "$$key" &&
    echo "deb [signed-by=$$key] $$repository gcsfuse-$$(lsb_release -cs) main" >/etc/apt/sources.list.d/gcsfuse.list &&
    apt-get update -q && apt-get install -qy gcsfuse
}

install_program() {
  [[ -e $$venv/.complete ]] && return
  python3 -m pip install --quiet uv && python3 -m uv venv --quiet --clear --python=$python "$$venv" &&
    python3 -m uv pip install --quiet --python="$$venv/bin/python" \
      --constraint="$$checkout/requirements.txt" --editable="$$checkout[tpu]" && touch "$$venv/.complete"
}

# The machine is taken away: the program saves and leaves with 42, and must not be started again here.
child= stopped=
trap 'stopped=1; [[ -z $$child ]] || kill -TERM "$$child"' TERM

run_cell() {
  cd "$$checkout" || return
  "$$venv/bin/python" $command >>"$$log" 2>&1 &
  child=$$!
  wait "$$child"
  status=$$?
  while kill -0 "$$child" 2>/dev/null; do # a signal to this shell ends `wait`, not the program
    wait "$$child"
    status=$$?
  done
  child=
}

worker=$$(curl -fsS -H 'Metadata-Flavor: Google' \
  http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number) || worker=0
for step in get_code mount_runs install_program; do
  for wait in 10 60 0; do # the network may be late, and package servers busy
    ("$$step") >>"$$log" 2>&1 && break
    ((wait)) || finish "$$step failed, see $$log" 1
    sleep "$$wait"
  done
done

for ((start = 0; start <= restarts; start++)); do
  [[ -e $$run/DONE ]] && finish "done" 0
  say "worker $$worker, start $$start"
  run_cell
  [[ -z $$stopped ]] || { keep_log; exit 0; }
  case $$status in
    0) finish "the program is done" 0 ;;
    $held) sleep $held_seconds ;; # another worker's lease: that of a slice that was taken away must first expire
    $restartable) keep_log ;;
    *) finish "failed with exit status $$status" 1 ;;
  esac
done
finish "gave up after $$restarts restarts" 1
