"""The parts of `scripts/gpu_check.py`, a file for each kind of question.

`runner.py` starts every part as a process of its own, under a time limit; `parts.py` lists them.
"""
