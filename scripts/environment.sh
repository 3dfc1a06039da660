# Sourced by the other scripts: a virtual environment in .venv and the pinned versions in it.

if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
source .venv/bin/activate

install() {
    # torch first and by its exact version: an open requirement may bring gigabytes of CUDA.
    python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
    python -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable "$1"
    # The book's own model, for the parity tests; its requirements (TensorFlow, Jupyter) are not.
    if [ "$1" = '.[dev]' ]; then
        python -m pip install --quiet --disable-pip-version-check --no-deps \
            "$(grep '^llms-from-scratch==' constraints.txt)"
    fi
}
