"""The stages of bench.gpu's second call: the slower questions."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench import ops as ops_bench
from bench.facts import Skipped
from bench.gpu_run import Run, decoding, measured
from bench.models import qwen2_config, with_peft
from tinylora.engine.rollout import Completion, Sampling, rollout
from tinylora.engine.text import Text
from tinylora.files import cache_dir
from tinylora.kernels import dispatch, fused_linear, library
from tinylora.kernels.products import fp32_sums
from tinylora.kernels.token_logprobs import token_logprobs
from tinylora.model.loader import load_model
from tinylora.rl.update import deterministic, hidden_states


def peers(run: Run) -> None:
    """transformers' generate on a PEFT model, and a training step of it, beside ours on the same tokens."""
    # Of 64 sequences at 7B transformers keeps 63 GB for the backward, ours 44 beside the rollout's cache.
    count, trained, prompt, new = (64, 16, 150, 64) if run.gpu else (4, 2, 12, 8)
    prompts = torch.randint(2, 900, (count, prompt), generator=torch.Generator().manual_seed(0))
    ours = {}
    for what, seconds in our_seconds(run, prompts.tolist(), trained, new):
        ours[what] = seconds
        sequences = trained if what == "update" else count
        run.fact(what=f"{what}, ours", sequences=sequences, prompt=prompt, new=new, seconds=seconds)
    run.__dict__.pop("model")  # two models of 7B and their caches would not fit
    run.release()
    for what, seconds in their_seconds(run, prompts.to(run.device), trained, new):
        run.fact(what=f"{what}, transformers + PEFT", seconds=seconds, ours_is_x=seconds / ours[what])


def our_seconds(run: Run, prompts: list[list[int]], trained: int, new: int) -> Iterator[tuple[str, float]]:
    """Of a rollout of `new` tokens a prompt, and of an update on the first `trained` of its completions."""
    decoder, adapter = run.model
    with torch.no_grad():
        matrices = adapter.matrices()
    completions: list[Completion] = []

    def sample() -> None:
        completions[:] = rollout(decoder, matrices, prompts, 1, Sampling(new))

    def train() -> None:
        adapter.v.grad = None
        with deterministic(decoder.device), fp32_sums():
            hidden, tokens = hidden_states(decoder, adapter.matrices(), prompts, completions, range(trained))
            token_logprobs(hidden, decoder.head, tokens)[0].sum().backward()

    yield "rollout", run.clock(sample, 3)
    yield "update", run.clock(train, 3)


def their_seconds(run: Run, prompts: Tensor, trained: int, new: int) -> Iterator[tuple[str, float]]:
    """The same of transformers and PEFT: prompts (sequences, tokens)."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with run.device:
        model = with_peft(AutoModelForCausalLM.from_config(qwen2_config(run.shape), dtype=run.dtype))
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0, "eos_token_id": None}
    whole = [prompts]  # (sequences, tokens + new), once sampled

    def sample() -> None:
        with torch.no_grad():
            mask = torch.ones_like(prompts)
            whole[0] = model.generate(input_ids=prompts, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **options)

    def train() -> None:
        model.zero_grad()
        ids, start = whole[0][:trained], prompts.shape[1]
        logits = model(input_ids=ids).logits[:, start - 1 : -1]  # (trained, new, vocab)
        logits.log_softmax(-1, dtype=torch.float32).gather(2, ids[:, start:, None]).sum().backward()

    yield "rollout", run.clock(sample, 2)
    yield "update", run.clock(train, 2)


def tests(run: Run) -> None:
    """pytest -m gpu, a line a test as it ends; those that skip are counted as skipped."""
    chosen = ["-m", "gpu", "-k", "not is_clean", "tests/test_gpu.py"]  # compute-sanitizer has a stage of its own
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *chosen]
    counts: dict[str, int] = {}
    said: list[str] = []
    root = Path(__file__).parent.parent
    environment = {**os.environ, "TINYLORA_CACHE": str(cache_dir())}  # whose verdicts are known
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=root, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment) as child:
        assert child.stdout is not None
        for line in child.stdout:
            said.append(line.rstrip())
            if found := re.match(r"(tests/\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR)", line):
                outcome = found[2].lower()
                counts[outcome] = counts.get(outcome, 0) + 1
                run.fact(test=found[1].removeprefix("tests/"), outcome=outcome)
    every = {f"tests_{name}": counts.get(name, 0) for name in ("passed", "failed", "skipped", "error")}
    run.fact(exit=child.returncode, **every)
    if counts.keys() == {"skipped"}:
        raise Skipped("every one of its tests does")
    if child.returncode or not counts:
        raise RuntimeError("\n".join(line for line in said if line.startswith(("E ", "FAILED", "ERROR")))[-2000:] or said[-1])


def sanitizer(run: Run) -> None:
    """compute-sanitizer over the CUDA C++ kernel, without PyTorch's cache of blocks, which hides what lies beyond one."""
    run.needs_gpu("compute-sanitizer runs GPU code")
    if shutil.which("compute-sanitizer") is None:
        raise Skipped("no compute-sanitizer on PATH")
    library.cuda_library([library.architecture(run.device)])
    check = [sys.executable, "-m", "tinylora.kernels.self_check", "--device", "cuda:0", "--checks", dispatch.CUDA_CHECKS]
    bad = []
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=decode_"]
        began = time.monotonic()
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(
            [*command, *check, "--ops", "decode_linear:bfloat16"], capture_output=True, text=True, env=environment
        )
        summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
        run.fact(tool=tool, exit=done.returncode, seconds=round(time.monotonic() - began, 1), summary=summary)
        if done.returncode:
            bad.append(f"{tool}: {(done.stdout + done.stderr)[-800:]}")
    if bad:
        raise RuntimeError("\n".join(bad))


def cuda_backend(run: Run) -> None:
    """A decode step on the CUDA C++ kernel beside the padded product, replayed: time, and how far their log-probs are apart."""
    run.needs_gpu("the CUDA C++ kernel is a GPU's")
    for slots in (16, 64):
        found = {}
        for name in ("padded", "cuda"):
            with run.backend(name):
                dispatch.prove(run.device)
                torch.manual_seed(1)
                with decoding(run, slots, 384, 1) as s:
                    s.step(slots, 448)
                    logp = s.logprobs[:-1].view(slots, -1)[:, 0].clone()
                    tokens = s.tokens[:-1].view(slots, -1)[:, 0].clone()
                    found[name] = (run.clock(lambda s=s, n=slots: [s.step(n, 448) for _ in range(8)]) / 8 * 1e3, logp, tokens)
        (padded, a, x), (cuda, b, y) = found["padded"], found["cuda"]
        same = x == y
        difference = (a - b)[same].abs().max().item() if same.any() else None
        run.fact(
            slots=slots,
            padded_ms=padded,
            cuda_ms=cuda,
            ratio=cuda / padded,
            tokens_equal=int(same.sum()),
            logp_difference=difference,
        )


def autotune(run: Run) -> None:
    """Every tile of the fused linear's table at the model's shapes, beside the bare product."""
    run.needs_gpu("the fused linear's tiles are a GPU's")
    config = ops_bench.MODELS["Qwen2.5-7B"]
    from triton.testing import do_bench

    for rows in (64, 256, 2048, 16384):
        for group in ops_bench.GROUPS:
            n, k = sum(config.shape(p)[0] for p in group), config.shape(group[0])[1]
            x, weight = (torch.randn(size, k + 64, device=run.device, dtype=run.dtype)[:, :k] for size in (rows, n))
            z, Bt = (
                torch.randn(rows, 16, device=run.device, dtype=run.dtype),
                torch.randn(6, n, device=run.device, dtype=run.dtype),
            )
            y = torch.empty(rows, n, device=run.device, dtype=run.dtype)
            capability = fused_linear._capability(run.device)
            tma = fused_linear.takes_tma(capability, x, weight, y)
            launch = fused_linear._run_tma if tma else fused_linear._run_pointers
            bare = do_bench(lambda x=x, w=weight, y=y: torch.mm(x, w.T, out=y), return_mode="median")
            for entry in fused_linear.tiles(capability, tma):
                options = fused_linear._options(entry)
                call = partial(launch, x, z[:, :6], weight, Bt, None, y, options)
                ms = do_bench(call, return_mode="median")
                run.fact(rows=rows, n=n, k=k, tma=tma, tile=list(entry[1:]), us=ms * 1e3, x_bare=ms / bare)


def compiled(run: Run) -> None:
    """The linears' eager formula under torch.compile beside ours."""
    measured(run, compiled=True)


def real_model(run: Run) -> None:
    """A real checkpoint, where TINYLORA_REAL_MODEL names its directory: loads, samples, and both sides' log-probs agree."""
    directory = os.environ.get("TINYLORA_REAL_MODEL")
    if not directory:
        raise Skipped("TINYLORA_REAL_MODEL names no directory")
    decoder = load_model(directory, str(run.device), str(run.dtype).removeprefix("torch."))
    text = Text(decoder.path)
    questions = ("Ann has 23 pens and loses 7. How many has she?", "What is 12 times 12?")
    prompts = [text.prompt([{"role": "user", "content": q}]) for q in questions]
    began = time.perf_counter()
    completions = rollout(decoder, None, prompts, 8, Sampling(64, eos_ids=text.eos_ids))
    spent, tokens = time.perf_counter() - began, sum(len(c.tokens) for c in completions)
    with torch.no_grad():
        hidden, targets = hidden_states(decoder, None, [p for p in prompts for _ in range(8)], completions, range(16))
        logp, _ = token_logprobs(hidden, decoder.head, targets)
    sampled = torch.tensor([x for c in completions for x in c.logprobs], device=logp.device)
    run.fact(
        model=decoder.path.name,
        tokens=tokens,
        tokens_per_second=tokens / spent,
        logp_difference_mean=(logp - sampled).abs().mean().item(),
        first=text.decode(completions[0].tokens)[:200],
    )
