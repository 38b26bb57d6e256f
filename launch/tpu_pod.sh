#!/bin/bash
# One run on all hosts of a TPU slice, one process a host:
#
#   launch/tpu_pod.sh NAME ZONE rstar2_14b --run /shared/runs/mine
#
# Installs the last commit of this checkout on every host, then starts it there; the hosts find each other by
# themselves. The run folder, the model and the data must be on a disk that all hosts share. Ctrl-C reaches all of them;
# the same command goes on from the last checkpoint.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
name=$1 zone=$2
shift 2

on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1" -- -t
}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git -C "$(dirname "$0")/.." archive --prefix=jaxrl/ --output="$folder/jaxrl.tar.gz" HEAD
gcloud compute tpus tpu-vm scp "$folder/jaxrl.tar.gz" "$name:" --zone="$zone" --worker=all
on_all_hosts "python3 -m venv jaxrl-venv && jaxrl-venv/bin/pip install --quiet './jaxrl.tar.gz[tpu]'"
on_all_hosts "jaxrl-venv/bin/jaxrl train $(printf '%q ' "$@")"
