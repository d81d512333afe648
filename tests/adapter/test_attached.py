"""attach(): the same function as explicit weights, nothing of the model changed, and everything people do with a model."""

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import distributed
import pytest
import torch
import torch.nn.functional as F
from foreign import IDS, TARGETS, foreign_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tinylora
from tinylora import InputError, TinyLoRAConfig, load_adapter, load_model
from tinylora.adapter.attached import TinyLoRALinear, _Matrices
from tinylora.adapter.on_decoder import Adapter

KINDS = list(TARGETS)


def attached(kind: str = "qwen2", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object):
    model = foreign_model(kind, dtype)
    config = TinyLoRAConfig(**{"u": 3, "n_tie": 4, "seed": seed, "target_modules": TARGETS[kind], **changes})
    adapter = tinylora.attach(model, config)
    adapter.load_v(some_v(adapter))
    return model, adapter


def some_v(adapter: tinylora.AttachedAdapter, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(adapter.v.shape, generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def gradient(model: nn.Module, adapter: tinylora.AttachedAdapter) -> Tensor:
    adapter.v.grad = None
    distributed.loss(model, IDS).backward()
    assert adapter.v.grad is not None
    return adapter.v.grad.clone()


class Explicit:
    """The same model with W + B M A as its weights, differentiated by autograd: nothing in common but the formula."""

    def __init__(self, kind: str, adapter: tinylora.AttachedAdapter, dtype: torch.dtype = torch.float64) -> None:
        self.model, self.adapter, self.dtype, self.kind = foreign_model(kind).to(dtype), adapter, dtype, kind

    def __call__(self, v: Tensor, ids: Tensor = IDS) -> Tensor:  # v (groups, u) -> logits
        parts, weights = self.adapter.parts, {}
        for module, (A, B) in parts.factors.items():
            M = torch.einsum("u,uij->ij", v[parts.group_of[module]], parts.projections[module].to(self.dtype))
            D = B.to(self.dtype) @ M @ A.to(self.dtype)
            own = self.model.get_parameter(f"{module}.weight")
            weights[f"{module}.weight"] = own.detach() + (D.T if self.kind == "gpt2" else D)
        return torch.func.functional_call(self.model, weights, (ids,), {"use_cache": False}).logits

    def gradient(self, v: Tensor) -> Tensor:
        v = v.to(self.dtype).requires_grad_()
        out = self(v)
        F.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        return v.grad


# ---- the function -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"r": 1, "n_tie": "all"}, {"r": 4, "u": 2, "tie_mode": "structured", "n_tie": 1}])
def test_forward_and_gradient_are_those_of_explicit_weights(kind: str, changes: dict[str, object]) -> None:
    """In fp64, to its rounding; in fp32, with at most twice the error that explicit weights have in fp32."""
    model, adapter = attached(kind, **changes)
    explicit = Explicit(kind, adapter)
    single, start = Explicit(kind, adapter, torch.float32), adapter.v.detach().clone()
    errors = torch.zeros(2, 2, dtype=torch.float64)  # ours and plain; of the logits and the gradient, over five multiples of v
    for factor in (-1.0, 0.5, -0.5, 0.75, 1.0):
        v = factor * start
        adapter.load_v(v)
        want, want_gradient = explicit(v.double()).detach(), explicit.gradient(v)
        found = ((logits(model), gradient(model, adapter)), (single(v).detach(), single.gradient(v)))
        for i, pair in enumerate(found):
            for j, (x, exact) in enumerate(zip(pair, (want, want_gradient), strict=True)):
                errors[i, j] += (x.double() - exact).square().mean()
    assert (want - Explicit(kind, adapter)(torch.zeros_like(v).double())).abs().max() > 0.1
    assert (errors[0].sqrt() <= 2 * errors[1].sqrt()).all(), errors.sqrt()
    model.double()
    assert adapter.v.dtype == torch.float64
    # the constants stay as fp32 made them, so that the function is the same
    torch.testing.assert_close(logits(model), want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient(model, adapter), want_gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_v_zero_is_the_base_bit_for_bit(kind: str) -> None:
    model = foreign_model(kind)
    base = logits(model)
    tinylora.attach(model, TinyLoRAConfig(target_modules=TARGETS[kind]))
    if kind == "llama":  # no biases: the correction's zero is added to the product and to nothing else
        assert torch.equal(logits(model), base)
    assert (logits(model) - base).abs().max() <= 1e-5


def test_plain_modules_and_whole_module_names() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 5, bias=False), nn.Linear(5, 3)))
    x = torch.randn(4, 6)
    base = model(x)
    adapter = tinylora.attach(model, TinyLoRAConfig(r=2, u=2, n_tie=1, target_modules=("0", "2.1")))
    assert list(adapter.parts.group_of) == ["0", "2.0", "2.1"]  # a last part means every module that ends in it
    adapter.load_v(some_v(adapter))
    weights = []
    for name, (A, B) in adapter.parts.factors.items():
        M = torch.einsum("u,uij->ij", adapter.v[adapter.parts.group_of[name]], adapter.parts.projections[name])
        weights.append(model.get_submodule(name).weight + B @ M @ A)
    want = F.linear(F.relu(F.linear(x, weights[0], model[0].bias)), weights[1])
    torch.testing.assert_close(model(x), F.linear(want, weights[2], model[2][1].bias))
    torch.testing.assert_close(model(x.view(2, 2, 6)), model(x).view(2, 2, 3))
    assert (model(x[0]) - model(x)[0]).abs().max() < 1e-5  # one row, no batch
    adapter.detach()
    assert torch.equal(model(x), base)


def test_the_same_P_and_tying_as_our_own_decoder(tmp_path: Path) -> None:
    """An adapter trained by tinylora.train is the same adapter on transformers, and the other way round."""
    model, adapter = attached("qwen2", seed=6)
    foreign_model("qwen2").save_pretrained(tmp_path / "base")
    decoder = load_model(str(tmp_path / "base"), "cpu")
    ours = Adapter(decoder, adapter.config)
    assert ours.parts.group_of == adapter.parts.group_of and ours.parts.projection_hash == adapter.parts.projection_hash
    ours.load_v(adapter.v.detach())
    assert (decoder.logits(IDS, ours.matrices()) - logits(model)).abs().max() <= 1e-5
    ours.save(tmp_path / "a")
    adapter.save(tmp_path / "b")
    for name in ("adapter_model.safetensors",):
        mine, theirs = (load_file(tmp_path / d / name) for d in "ab")
        assert mine.keys() == theirs.keys()
        assert all(torch.allclose(mine[k], theirs[k], rtol=1e-6, atol=0) for k in mine)
    fresh = foreign_model("qwen2")
    load_adapter(tmp_path / "a", fresh)
    assert torch.equal(logits(fresh), logits(model))
    assert torch.equal(load_adapter(tmp_path / "b", decoder).v, adapter.v)


# ---- the model stays what it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_attach_and_detach_leave_the_model_as_it_was(kind: str) -> None:
    model = foreign_model(kind)
    model.get_input_embeddings().weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    state, pointers = model.state_dict(), {n: p.data_ptr() for n, p in model.named_parameters()}
    copies, base = {n: t.clone() for n, t in state.items()}, logits(model)
    modules = {n: (m, type(m), set(vars(m))) for n, m in model.named_modules()}
    seen = []
    target = next(m for n, m in model.named_modules() if n.endswith(TARGETS[kind][0]))
    hook = target.register_forward_hook(lambda *_: seen.append(1))

    adapter = tinylora.attach(model, TinyLoRAConfig(u=3, n_tie=4, target_modules=TARGETS[kind]))
    adapter.load_v(some_v(adapter))
    assert [n for n in model.state_dict() if n not in state] == ["tinylora.adapters.default.v"]
    assert [n for n in model.state_dict() if n in state] == list(state)
    assert {n: p.data_ptr() for n, p in model.named_parameters() if n in pointers} == pointers  # no second copy
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["tinylora.adapters.default.v"]
    assert all(isinstance(model.get_submodule(n), modules[n][1]) for n in modules)  # still a Linear, still a Conv1D
    assert (logits(model) - base).abs().max() > 0.1 and seen  # the module's own hooks still run
    gradient(model, adapter)

    adapter.detach()
    hook.remove()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, copies[n]) for n, t in model.state_dict().items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == pointers
    assert {n: (m, type(m), set(vars(m))) for n, m in model.named_modules()} == modules
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert torch.equal(logits(model), base)
    tinylora.attach(model, TinyLoRAConfig(target_modules=TARGETS[kind]))  # and again


def test_disable_is_the_base_bit_for_bit() -> None:
    model, adapter = attached("gpt2")
    base = logits(foreign_model("gpt2"))
    on = logits(model)
    with pytest.raises(ZeroDivisionError), adapter.disable():
        assert torch.equal(logits(model), base)
        with adapter.disable():
            pass
        assert torch.equal(logits(model), base)
        raise ZeroDivisionError
    assert torch.equal(logits(model), on)


def test_copies_and_moves() -> None:
    """deepcopy after a step, and .to(): A, B, P and v travel along, and keep their precision."""
    model, adapter = attached()
    gradient(model, adapter)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.tinylora.v.mul_(2)
    assert twin.tinylora.model is twin and not torch.equal(logits(twin), logits(model))
    assert torch.equal(logits(model), logits(copy.deepcopy(model)))
    model.to(torch.bfloat16)
    assert adapter.v.dtype == torch.float32 and logits(model).dtype == torch.bfloat16
    assert {model.model.layers[0].mlp.up_proj._A.dtype, model.model.layers[0].mlp.up_proj._Bt.dtype} == {torch.float32}
    model.to("meta")
    assert {adapter.v.device.type, model.model.layers[0].mlp.up_proj._Bt.device.type} == {"meta"}


def test_saves_no_activation_and_no_weight() -> None:
    """What autograd keeps of one layer besides the model's own tensors is t (rows, r) and M."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30))
    tinylora.attach(model, TinyLoRAConfig(target_modules=("0",)))
    layer = model[0]
    own = {t.data_ptr() for t in (layer.weight, layer._A, layer._Bt)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(16, 40, requires_grad=True))
    assert sorted(tuple(t.shape) for t in kept if t.data_ptr() not in own) == [(1, 1, 2, 2), (16, 2)]


# ---- M, once a forward ------------------------------------------------------------------------------------------------------


def test_M_is_computed_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = attached()
    calls = []
    original = _Matrices.forward
    monkeypatch.setattr(_Matrices, "forward", staticmethod(lambda *a: calls.append(1) or original(*a)))
    for forwards in (1, 2):
        logits(model)
        assert len(calls) == forwards


def test_M_follows_v_however_it_changes() -> None:
    """Also when only an inner module is called, and when v is written behind autograd's back before a whole forward."""
    model, adapter = attached()
    explicit = Explicit("qwen2", adapter)

    def inner() -> Tensor:
        with torch.no_grad():
            return model.lm_head(model.model(IDS, use_cache=False).last_hidden_state)

    for change in (lambda: adapter.v.mul_(2), lambda: adapter.v.data.mul_(0.5), lambda: adapter.v.add_(0.1)):
        with torch.no_grad():
            change()
        want = explicit(adapter.v.double()).float()
        torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(inner(), want, rtol=1e-4, atol=1e-4)
    inner()
    with torch.no_grad():
        adapter.v.mul_(-1)
    torch.testing.assert_close(inner(), explicit(adapter.v.double()).float(), rtol=1e-4, atol=1e-4)  # no whole forward between
    optimizer = torch.optim.SGD([adapter.v], lr=0.1)
    inner_loss = model.model(IDS, use_cache=False).last_hidden_state.square().mean()
    inner_loss.backward()
    model.model(IDS, use_cache=False).last_hidden_state.square().mean().backward()  # again, v unchanged: M's graph is reused
    optimizer.step()
    torch.testing.assert_close(inner(), explicit(adapter.v.double()).float(), rtol=1e-4, atol=1e-4)


def test_gradients_of_two_forwards_add_up() -> None:
    model, adapter = attached()
    once = gradient(model, adapter)
    adapter.v.grad = None
    (distributed.loss(model, IDS) + distributed.loss(model, IDS)).backward()
    torch.testing.assert_close(adapter.v.grad, 2 * once)


def test_param_dtype_rounds_v_and_passes_the_gradient() -> None:
    model, adapter = attached(param_dtype="bfloat16")
    exact, other = attached()
    other.load_v(adapter.v.detach().bfloat16().float())
    assert torch.equal(logits(model), logits(exact))
    assert torch.equal(gradient(model, adapter), gradient(exact, other))


# ---- several adapters -------------------------------------------------------------------------------------------------------


def test_named_adapters_and_rows() -> None:
    """Adapters with P, tying, u and modules of their own; each row of a batch has the logits it has alone."""
    model, adapter = attached()
    adapter.add_adapter("two", TinyLoRAConfig(u=2, n_tie="all", seed=9, target_modules=("v_proj", "down_proj")))
    with torch.no_grad():
        adapter.adapters["two"].v.copy_(torch.tensor([[0.4, -0.7]]))
    assert adapter.active == "default" and not adapter.adapters["two"].v.requires_grad
    alone = {"default": logits(model)}
    adapter.set_adapter("two")
    assert adapter.v.requires_grad and adapter.num_parameters == 2
    alone["two"] = logits(model)
    other, reference = foreign_model("qwen2"), TinyLoRAConfig(u=2, n_tie="all", seed=9, target_modules=("v_proj", "down_proj"))
    tinylora.attach(other, reference).load_v(torch.tensor([[0.4, -0.7]]))
    torch.testing.assert_close(logits(other), alone["two"], rtol=1e-5, atol=1e-5)
    alone[None] = logits(foreign_model("qwen2"))
    assert (alone["two"] - alone["default"]).abs().max() > 0.05
    adapter.set_adapter("default")
    for rows in (["two", "default"], [None, "two"], ["default", None], [None, None], ["two", "two"]):
        adapter.set_row_adapters(rows)
        found = logits(model)
        for i, name in enumerate(rows):
            torch.testing.assert_close(found[i], alone[name][i], rtol=1e-5, atol=1e-5)
    adapter.set_row_adapters(["two"] * 3)
    with pytest.raises(InputError, match="3 rows, and a layer sees a batch of 2"):
        logits(model)
    adapter.set_row_adapters(None)
    torch.testing.assert_close(logits(model), alone["default"])


def test_gradient_of_rows_goes_to_their_own_adapter() -> None:
    model, adapter = attached()
    alone = gradient(model, adapter)
    adapter.add_adapter("two", adapter.config)
    adapter.adapters["two"].requires_grad_(True)
    with torch.no_grad():
        adapter.adapters["two"].v.copy_(adapter.v)
    adapter.set_row_adapters(["two", "default"])
    adapter.v.grad = None
    distributed.loss(model, IDS).backward()
    two = adapter.adapters["two"].v.grad
    assert two.abs().max() > 0 and adapter.v.grad.abs().max() > 0
    torch.testing.assert_close(two + adapter.v.grad, alone, rtol=1e-4, atol=1e-6)


def test_adapters_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    model, adapter = attached()
    with pytest.raises(InputError, match="share their rank, here 2"):
        adapter.add_adapter("two", TinyLoRAConfig(r=4))
    for name in ("default", "a.b", "", "forward"):
        with pytest.raises(InputError, match="a name must be"):
            adapter.add_adapter(name, TinyLoRAConfig())
    for call in (adapter.set_adapter, lambda name: adapter.set_row_adapters([name, None])):
        with pytest.raises(InputError, match="none of that name, only default"):
            call("three")
    with pytest.raises(InputError, match="has an adapter already"):
        tinylora.attach(model, TinyLoRAConfig())
    with pytest.raises(InputError, match="factors of its own"):
        load_adapter(Path(__file__).parents[1] / "data" / "peft-0.19" / "qwen2", model, "theirs")
    assert list(adapter.adapters) == ["default"]
    adapter.save(tmp_path / "a")
    load_adapter(tmp_path / "a", model, "again")
    rows = logits(model)
    adapter.set_adapter("again")
    assert torch.equal(logits(model), rows)


# ---- how people run models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradient(kind: str, reentrant: bool) -> None:
    model, adapter = attached(kind)
    want = gradient(model, adapter)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert torch.equal(gradient(model, adapter), want)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_compiles_without_a_graph_break(kind: str) -> None:
    """fullgraph=True raises at the first break; v may change without a new graph. M has a graph of its own, before the model's,
    because torch.compile runs a model's hooks by themselves."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, adapter = attached(kind)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in (1, 2):
        adapter.load_v(some_v(adapter, seed))
        torch.testing.assert_close(gradient(compiled, adapter), gradient(model, adapter), rtol=1e-4, atol=1e-6)
    assert len(graphs) == 2 and not torch._dynamo.utils.counters["graph_break"]
    adapter.load_v(some_v(adapter, 3))  # what a whole forward computed is not what a later block by itself may use
    body = torch.compile(model.base_model, fullgraph=True, backend=backend)
    found, want = (m(IDS, use_cache=False).last_hidden_state for m in (body, model.base_model))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    with adapter.disable():
        assert torch.equal(logits(compiled), logits(foreign_model(kind)))
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-5, atol=1e-5)


def test_compiled_by_inductor_and_block_by_block() -> None:
    torch._dynamo.reset()
    model, adapter = attached()
    want, want_gradient = logits(model), gradient(model, adapter)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(model, adapter), want_gradient, rtol=1e-4, atol=1e-6)
    adapter.load_v(2 * adapter.v.detach())
    doubled = logits(model)
    adapter.load_v(0.5 * adapter.v.detach())
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    assert (doubled - want).abs().max() > 0.1
    mlp = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    mlp_adapter = tinylora.attach(mlp, TinyLoRAConfig(u=3, n_tie="all", target_modules=("0", "2")))
    mlp_adapter.load_v(some_v(mlp_adapter))
    x = torch.randn(5, 16)
    compiled = torch.compile(mlp, fullgraph=True)
    outputs = [m(x) for m in (mlp, compiled)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), mlp_adapter.v)[0] for y in outputs]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "compiled"), [(kind, False) for kind in KINDS] + [("gpt2", True)])
def test_autocast(kind: str, compiled: bool) -> None:
    """In bf16 like the base, M in fp32; no further from fp64 than explicit weights under autocast; gradients come out fp32."""
    torch._dynamo.reset()
    model, adapter = attached(kind)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    explicit = Explicit(kind, adapter, torch.float32)
    exact = Explicit(kind, adapter)(adapter.v.detach().double())
    M = adapter._compute()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(M, adapter._compute(), strict=True))
        ours = run(IDS, use_cache=False).logits
        distributed.loss(run, IDS).backward()
        plain = explicit(adapter.v.detach())
        layer = next(m for m in model.modules() if isinstance(m, TinyLoRALinear) or type(m).__name__ == "TinyLoRAConv1D")
        assert layer(torch.zeros(2, layer.weight.shape[kind != "gpt2"])).dtype == torch.bfloat16
    errors = [(x.double() - exact).square().mean().sqrt() for x in (ours, plain)]
    assert errors[0] <= 1.5 * errors[1], errors
    assert adapter.v.grad.dtype == torch.float32
    want = Explicit(kind, adapter).gradient(adapter.v.detach())
    assert F.cosine_similarity(adapter.v.grad.double().flatten(), want.flatten(), 0) > 0.99


def test_two_processes_train_the_same_v_as_one(tmp_path: Path) -> None:
    """DDP and FSDP2, four steps of Adam; halves of a batch on two processes. Both save, and the same."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    script = Path(distributed.__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent.parent), os.environ.get("PYTHONPATH", "")])}
    children = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), port, str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [child.communicate(timeout=180)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], errors
    model, adapter = distributed.attached()
    distributed.train(model, adapter)
    assert adapter.v.abs().max() > 0.1
    for kind in ("ddp", "fsdp2"):
        found = [load_file(tmp_path / f"{kind}-{rank}.safetensors")["v"] for rank in range(2)]
        assert torch.equal(*found)
        # Adam divides by the gradient's size: its rounding, 1e-7 of the largest entry, counts most in the smallest
        torch.testing.assert_close(found[0], adapter.v.detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(load_adapter(tmp_path / f"{kind}-0", foreign_model("qwen2")).v, found[0])


def test_generation_with_a_cache_is_that_of_explicit_weights() -> None:
    model, adapter = attached()
    explicit = Explicit("qwen2", adapter)
    ours = model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(IDS))
    ids = IDS
    for _ in range(6):
        ids = torch.cat([ids, explicit(adapter.v.detach().double(), ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(ours, ids)


# ---- refused ----------------------------------------------------------------------------------------------------------------


def break_weight(model: nn.Module) -> None:
    model.model.norm.weight.data[3] += 1e-3


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (lambda: foreign_model("gpt2"), {}, "q_proj: no such linear in .*which has c_attn, c_proj, c_fc, lm_head"),
        (lambda: nn.Sequential(nn.ReLU()), {}, "has no nn.Linear and no Conv1D"),
        (lambda: nn.Sequential(nn.Linear(3, 1)), {"target_modules": ("0",)}, "--r 2: the smallest adapted weight has only 1"),
        (lambda: foreign_model("qwen2").to("meta"), {}, "is not a whole tensor in memory"),
    ],
)
def test_what_cannot_be_adapted_is_refused(make: Callable[[], nn.Module], config: dict[str, object], message: str) -> None:
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(InputError, match=message):
        tinylora.attach(model, TinyLoRAConfig(**config))
    assert list(model.state_dict()) == keys and not model._forward_pre_hooks


def test_replaced_forward_is_refused() -> None:
    """As accelerate does it: the adapter would silently do nothing."""
    model = foreign_model("qwen2")
    layer = model.model.layers[1].mlp.up_proj
    layer.forward = layer.forward
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj: its forward was replaced"):
        tinylora.attach(model, TinyLoRAConfig())
    assert not hasattr(model, "tinylora") and all(p.requires_grad for p in model.parameters())


def test_training_an_adapted_weight_is_refused() -> None:
    model, _ = attached()
    model.requires_grad_(True)
    with pytest.raises(InputError, match="requires a gradient, and gets none"):
        model(IDS)
    logits(model)  # without gradients there is nothing to lose


@pytest.mark.parametrize(("kind", "tied"), [("qwen2", False), ("qwen2", True), ("gpt2", True)])
def test_save_pretrained_as_documented(tmp_path: Path, kind: str, tied: bool) -> None:
    """As docs/layers.md has it: v beside the base, or the base alone, whose files are those from before attach."""
    model = foreign_model(kind, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "before")
    adapter = tinylora.attach(model, TinyLoRAConfig(u=3, n_tie=4, target_modules=TARGETS[kind]))
    adapter.load_v(some_v(adapter))
    text = (Path(__file__).parents[2] / "docs" / "layers.md").read_text()
    documented = next(block for block in text.split("```") if "save_pretrained" in block and block.startswith("python\n"))
    exec(documented.removeprefix("python\n").replace('"base"', "place"), {"model": model, "place": tmp_path / "base"})
    files = {p.name: p.read_bytes() for p in (tmp_path / "before").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()} == files and "model.safetensors" in files
    model.save_pretrained(tmp_path / "both")
    before, both = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "both"))
    assert torch.equal(both.pop("tinylora.adapters.default.v"), adapter.v) and both.keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in both.items())


def test_saved_adapters_know_their_base(tmp_path: Path) -> None:
    model, adapter = attached()
    adapter.save(tmp_path / "a")
    fresh = foreign_model("qwen2")
    loaded = load_adapter(tmp_path / "a", fresh)
    assert torch.equal(loaded.v, adapter.v) and torch.equal(logits(fresh), logits(model))
    other = foreign_model("qwen2")
    break_weight(other)
    with pytest.raises(InputError, match="was trained on .* Give the base it was trained on"):
        load_adapter(tmp_path / "a", other)
    assert not hasattr(other, "tinylora")
    with pytest.raises(InputError, match="was trained on"):
        load_adapter(tmp_path / "a", foreign_model("llama"))
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for v, message in ((torch.zeros(5, 3), "v has shape"), (tensors["v"].fill_(torch.inf), "v is not finite")):
        save_file({**tensors, "v": v}, tmp_path / "a" / "adapter_model.safetensors")
        untouched = foreign_model("qwen2")
        with pytest.raises(InputError, match=message):
            load_adapter(tmp_path / "a", untouched)
        assert not hasattr(untouched, "tinylora")


def test_a_bf16_checkpoint_read_in_fp32_is_the_same_base(tmp_path: Path) -> None:
    """And one changed bit of it is not, nor a change in fp32 that bf16 would round away."""
    model, adapter = attached(dtype=torch.bfloat16)
    adapter.save(tmp_path / "a")
    load_adapter(tmp_path / "a", foreign_model("qwen2", torch.bfloat16).float())
    for change in (2**-7, 2**-14):
        other = foreign_model("qwen2", torch.bfloat16).float()
        other.model.norm.weight.data[0] *= 1 + change
        with pytest.raises(InputError, match="was trained on"):
            load_adapter(tmp_path / "a", other)
