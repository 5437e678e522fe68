#!/usr/bin/env bash
# vLLM servers on this node, for a trainer that runs elsewhere. usage: servers.sh RECIPE PORT COUNT [--field value ...]
#
#   launch/servers.sh qwen3_30b_a3b 8100 8                                    # eight servers, a GPU each, ports 8100 to 8107
#   launch/servers.sh qwen3_30b_a3b 8100 4 --rollout.tensor_parallel 2        # four, on two GPUs each
#
# Give the fields that the trainer is given. The trainer then gets --rollout.servers http://HOST:8100 http://HOST:8101 ... and a
# --rollout.transfer_folder that both sides see under one name. Who reaches these ports can call anything in the servers: ADDRESS (this host's
# name) must not be one that the internet reaches.
set -euo pipefail

if [[ $# -lt 3 ]]; then sed -n 's/^# .*usage: /usage: /p' "$0" >&2; exit 2; fi
recipe="$1" port="$2" count="$3"
shift 3
address="${ADDRESS:-$(hostname)}"
export PROCESSES="$count"
# shellcheck source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
logs="${LOGS:-logs}/servers-$address"
mkdir -p "$logs"

# For each server, the GPUs that it may see and the command that starts it, as the library writes it for this recipe.
mapfile -t lines < <(python - "$recipe" "$address" "$port" "$count" "$@" <<'PYTHON'
import sys
from minirl_nb import train
from minirl_nb.vllm.server import serve_command
recipe, host, port, count, *words = sys.argv[1:]
config = train.load_config(recipe, words)
wide = config.rollout.tensor_parallel
for i in range(int(count)):
    print(",".join(str(i * wide + k) for k in range(wide)))
    print(serve_command(config, f"http://{host}:{int(port) + i}"))
PYTHON
)
if [[ ${#lines[@]} -ne $((2 * count)) ]]; then echo "servers.sh: no commands for $recipe" >&2; exit 2; fi

pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
for ((i = 0; i < count; i++)); do
    echo "server $((port + i)): GPU ${lines[2 * i]}, log $logs/$((port + i)).log"
    CUDA_VISIBLE_DEVICES="${lines[2 * i]}" bash -c "exec env ${lines[2 * i + 1]}" > "$logs/$((port + i)).log" 2>&1 &
    pids+=($!)
done

# A server does not end by itself: the first that does takes the others with it, and the trainer says which one is gone.
status=0
wait -n || status=$?
echo "a server has ended (status $status); its log is in $logs" >&2
exit "$((status == 0 ? 1 : status))"
