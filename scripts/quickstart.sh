#!/usr/bin/env bash
# From a fresh clone to a fine-tuned model: installs, trains on the data set that comes with the
# package, answers its test split. No network is needed after the installation.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install .
python -m lightning_sft fit --config quickstart.yaml
python -m lightning_sft predict --ckpt_path last --config quickstart.yaml
