#!/bin/sh
# Go from a corpus to a pondering model that generates text. `make quickstart` calls this script. You can also type each
# command yourself.
#   quickstart.sh RUN STDLIB RANKS [key=value...]
# RUN is a folder for all results. STDLIB is the folder of Python's standard library, which is the corpus. RANKS is the
# number of processes that train. key=value overrides a setting of the training recipe.
set -eu
run=$1 stdlib=$2 ranks=$3
shift 3
begin=$(date +%s)
step() { title=$1; shift; printf '\n== %s\n   %s\n' "$title" "$*"; "$@"; }

rm -rf "$run"
mkdir -p "$run"

step "1/6 a tokenizer of 2,048 tokens, from the standard library's sources and docstrings" \
    ponder-data train-tokenizer "$stdlib" --pattern '**/*.py' --exclude site-packages --exclude dist-packages \
        --kind bpe --vocab-size 2048 --out "$run/tokenizer"

step "2/6 the corpus as memory-mapped shards, one document a file" \
    ponder-data build python-stdlib "sources.stdlib.path=$stdlib" "tokenizer=$run/tokenizer" "out=$run/shards"

step "3/6 a pondering LLaMA with S = 3 under DeepSpeed ZeRO-3 on $ranks ranks" \
    ponder-scale train quickstart "run_dir=$run/run" "data.sources.stdlib.path=$run/shards" --nproc "$ranks" "$@"

step "4/6 the newest checkpoint as a Hugging Face folder, compared with the checkpoint in a fresh process" \
    ponder-scale export "$run/run" "$run/huggingface" --verify

step "5/6 held-out perplexity of each pass of the exported model" \
    ponder-scale evaluate ppl "$run/huggingface" --data "$run/shards"

step "6/6 a fresh process generates" \
    ponder-scale generate "$run/huggingface" --prompt 'def read(self, size=-1):' --max-new-tokens 60 --temperature 0.7

cat <<END

== made in $(($(date +%s) - begin)) s
   $run/shards        token shards in Megatron's format, with their manifest and tokenizer
   $run/run           metrics.jsonl, the resolved config.yaml, checkpoints that a resumed run goes on from
   $run/huggingface   loads by AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)

   try next (after: . .venv/bin/activate)
   ponder-scale generate $run/huggingface --prompt 'import os' --pondering-steps 1
   ponder-data inspect $run/shards
   ponder-scale train quickstart train.steps=600 --nproc $ranks
END
