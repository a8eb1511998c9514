#!/usr/bin/env bash
# Loads checkpoints from moto (S3) and Azurite (Azure Blob Storage): servers that others wrote, filled by the vendors' own
# clients. What the tests' own server gets wrong, both sides of it would get wrong together; these would not.
#
#   scripts/storage_fidelity.sh                  builds longshore (debug), installs, loads, compares
#   scripts/storage_fidelity.sh --bin PATH       this longshore
#   scripts/storage_fidelity.sh --packages DIR   keeps what is installed there, for the next time
#
# Of each service: a load at tp 2 has the digest of the load from disk, with ranks as threads and as processes; a bucket
# that is missing and a key that is wrong are refused; and while a weight file is being replaced, a load has the digest of one
# state or the other, or says that it was replaced.
#
# Needs Python 3 and pip's index, Node.js and npm's registry (0.7 GB in a temporary directory, removed at the end). Exit
# code 3: packages cannot be had.
set -euo pipefail
cd "$(dirname "$0")/.."

bin='' packages=''
while (($#)); do
    case $1 in
    --bin) bin=$2; shift 2 ;;
    --packages) packages=$2; shift 2 ;;
    *)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
        [[ $1 == --help ]] && exit 0 || exit 2
        ;;
    esac
done

scratch=$(mktemp -d)
packages=${packages:-$scratch/packages}
started=()
finish() {
    for process in "${started[@]}"; do
        kill "$process" 2>/dev/null && wait "$process" 2>/dev/null || true
    done
    rm -rf "$scratch"
}
trap finish EXIT

python=$packages/venv/bin/python
install_python() {
    [[ -e $packages/venv/installed ]] && return
    python3 -m venv "$packages/venv" && "$python" -m pip install --quiet --disable-pip-version-check \
        'moto[server,s3]==5.2.5' azure-storage-blob==12.31.1 && touch "$packages/venv/installed"
}
install_node() {
    [[ -e $packages/npm/installed ]] && return
    npm install --silent --no-audit --no-fund --prefix "$packages/npm" azurite@3.37.0 && touch "$packages/npm/installed"
}
install_python >&2 &
installing=$!
install_node >&2 || {
    echo "azurite cannot be had: it takes Node.js, and npm's registry" >&2
    exit 3
}
wait "$installing" || {
    echo "moto cannot be had: it takes python3 with venv, and pip's index" >&2
    exit 3
}
if [[ -z $bin ]]; then
    cargo build --quiet --locked --package longshore
    bin=$(realpath "${CARGO_TARGET_DIR:-target}")/debug/longshore
fi

# -- servers -------------------------------------------------------------------------------------------------------------

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

listening() { # PORT NAME
    for _ in {1..300}; do
        if (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; then return; fi
        sleep 0.1
    done
    echo "$2 does not listen" >&2
    cat "$scratch/$2.log" >&2
    exit 1
}

s3_port=$(free_port)
"$packages/venv/bin/moto_server" --host 127.0.0.1 --port "$s3_port" >"$scratch/moto.log" 2>&1 &
started+=($!)
az_port=$(free_port)
node "$packages/npm/node_modules/azurite/dist/src/blob/main.js" --silent --skipApiVersionCheck --blobHost 127.0.0.1 \
    --blobPort "$az_port" --location "$scratch/blobs" >"$scratch/azurite.log" 2>&1 &
started+=($!)
listening "$s3_port" moto
listening "$az_port" azurite

# nothing but this may decide where requests go and who asks
while read -r name; do unset "$name"; done < <(compgen -e | grep -E '^(AWS|AZURE|GOOGLE|HF|LONGSHORE)_')
export AWS_ENDPOINT_URL=http://127.0.0.1:$s3_port AWS_REGION=us-east-1 AWS_DEFAULT_REGION=us-east-1 AWS_ALLOW_HTTP=true
export AWS_ACCESS_KEY_ID=fidelity AWS_SECRET_ACCESS_KEY=fidelity-secret
# the account and the key that every Azurite has
account=devstoreaccount1
export AZURE_STORAGE_ENDPOINT=http://127.0.0.1:$az_port/$account AZURE_STORAGE_ACCOUNT_NAME=$account AZURE_ALLOW_HTTP=true
export AZURE_STORAGE_ACCOUNT_KEY=Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==
export NO_PROXY=127.0.0.1 no_proxy=127.0.0.1 LONGSHORE_CACHE_DIR=$scratch/cache

# -- loads ---------------------------------------------------------------------------------------------------------------

digest() { # URI OPTIONS...
    "$bin" load "$1" --tp 2 --json --log-level error --device cpu "${@:2}" |
        "$python" -c 'import json, sys; print(json.load(sys.stdin)["digest"])'
}

equal() { # WHAT FOUND WANTED
    [[ $2 == "$3" ]] || { echo "$1: digest $2, not $3" >&2; exit 1; }
    echo "ok: $1"
}

refused() { # WHAT URI
    local status=0 complaint
    complaint=$("$bin" load "$2" --tp 2 --log-level error 2>&1 >/dev/null) || status=$?
    [[ $status == 2 && $complaint == *"$2"* ]] || { echo "$1: exit code $status, $complaint" >&2; exit 1; }
    echo "ok: $1: ${complaint#longshore: }"
}

models=(llama:bf16 deepseek_v3:fp8)
for number in "${!models[@]}"; do
    model=${models[$number]}
    "$bin" synth "$scratch/model$number" --model "${model%:*}" --quant "${model#*:}" --scale tiny --log-level error >/dev/null
    wanted[number]=$(digest "$scratch/model$number")
done
# the first of them with one file of other weights: storage replaces objects, not models, so of two files that are replaced
# one after the other a load may see the old and the new
"$bin" synth "$scratch/seed1" --model llama --quant bf16 --scale tiny --seed 1 --log-level error >/dev/null
cp -r "$scratch/model0" "$scratch/other"
cp "$scratch"/seed1/model-00002-*.safetensors "$scratch/other"
other=$(digest "$scratch/other")

for service in s3 az; do
    for number in "${!models[@]}"; do
        uri=$service://models$number/some/model
        "$python" scripts/fidelity/objects.py put "$service" "models$number" some/model "$scratch/model$number"
        equal "$uri (${models[$number]})" "$(digest "$uri")" "${wanted[$number]}"
        equal "$uri, ranks as processes" "$(digest "$uri" --ranks processes)" "${wanted[$number]}"
    done
    refused "a bucket that is missing" "$service://no-such-models/some/model"
    # moto looks at no signature
    [[ $service == s3 ]] || AZURE_STORAGE_ACCOUNT_KEY=bm90IHRoZSBrZXk= refused "a key that is wrong" "$service://models0/some/model"

    # replaced while being read: one state, the other, or an error that says so
    "$python" scripts/fidelity/objects.py replace "$service" models0 some/model "$scratch/model0" "$scratch/other" &
    replacing=$!
    started+=("$replacing")
    sleep 1
    one=0 two=0 replaced=0
    for _ in {1..12}; do
        found=$(digest "$service://models0/some/model" --read-size 64KiB 2>"$scratch/complaint") || found=''
        case $found in
        "${wanted[0]}") one=$((one + 1)) ;;
        "$other") two=$((two + 1)) ;;
        *)
            grep -q 'replaced' "$scratch/complaint" || {
                echo "$service, replaced while being read: digest '$found', $(cat "$scratch/complaint")" >&2
                exit 1
            }
            replaced=$((replaced + 1))
            ;;
        esac
    done
    kill "$replacing"
    wait "$replacing" 2>/dev/null || true
    echo "ok: $service, replaced while being read: $replaced loads said so, $one and $two read one state"
done
