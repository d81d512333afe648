"""What the benchmarks say, at tiny shapes: shapes, floors, peaks, turns. And the times themselves, by pytest-benchmark."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench import attach, decode, layers, measure, ops, report, verdicts
from bench.measure import Rounds, call_seconds, in_turns, peak_extra_bytes
from bench.models import model_directory
from bench.ops import MODELS, check_agreement, head_case, linear_case, norm_case, swiglu_case
from tinylora.adapter.basis import truncated_svd
from tinylora.engine.text import Text
from tinylora.model.loader import load_model
from tinylora.tasks.bases import BUILTIN

F32 = torch.float32
RESULTS = Path(__file__).parents[2] / "bench" / "results"
PASSES = ("forward", "forward+backward")
SHORT = pytest.mark.benchmark(max_time=0.1, min_rounds=3)  # enough to see a time, and to test what was timed


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of hidden 64, intermediate 96, 4 heads and 2 KV heads of 16, 128 tokens."""
    monkeypatch.setattr(measure, "ROUND_SECONDS", 0)
    monkeypatch.setitem(MODELS, "tiny", ops._config("qwen2", 64, 96, 4, 2, 128))
    torch.manual_seed(0)


def qkv(rows: int = 32, sets: int = 2) -> ops.Case:
    return linear_case("tiny", 0, rows, "cpu", F32, compiled=False, sets=sets)


def test_shapes_of_the_models() -> None:
    """Fused (N, K) of qkv, o, gate+up and down, as in the models' own checkpoints."""
    want = {
        "Qwen2.5-0.5B": [(1152, 896), (896, 896), (9728, 896), (896, 4864)],
        "Qwen2.5-1.5B": [(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960)],
        "Qwen2.5-7B": [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)],
        "Llama-3-8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    }
    for model, shapes in want.items():
        config = MODELS[model]
        assert [(sum(config.shape(p)[0] for p in g), config.shape(g[0])[1]) for g in ops.GROUPS] == shapes


@SHORT
@pytest.mark.parametrize("group", range(4))
@pytest.mark.parametrize("what", ["forward", "both"])
def test_adapted_linear(benchmark, group: int, what: str) -> None:
    case = linear_case("tiny", group, 32, "cpu", F32, compiled=False, sets=1)
    check_agreement(case)
    (x, dy), contender = case.inputs[0], case.contenders["ours, addmm"][0]
    found = benchmark(lambda: contender.forward(x) if what == "forward" else contender.both(x, dy)[1])
    want = case.contenders["eager"][0].both(x, dy)[0 if what == "forward" else 1]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    bare = case.contenders["bare"][0]
    for each in (contender, bare):  # gradients by plain autograd, with none of the benchmark's own calls
        leaf = x.clone().requires_grad_()
        each.function(leaf).backward(dy)
        torch.testing.assert_close(each.both(x, dy)[1], leaf.grad)
    assert (found - (bare.forward(x) if what == "forward" else bare.backward(dy))).norm() > 0.1 * found.norm()


@SHORT
@pytest.mark.parametrize("make", [norm_case, swiglu_case])
def test_row_op(benchmark, make) -> None:
    case = make("tiny", 32, "cpu", F32, 1)
    check_agreement(case)
    x, dy = case.inputs[0]
    _, dx = benchmark(case.contenders["ours"][0].both, x, dy)
    h, want = case.contenders["plain"][0].both(x, dy)
    torch.testing.assert_close(dx, want, rtol=1e-5, atol=1e-5)
    with_z = case.contenders["ours, with z"][0].forward(x)  # the same rows, and more beside them
    torch.testing.assert_close(with_z[:, : h.shape[1]], h, rtol=1e-5, atol=1e-5)
    assert with_z.shape[1] > h.shape[1]


def test_contenders_are_the_ones_promised() -> None:
    ours = [f"{whole}, {backend}" for backend in ("addmm", "native") for whole in ("ours", "engine")]
    assert list(qkv().contenders) == ["bare", *ours, "eager", "PEFT TinyLoRA", "PEFT LoRA r=8"]
    assert list(norm_case("tiny", 8, "cpu", F32, 1).contenders) == ["plain", "ours", "F.rms_norm", "ours, with z"]
    trained = {name: sum(p.numel() for p in c[0].trained) for name, c in qkv().contenders.items()}
    # M of 3 segments, the dense 6 x 6 M, u=13, and A and B of rank 8; the engine's map has no M to train
    assert trained == {
        "bare": 0,
        **{name: 4 * 4 * name.startswith("ours") for name in ours},
        "eager": 36,
        "PEFT TinyLoRA": 13,
        "PEFT LoRA r=8": 8 * (64 + 128),
    }


def test_a_contender_that_computes_something_else_is_not_timed() -> None:
    case = qkv()
    case.contenders["ours, addmm"] = case.contenders["bare"]
    with pytest.raises(RuntimeError, match=r"tiny qkv 64->128, T 32: .* differs .* nothing was timed"):
        ops.measure(case, (1e9, 1e9), "cpu", 3)


def test_rows_are_what_they_say() -> None:
    """Against arithmetic by hand: K 64, N 128, T 32, rank 6, four bytes a number."""
    rates = (1e9, 1e12)  # FLOP alone make the floor
    rows = ops.measure(qkv(), rates, "cpu", 3, most=math.inf)
    assert [(r["pass"], r["implementation"]) for r in rows] == list(itertools.product(PASSES, qkv().contenders))
    for row in rows:
        passes = 1 if row["pass"] == "forward" else 2
        flop = passes * 2 * 32 * (64 * 128 + 6 * (64 + 128))
        moved = passes * 4 * (64 * 128 + 32 * (64 + 128) + 6 * (64 + 128))
        seconds = row["us"]["median"] / 1e6
        assert row["tflops"] == pytest.approx(flop / seconds / 1e12)
        assert row["gbytes_per_second"] == pytest.approx(moved / seconds / 1e9)
        assert row["x_floor"] == pytest.approx(seconds / (flop / 1e9))
        (bare,) = (r for r in rows if r["implementation"] == "bare" and r["pass"] == row["pass"])
        assert row["x_bare"] == pytest.approx(row["us"]["median"] / bare["us"]["median"], rel=0.5)  # of turns, not of medians
        assert row["us"]["p20"] <= row["us"]["median"] <= row["us"]["p80"] and row["timings"] >= 3
    slow = ops.measure(qkv(), (1e15, 1e6), "cpu", 3, most=math.inf)[0]  # bytes alone
    assert slow["x_floor"] == pytest.approx(slow["us"]["median"] / (4 * (64 * 128 + 32 * 192 + 6 * 192)))


def test_peak_extra_memory_of_the_forward() -> None:
    """Bare holds y; eager y, the correction and their sum; ours adds into y and holds t, z and a block-diagonal M."""
    y = 4 * 32 * 128
    rows = ops.measure(qkv(), (1, 1), "cpu", 3, math.inf)
    peaks = {r["implementation"]: r["peak_extra_bytes"] for r in rows if r["pass"] == "forward"}
    assert peaks["bare"] == y
    assert 3 * y <= peaks["eager"] <= 3 * y + 2 * 4 * 32 * 6
    assert y < peaks["ours, addmm"] <= y + 2 * 4 * 32 * 8 + 2 * 4 * 64


def test_peak_extra_bytes_counts_what_lives_at_one_moment() -> None:
    big, small = 1 << 20, 1 << 18

    def one_after_the_other() -> None:
        torch.empty(big, dtype=torch.uint8)
        torch.empty(big, dtype=torch.uint8)

    assert peak_extra_bytes(one_after_the_other) == big
    assert peak_extra_bytes(lambda: [torch.empty(n, dtype=torch.uint8) for n in (big, small)]) == big + small
    x = torch.ones(big // 4, requires_grad=True)
    # exp's result lives in autograd alone: no Python name, and still it is there when the cosine's is made
    assert peak_extra_bytes(lambda: x.exp().cos()) == 2 * big
    with torch.no_grad():
        assert peak_extra_bytes(lambda: x.exp().cos().sin()) == 2 * big
    assert peak_extra_bytes(lambda: None) == 0


def test_the_head_reports_a_share_of_the_logits() -> None:
    rows = ops.measure(head_case("tiny", 16, "cpu", F32), (1, 1), "cpu", 3, math.inf)
    shares = {r["implementation"]: r["share_of_logits"] for r in rows if r["pass"] == "forward"}
    # at once: the logits, their log-softmax, and the 16 results
    assert 2 <= shares["plain"] <= 2 + 2 / 128
    assert shares["ours"] > 1  # so few logits fit one chunk


def test_turns_rotate_who_begins_and_which_inputs() -> None:
    seen = []
    calls = {name: lambda j, name=name: seen.append((name, j)) for name in "abc"}
    seconds, dropped = in_turns(calls, sets=2, rounds=2, most=math.inf)
    assert dropped == 0 and {n: len(s) for n, s in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    warm, timed = seen[:6], seen[6:]
    assert warm == [("a", 0), ("b", 0), ("c", 0)] * 2
    assert timed == [*zip("abc", [0] * 3, strict=True), *zip("bca", [1] * 3, strict=True), *zip("cab", [0] * 3, strict=True)]


def test_rounds_that_others_disturb_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = iter([0.5, 0.01, 0.2, 0.03, 0.05, 0.04])  # of the machine; the first is warm-up
    monkeypatch.setattr(measure.Load, "others", lambda self: next(loads) * (os.cpu_count() or 1))
    rounds = Rounds(warm_up=1)
    assert [rounds.keep() for _ in range(6)] == [False, True, False, True, False, True]
    assert (rounds.kept, rounds.dropped) == (3, 2)
    monkeypatch.setattr(measure.Load, "others", lambda self: os.cpu_count() or 1)
    seconds, dropped = in_turns({"a": lambda j: None}, sets=1, rounds=4)
    assert seconds == {"a": []} and dropped == 12  # gives up
    with pytest.raises(SystemExit, match="under 3 timings, 12 rounds dropped"):
        ops.measure(qkv(), (1, 1), "cpu", 4)


def test_a_call_is_timed_by_its_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10.0, 16.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(ticks))
    seen = []
    assert call_seconds(seen.append, 5, 3, "cpu") == 2.0 and seen == [5, 6, 7]


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A table, and one JSON object as the last line and in the file."""
    monkeypatch.setattr(ops, "cases", lambda *_: iter([qkv(), norm_case("tiny", 8, "cpu", F32, 2)]))
    monkeypatch.setattr(ops, "gemm_rate", lambda *_: 2e9)
    monkeypatch.setattr(ops, "copy_rate", lambda *_: 3e9)
    file = tmp_path / "new" / "ops.json"
    ops.main(["--device", "cpu", "--rounds", "3", "--busy", "99", "--only", "qkv", "--json", str(file)])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result == json.loads(file.read_text())
    assert (result["bench"], result["gemm_gflops"], result["copy_gbytes_per_second"]) == ("ops", 2.0, 3.0)
    assert {r["case"] for r in result["rows"]} == {"tiny qkv 64->128, T 32"} and len(result["rows"]) == 2 * len(
        qkv().contenders
    )
    assert sum("ours, addmm" in line for line in lines[:-1]) == 2


def test_input_sets_are_beyond_the_cache() -> None:
    """Twice the cache between two uses of one set, where 64 sets do it."""
    assert [ops._sets(one, 50_000_000) for one in (2_000_000, 10**9, 10**5)] == [51, 2, 64]
    assert ops._sets(10**6, 0) == 2


def test_attach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The factors of 14 small weights, and a residual that sees a wrong one."""
    kept = os.environ["TINYLORA_CACHE"]
    attach.main(["--model", "tiny", "--layers", "2", "--device", "cpu", "--json", str(tmp_path / "attach.json")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "attach.json").read_text())
    assert (result["bench"], result["weights"], os.environ["TINYLORA_CACHE"]) == ("attach", 14, kept)
    assert 0 < result["worst_residual"] <= 1e-6 and result["cold_seconds"] > result["warm_seconds"] > 0
    # A and B of 14 modules in fp32 and a header
    numbers = sum(2 * sum(w.shape) for w in attach.gaussian(2, "tiny", "cpu").values())
    assert 4 * numbers < result["cache_bytes"] < 4 * numbers + 10_000

    weight = attach.gaussian(1, "tiny", "cpu")["model.layers.0.self_attn.q_proj"]
    a, b = truncated_svd(weight, 2)
    assert attach.residual(weight, a, b) <= 1e-6
    assert attach.residual(weight, a, b.flip(0)) > 0.1
    mixed = torch.eye(64)[:2]  # W a = b holds for any a; that b is a left singular vector does not
    assert attach.residual(weight, mixed, weight @ mixed.T) > 0.1
    b = torch.eye(64)[:, :2]  # and the other way round: W^T u = sigma a alone
    assert attach.residual(weight, (weight.T @ b).T, b) > 0.1


def test_verdicts_show_numbers_and_set_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def case(error: float | None, allowed: float, same: bool = True) -> dict:
        return {"case": f"{allowed}", "error": error, "plain": 1e-3, "allowed": allowed, "same_bits": same}

    half, full = "bfloat16", "float32"
    found = {
        ("good", half): {"op": "good", "dtype": half, "error": None, "cases": [case(0.02, 0.5), case(0.01, 0.1, same=False)]},
        ("bad", full): {"op": "bad", "dtype": full, "error": "wrong", "cases": [case(0.5, 0.6), case(None, 1.0)]},
        ("hung", half): {"op": "hung", "dtype": half, "error": "no answer within 40 s"},
    }
    monkeypatch.setattr(verdicts.dispatch, "prove", lambda *_: found)
    assert verdicts.main(["--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["verdicts"] == list(found.values())
    cells = [line.split() for line in lines[2:-1]]
    # 0.01 of 0.1 is worse than 0.02 of 0.5
    assert ["good", "bfloat16:", "passed", "1.0e-02", "1.0e-03", "1.0e-01", "no", "0.1"] in cells
    assert ["bad", "float32:", "wrong", "not", "finite", "1.0e-03", "1.0e+00", "yes", "1.0"] in cells
    assert ["hung", "bfloat16:", "no", "answer", "within", "40", "s"] in cells
    for some, status in (({("good", half): found["good", half]}, 0), ({}, 1)):
        monkeypatch.setattr(verdicts.dispatch, "prove", lambda *_, some=some: some)
        assert verdicts.main(["--device", "cpu"]) == status


def committed(kind: str, model: str = "builtin") -> dict:
    found = [r for r in map(json.loads, (f.read_text() for f in RESULTS.glob("*.json"))) if r["bench"] == kind]
    (result,) = (r for r in found if r["model"] == model)
    return result


def page(name: str) -> str:
    return (RESULTS.parent.parent / name).read_text()


def between(text: str, begin: str, end: str) -> str:
    return text[text.index(begin) + len(begin) : text.index(end)]


def test_the_pages_say_what_the_committed_results_say(tmp_path: Path) -> None:
    """`python -m bench.report` would change nothing, and puts back whatever was changed by hand."""
    shutil.copytree(RESULTS, tmp_path / "bench" / "results")
    (tmp_path / "docs").mkdir()
    said = {name: page(name) for name in report.PAGES}
    step = committed("step")["seconds"]["step/ours"]["median"] * 1e3
    assert f"| whole step, tinylora | {step:,.0f} |" in between(said["docs/benchmarks.md"], report.BEGIN, report.END)
    assert f"| {step:.0f} ms |" in between(said["README.md"], report.BEGIN, report.END)
    markers = {
        "README.md": [report.BEGIN, report.GPU[0]],
        "docs/benchmarks.md": [report.BEGIN],
        "docs/speed.md": [report.GPU[0]],
    }
    for changed in (False, True):
        for name, text in said.items():
            for begin in markers[name] if changed else ():
                text = text.replace(begin, begin + "old")
            (tmp_path / name).write_text(text)
        report.main(tmp_path)
        assert {name: (tmp_path / name).read_text() for name in said} == said
    readme = said["README.md"]
    for broken in (readme.replace(report.END, ""), readme + report.BEGIN):
        with pytest.raises(ValueError, match="needs one <!-- bench -->"):
            report.replace_section(broken, "")


def test_the_readme_is_short() -> None:
    """Under 14 kB, and five rows of numbers at most."""
    readme = page("README.md")
    assert len(readme.encode()) < 14_000
    header, rule, *rows = between(readme, report.BEGIN, report.END).strip().splitlines()
    assert 1 <= len(rows) <= 5 and rule == "| --- | --- | --- | --- |"


def test_the_readmes_example_is_the_first_of_the_documented_seeds() -> None:
    """What the README shows of seed 0 stands in the table of seeds, and that table's trained numbers in the controls' too."""
    example = between(page("README.md"), "<!-- example -->", "<!-- /example -->")
    sampled, greedy = ([x for x in line.split() if "%" in x] for line in example.splitlines() if ", strict" in line)
    rows = [
        line.split(" | ")
        for line in page("docs/training.md").splitlines()
        if line.startswith(tuple(f"| {i} |" for i in range(5)))
    ]
    base, trained, gain, low, high = (x.strip("[]%,") for x in sampled)
    first = rows[0]
    assert first[1:3] == [f"{base} %", f"{trained} %"] and first[3] == f"{gain} [{low.lstrip('+')}, {high.lstrip('+')}]"
    assert [first[4], first[5].strip(" |")] == [f"{x.strip('%')} %" for x in greedy[:2]]
    controls = page("docs/reproducing.md")
    for seed, before, after, _, _, after_greedy in rows:
        number = [x.strip(" %|") for x in (before, after, after_greedy)]
        assert f"{seed} | {number[0]} | {number[1]} / {number[2]} |" in controls


def some_ops() -> dict:
    def row(case: str, what: str, name: str, us: float, bare: float | None) -> dict:
        return {
            "case": case,
            "pass": what,
            "implementation": name,
            "us": {"median": us},
            "x_bare": bare,
            "peak_extra_bytes": 2e6,
        }

    rows = [row("qkv", p, name, 10.0, x) for p in PASSES for name, x in (("bare", 1.0), ("ours", 1.04), ("eager", 1.2))]
    rows += [row("o", "forward", name, 10.0, x) for name, x in (("bare", 1.0), ("ours", 0.97))]
    rows += [row("norm", "forward+backward", "ours", 1234.6, None)]
    return {**measure.card(), "bench": "ops", "device": "cpu", "rows": rows}


def test_tables_of_ops() -> None:
    text = report.ops_tables(some_ops())
    assert "| x bare linear: forward / forward + backward | ours | eager |" in text
    assert "| qkv | 1.04 / 1.04 | 1.20 / 1.20 |" in text
    assert "| o | 0.97 /  |  /  |" in text  # what was not measured is empty
    assert "| norm | 1,235 us, 2 MB |" in text


def test_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in "ab":
        report.draw([some_ops()], tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()[:1000]


def test_decode_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Rows of every contender there is on a CPU, shares of the bandwidth measured, and nothing timed where one is wrong."""
    monkeypatch.setattr(decode, "copy_rate", lambda *_: 2e9)
    file = tmp_path / "decode.json"
    arguments = ["--device", "cpu", "--models", "tiny", "--rounds", "3", "--busy", "99", "--rows"]
    decode.main([*arguments, "1", "8", "--json", str(file)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(file.read_text()) and result["copy_gbytes_per_second"] == 2.0
    names = {"bare", "cuBLAS + low rank", "shrink + padded", "padded", "decode_linear"}
    assert len(result["rows"]) == 2 * 4 * len(names) and {r["implementation"] for r in result["rows"]} == names
    for row in result["rows"]:
        assert row["share_of_copy"] == pytest.approx(row["gbytes_per_second"] / 2.0)
    row = next(r for r in result["rows"] if r["case"] == "tiny gate_up 64->192, T 8")
    moved = 4 * (192 * 64 + (8 + 2 * 2) * (192 + 64))  # W; x and y; A and B
    assert row["gbytes_per_second"] == pytest.approx(moved / row["us"]["median"] / 1e3)
    monkeypatch.setattr(decode, "decode_linear", lambda x, group, c: x @ group.weight.T)
    with pytest.raises(RuntimeError, match="qkv .*: decode_linear differs by .*; nothing was timed"):
        decode.main([*arguments, "8"])


def test_layers_bench_steps_all_contenders_alike(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Two layers of the tiny model: the bench's own checks pass (equal losses, equally many trained numbers), and its result
    has a table."""
    layers.main(["--model", "tiny", "--layers", "2", "--tokens", "16", "--rounds", "3", "--json", str(tmp_path / "r.json")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "r.json").read_text())
    assert list(result["contenders"]) == ["bare", "attached", "PEFT"]
    for entry in result["contenders"].values():
        assert entry["peak_extra_bytes"] > 0 and entry["processor_seconds"]["median"] > 0
        entry |= {"seconds": {"median": 0.002}, "x_bare": 1.5}  # a busy machine may leave no undisturbed round
    table = report.layers_table(result).splitlines()
    assert len(table) == 5 and all(line.startswith("|") for line in table) and "| attached | 2 | 1.50 |" in table[3]


def test_layers_bench_of_a_directory_has_its_first_layers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A copy of the built-in base, as any Hugging Face directory: two of its layers, its own weights and vocabulary."""
    path = shutil.copytree(BUILTIN, tmp_path / "copy")
    whole, first = (layers.make_model(str(path), n) for n in (99, 2))
    assert len(whole.model.layers) == whole.config.num_hidden_layers == 4 and len(first.model.layers) == 2
    stored, mine = load_file(path / "model.safetensors"), first.state_dict()
    assert all(torch.equal(mine[name], stored[name].float()) for name in stored if "layers.1." in name)
    layers.main(["--model", str(path), "--layers", "2", "--tokens", "16", "--rounds", "3"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["model"], result["layers"], list(result["contenders"])) == ("copy", 2, ["bare", "attached", "PEFT"])


def test_a_gguf_is_a_directory_for_both_sides(tmp_path: Path) -> None:
    from gguf_files import write_gguf
    from transformers import AutoModelForCausalLM

    file = write_gguf(tmp_path / "m.gguf", "llama", "Q4_K", tied=True)
    path = model_directory(str(file), tmp_path, F32)
    theirs, ours = AutoModelForCausalLM.from_pretrained(path, dtype=F32).state_dict(), load_model(str(file), "cpu").tensors()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    text, copied = Text(file), Text(path)
    messages = [{"role": "user", "content": "It's 17 + 25"}]
    assert text.prompt(messages) == copied.prompt(messages) and text.eos_ids == copied.eos_ids


def test_any_other_model_is_one_line_that_names_the_choices(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    for name, says in ((tmp_path, "choose builtin, tiny, .* or a GGUF file$"), (tmp_path / "notes.txt", "no GGUF file")):
        with pytest.raises(SystemExit, match=says) as found:
            model_directory(str(name), tmp_path, F32)
        assert "\n" not in str(found.value)


# ---- generation and memory ----------------------------------------------------------------------------------------------


def test_a_childs_peak_is_its_own() -> None:
    """Its parent has held a gigabyte more than it ever does."""
    assert len(b"1" * 10**9) == 10**9
    command = [sys.executable, "-c", "from bench.memory import held, peak; print(peak('cpu'), held('cpu'))"]
    highest, now = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert 0.9 * now <= highest < 1


def test_rollout_counts_what_each_side_decodes(capsys, monkeypatch, tmp_path):
    """On the built-in model, cut by limits: both sides decode exactly those tokens, and the JSON holds the table."""
    from bench import rollout
    from bench.models import gsm8k_like

    arguments = ["rollout", "--prompts", "2", "--samples", "2", "--rounds", "3", "--lengths", "gsm8k", "--longest", "20"]
    monkeypatch.setattr("sys.argv", [*arguments, "--busy", "2", "--json", str(tmp_path / "out.json")])
    rollout.main()
    said, result = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert json.loads(said.splitlines()[-1]) == result
    assert result["tokens"] == {name: sum(gsm8k_like(4, 20)) for name in ("ours", "base", "generate + PEFT")}
    assert result["steps"] == 20 and 0 < result["occupied"] <= 1 and result["floor_seconds"] > 0
    assert 0 < result["mbu"] < 1 and 0 < result["host_share"] < 1
    table = report.rollout_table(result)
    assert f"| ours | {result['seconds']['ours']['median'] * 1e3:,.0f} |" in table


def test_seconds_in_methods_are_counted_while_the_block_runs():
    class Sleeper:
        def nap(self, seconds: float) -> str:
            time.sleep(seconds)
            return "awake"

    sleeper = Sleeper()
    with measure.seconds_in([(Sleeper, "nap")], "cpu") as spent:
        assert sleeper.nap(0.05) == "awake" and sleeper.nap(seconds=0.05) == "awake"
        time.sleep(0.1)
    sleeper.nap(0.1)
    assert 0.1 <= spent() < 0.18


def test_grpo_bench_counts_its_tokens_and_flop(capsys, monkeypatch, tmp_path):
    """On the built-in model, where no end token is cut off: 2 prompts x 2 samples."""
    from bench import grpo
    from tinylora.model.loader import load_model

    arguments = ["grpo", "--model", "builtin", "--prompts", "2", "--samples", "2", "--longest", "8", "--rounds", "3"]
    monkeypatch.setattr("sys.argv", [*arguments, "--json", str(tmp_path / "out.json")])
    grpo.main()
    result = json.loads((tmp_path / "out.json").read_text())
    seconds, rate = ({k: v for k, v in result[name].items()} for name in ("seconds", "tokens_per_second"))
    tokens = {name: rate[name] * seconds[name]["median"] for name in rate}
    completions = tokens["rollout"]
    assert 2 <= completions <= 32 and tokens["step"] - completions == pytest.approx(2 * (tokens["update"] - completions))
    model = load_model("builtin")
    weights = sum(g.weight.numel() for layer in model.layers for g in layer.groups)
    flop = 4 * weights * tokens["update"] + 4 * model.head.numel() * completions
    assert result["mfu"] == pytest.approx(flop / seconds["update"]["median"] / result["gemm_tflops"] / 1e12)
    assert "update: MFU" in capsys.readouterr().out


def test_gsm8k_like_lengths_have_a_tail():
    from bench.models import gsm8k_like

    lengths = gsm8k_like(4000, 1024)
    mean = sum(lengths) / len(lengths)
    assert 180 < mean < 220 and max(lengths) > 4 * mean and min(lengths) >= 8


def test_population(tmp_path, monkeypatch, capsys):
    """Two learning rates x two seeds: every contender is timed, and runs that train together stay the runs they are."""
    from bench import population

    monkeypatch.setattr(
        "sys.argv", ["population", "--members", "2", "--rounds", "2", "--busy", "99", "--json", str(tmp_path / "p")]
    )
    population.main()
    result = json.loads((tmp_path / "p").read_text())
    assert result["members"] == 4 and all(0 < r < 20 for r in result["ratios"].values())
    assert "rollout, together / solo" in capsys.readouterr().out
