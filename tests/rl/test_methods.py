"""The methods and SFT against oracles computed without this project: transformers, PEFT and the formula written out."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.engine.rollout import Completion
from tinylora.errors import InputError
from tinylora.kernels.layer_linear import layer_linear
from tinylora.kernels.products import pad_rows
from tinylora.loading import load_adapter
from tinylora.model.loader import load_model
from tinylora.rl.baselines import LORA_ALPHA, Baseline
from tinylora.rl.config import TrainConfig, preset
from tinylora.rl.dry_run import trained_numbers
from tinylora.rl.memory import MemoryPlan
from tinylora.rl.sft import sft_update
from tinylora.rl.solutions import solution
from tinylora.rl.trainer import Trainer

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7]]
ANSWERS = [[20, 21, 22, 23], [30], [24, 25]]
PLAN = MemoryPlan(0, 0, 0, 1, 10, 0)  # several parts
KINDS = ["tinylora", "lora_xs", "lora", "full"]


def trainer(tmp_path, resume=False, **changes) -> Trainer:
    small = {"max_steps": 3, "eval_size": 0, "prompts_per_step": 4, "num_generations": 4, "output_dir": str(tmp_path)}
    chosen = {"method": changes.get("method", "tinylora"), "algorithm": changes.get("algorithm", "grpo")}
    return Trainer(TrainConfig(**(preset(**chosen) | small | changes)), resume=resume)


def hf_loss(network) -> torch.Tensor:
    """Mean next-token loss by transformers' own labels."""
    rows = [p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    labels = torch.full_like(ids, -100)
    for i, (p, r) in enumerate(zip(PROMPTS, rows, strict=True)):
        labels[i, len(p) : len(r)] = ids[i, len(p) : len(r)]
    return network(input_ids=ids, attention_mask=mask, labels=labels).loss


def ours(policy):
    for p in policy.named_parameters().values():
        p.grad = None
    return sft_update(policy, PROMPTS, [Completion(a, [], True) for a in ANSWERS], PLAN), {
        n: p.grad for n, p in policy.named_parameters().items()
    }


def check_accuracy(found: dict, plain: dict, exact: dict) -> None:
    """The largest relative error of `found` is at most twice that of `plain`, the peer's in fp32; `exact` is in fp64."""

    def error(values: dict) -> float:
        far = [(values[k].double() - x).norm() / x.norm().clamp_min(1e-30) for k, x in exact.items()]
        return max(float(f) for f in far)

    assert exact.keys() == found.keys() == plain.keys()
    assert error(found) <= 2 * error(plain) < 1e-4, (error(found), error(plain))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_lora_and_full_are_pefts_and_transformers(tiny_model, method):
    """Loss and every gradient of SFT; and after a step the Decoder that rolls out is the model that was trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    path = tiny_model("qwen2")
    model = load_model(str(path))
    policy = Baseline(model, method, 2, ("q_proj", "down_proj"), seed=3)
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if method == "lora":
        config = LoraConfig(r=2, lora_alpha=LORA_ALPHA, target_modules=["q_proj", "down_proj"])
        network = get_peft_model(network, config)
    with torch.no_grad():
        for name, p in policy.named_parameters().items():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
            dict(network.named_parameters())[name].copy_(p)
    ids = torch.tensor([[1, 2, 3, 4, 5]])

    def theirs(network) -> dict:
        loss = hf_loss(network)
        loss.backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
        return {"loss": loss.detach(), "logits": network(ids).logits.detach(), **gradients}

    exact, plain = theirs(copy.deepcopy(network).double()), theirs(network)
    metrics, gradients = ours(policy)
    policy.matrices()
    check_accuracy({"loss": torch.tensor(metrics["loss"]), "logits": model.logits(ids), **gradients}, plain, exact)


def test_every_weight_has_its_place(tiny_model):
    for family in ("qwen2", "qwen3", "llama"):
        model = load_model(str(tiny_model(family)))
        assert set(model.tensors()) == set(model.digests)


def test_sft_of_the_adapter_is_the_merged_models(tiny_model):
    """Loss and dv against autograd through transformers on W + B M A, with v as its leaf."""
    from torch.func import functional_call
    from transformers import AutoModelForCausalLM

    path = tiny_model("qwen2")
    adapter = Adapter(load_model(str(path)), TinyLoRAConfig(u=3, n_tie=4))
    with torch.no_grad():
        adapter.v += 0.1 * torch.randn(adapter.v.shape, generator=torch.Generator().manual_seed(0))

    def theirs(dtype: torch.dtype) -> tuple:
        network = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        weights, v = dict(network.named_parameters()), adapter.v.detach().to(dtype, copy=True).requires_grad_()
        for name, g in adapter.parts.group_of.items():
            a, b = (x.to(dtype) for x in adapter.parts.factors[name])
            m = torch.einsum("u,uij->ij", v[g], adapter.parts.projections[name].to(dtype))
            weights[f"{name}.weight"] = weights[f"{name}.weight"].detach() + b @ m @ a
        loss = hf_loss(lambda **k: functional_call(network, weights, kwargs=k))
        loss.backward()
        return network, weights, {"loss": loss.detach(), "v": v.grad}

    network, weights, plain = theirs(torch.float32)
    _, _, exact = theirs(torch.float64)
    metrics, gradients = ours(adapter)
    check_accuracy({"loss": torch.tensor(metrics["loss"]), **gradients}, plain, exact)
    right = total = 0
    with torch.no_grad():
        for p, a in zip(PROMPTS, ANSWERS, strict=True):
            best = functional_call(network, weights, kwargs={"input_ids": torch.tensor([p + a])}).logits[0].argmax(-1)
            right += sum(best[len(p) - 1 + i].item() == t for i, t in enumerate(a))
            total += len(a)
    assert metrics["mean_token_accuracy"] == right / total


def test_lora_xs_is_a_trained_core(tiny_model, tmp_path):
    """W' = W + B R A with R = v of its module, row by row; the saved adapter comes back as it was."""
    model = load_model(str(tiny_model("qwen2")))
    config = TrainConfig(method="lora_xs", r=2, u=13, n_tie="all").adapter
    adapter = Adapter(model, config)
    assert adapter.v.shape == (14, 4)
    with torch.no_grad():
        adapter.v += torch.randn(adapter.v.shape, generator=torch.Generator().manual_seed(0))
    x, layer = torch.randn(5, 32), model.layers[1].o
    name = "model.layers.1.self_attn.o_proj"
    core = adapter.v.detach()[adapter.parts.group_of[name]].view(2, 2)
    a, b = adapter.parts.factors[name]
    m = adapter.matrices()[5]
    assert m is not None
    want = F.linear(x.double(), layer.weight.double() + b.double() @ core.double() @ a.double())
    plain = F.linear(x, layer.weight + b @ core @ a)
    y = layer_linear(pad_rows(x), layer.weight, layer.bias, layer.A, layer.Bt, m.detach())[:5]
    check_accuracy({"y": y}, {"y": plain}, {"y": want})
    adapter.save(tmp_path / "a")
    assert torch.equal(load_adapter(tmp_path / "a", model).v, adapter.v)
    with pytest.raises(InputError, match="u = r"):
        TinyLoRAConfig(u=3, projection="identity")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("algorithm", ["grpo", "sft", "es"])
def test_the_v_in_use_is_rounded_every_step(tmp_path, dtype, algorithm):
    run = trainer(tmp_path, param_dtype=dtype, algorithm=algorithm)
    run.train()
    steps = [r for r in run.run_directory.rows if "step_time" in r]
    assert len(steps) == 3
    for row in steps:
        v = torch.tensor(row["adapter/v"])
        assert v.abs().max() > 0 and torch.equal(v, v.to(getattr(torch, dtype)).float())
    master = run.policy.v.detach()
    assert not torch.equal(master, master.to(getattr(torch, dtype)).float()), "the optimizer's copy stays fp32"
    m = next(x for x in run.policy.matrices() if x is not None)
    want = next(x for x in run.policy.matrices(v.view_as(master)) if x is not None)
    assert torch.equal(m, want), "what rolls out is the rounded v"


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("algorithm", ["grpo", "sft", "es"])
def test_every_pair_trains_and_resumes_bit_for_bit(tmp_path, method, algorithm):
    if algorithm == "es" and method in ("lora", "full"):
        with pytest.raises(InputError, match="--algorithm es"):
            trainer(tmp_path, method=method, algorithm=algorithm)
        return
    settings = {"method": method, "algorithm": algorithm}
    whole = trainer(tmp_path / "whole", **settings)
    assert whole.train() and (tmp_path / "whole" / "adapter").is_dir()
    broken = trainer(tmp_path / "broken", **settings)
    broken.record(broken._train_step())
    again = trainer(tmp_path / "broken", resume=True, **settings)
    assert again.step == 1 and again.train()
    for name, p in whole.policy.named_parameters().items():
        assert torch.equal(p, again.policy.named_parameters()[name]), name
        assert p.grad is not None and p.grad.count_nonzero() > 0
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any(r["grad_norm"] > 0 for r in rows)  # four greedy answers to a prompt may all be alike


@pytest.mark.parametrize("source", ["own", "foreign"])
def test_sft_data(tmp_path, source):
    run = trainer(tmp_path, algorithm="sft", sft_data=source)
    row = run._train_step()
    assert ("reward" in row) == (source == "own") and row["loss"] > 0
    if source == "own":  # the base samples them, whatever v has become
        assert row["mean_token_accuracy"] > 0.5


def test_real_solutions(tmp_path, text_model):
    """GSM8K's without calculator marks; too long ones are left out; a clear error where there are none."""
    lines = ["Half of 48 is <<48/2=24>>24.\n#### 24", "long " * 100 + "\n#### 2", *["1 + 1 is 2\n#### 2"] * 10]
    rows = [{"question": f"What is {i}?", "answer": answer} for i, answer in enumerate(lines)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = {"max_steps": 1, "prompts_per_step": 2, "eval_size": 0, "max_completion_length": 40, "n_tie": 4, "data": str(file)}
    settings = {"model": str(text_model(["What is 48?", *lines[2:]])), "algorithm": "sft", **few}
    run = Trainer(TrainConfig(**settings, output_dir=str(tmp_path / "a")))
    assert [r["prompt"][-1]["content"][:10] for r in run.train_rows[:2]] == ["What is 0?", "What is 2?"], "1 is too long"
    tokens = solution(run.train_rows[0], run.text, "given").tokens
    assert run.text.decode(tokens) == "Half of 48 is 24.\n#### 24" and tokens[-1] in run.text.eos_ids
    assert run._train_step()["loss"] > 0
    file.write_text("".join(json.dumps({"prompt": row["question"], "answer": "2"}) + "\n" for row in rows))
    with pytest.raises(InputError, match="no column 'solution'"):
        Trainer(TrainConfig(**settings, dataset="mine", output_dir=str(tmp_path / "b")))


def test_dry_run_counts_what_is_trained(tiny_model):
    """As many numbers as the baselines hold."""
    for family in ("qwen2", "qwen3", "llama"):
        path = tiny_model(family)
        model = load_model(str(path))
        for method in ("lora", "full"):
            c = TrainConfig(model=str(path), method=method)
            assert trained_numbers(c, model.config) == Baseline(model, method, c.r, c.target_modules, 0).num_parameters


def test_a_larger_base_is_built_and_trained_on(tmp_path):
    """--size, in two steps of pretraining; then --model DIR --dataset builtin."""
    from tinylora.demo.pretrain import SIZES, pretrain

    pretrain(tmp_path / "base", steps=2, batch_size=2, size="medium")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == SIZES["medium"]
    few = {"prompts_per_step": 2, "num_generations": 2, "max_steps": 1, "eval_size": 8, "max_completion_length": 24}
    run = Trainer(TrainConfig(model=str(tmp_path / "base"), dataset="builtin", **few, output_dir=str(tmp_path / "run")))
    assert run.train()
