"""The same layers in other people's models: attach() turns a model's linears into TinyLoRA layers and touches no weight.

    adapter = tinylora.attach(model, TinyLoRAConfig(u=13, n_tie="all"))      # any torch.nn.Module
    optimizer = torch.optim.Adam([adapter.v])                                 # or TRL, transformers, DDP, FSDP2
    adapter.save("out");  adapter.detach()

A module is adapted in place: it keeps its parameters, their names, its hooks and its identity, and gets another class, so
that nothing that holds or shards it notices. v is a parameter of the model, `tinylora.adapters.NAME.v`. M of all modules is
computed from v once a forward; its gradient keeps nothing, so it may be asked for any number of times.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tinylora.adapter.config import TinyLoRAConfig, stored
from tinylora.adapter.files import read_adapter, save_adapter
from tinylora.adapter.parts import Base, Parts, draw_parts, fill_v
from tinylora.errors import InputError
from tinylora.hashes import content_hash
from tinylora.kernels import dispatch
from tinylora.kernels.layer_linear import layer_linear

CHILD = "tinylora"  # the name of the adapter among the model's submodules


def _moved(fn: Callable[[Tensor], Tensor], t: Tensor) -> tuple[torch.device, torch.dtype]:
    """Where fn moves t, and to what: an adapter follows its model to other devices and to float64, never to half precision."""
    probe = fn(t.new_empty(1))
    return probe.device, torch.promote_types(probe.dtype, torch.float32)


class _TinyLoRA(nn.Module):
    """What an adapted module does: its own map plus B M A, in one frozen linear with gradients for x and M."""

    weight: Any
    bias: Any
    _adapter: "AttachedAdapter"
    _place: int  # among the adapted modules
    _A: Tensor  # (r, K), float32, or of the weight's dtype where that is wider
    _Bt: Tensor  # (r, N)
    _transposed = False  # whether the weight is (K, N), as in GPT-2

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        M, rows = self._adapter._at(self._place, x)
        if M is None:
            return super().forward(x)
        if self.weight.requires_grad and torch.is_grad_enabled():
            raise InputError("an adapted weight requires a gradient, and gets none: freeze it, or detach() the adapter")
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif x.dtype != self.weight.dtype:
            raise InputError(f"an input of {x.dtype} met an adapted weight of {self.weight.dtype}")
        weight = self.weight.T if self._transposed else self.weight
        y = layer_linear(x.reshape(-1, x.shape[-1]), weight, self.bias, self._A, self._Bt, M, rows)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_TinyLoRA":
        super()._apply(fn, recurse)
        wanted = _moved(fn, self._A)
        self._A, self._Bt = self._A.to(*wanted), self._Bt.to(*wanted)  # no buffers: DDP would send them round at every step
        return self


class TinyLoRALinear(_TinyLoRA, nn.Linear):
    """nn.Linear with a correction."""


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__module__ == "transformers.pytorch_utils" and type(module).__name__ == "Conv1D"


_adapted_classes: dict[type, type] = {nn.Linear: TinyLoRALinear}


def _adapted_class(original: type) -> type:
    """Made on first use for transformers' Conv1D, because transformers takes seconds to import."""
    if original not in _adapted_classes:
        _adapted_classes[original] = type("TinyLoRAConv1D", (_TinyLoRA, original), {"_transposed": True})
    return _adapted_classes[original]


class _Matrices(torch.autograd.Function):
    """M of every module, (slots, 1, r, r) each, from the v of every slot. Linear in v, so its backward needs no activation,
    frees nothing, and runs as often as it is asked to: once for each checkpointed block, for each of two losses."""

    @staticmethod
    def forward(ctx, slots, *vs):  # type: ignore[no-untyped-def]
        ctx.slots, ctx.like = slots, [(v.shape, v.dtype) for v in vs]
        ctx.set_materialize_grads(False)
        return _matrices(slots, vs)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        like = next(g for g in grads if g is not None)
        dM = torch.stack([torch.zeros_like(like) if g is None else g for g in grads])  # (modules, slots, 1, r, r)
        found, number = [], 0
        with torch.autocast(dM.device.type, enabled=False):
            for slot, named in enumerate(ctx.slots):
                if named is not None:
                    shape, dtype = ctx.like[number]
                    dv = torch.einsum("mij,muij->mu", dM[:, slot, 0], named.P.to(dM.dtype))  # (modules, u)
                    found.append(dv.new_zeros(shape).index_add_(0, named.group, dv).to(dtype))
                    number += 1
        return None, *found


def _matrices(slots: "Sequence[_Named | None]", vs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """M (slots, 1, r, r) of every module; a slot without an adapter is zero."""
    remaining = iter(vs)
    found: list[Tensor | None] = []
    with torch.autocast(vs[0].device.type, enabled=False):
        for named in slots:
            if named is None:
                found.append(None)
                continue
            v = next(remaining)
            v = stored(v.to(torch.promote_types(v.dtype, torch.float32)), named.config)
            found.append(torch.einsum("mu,muij->mij", v[named.group], named.P.to(v.dtype)))  # (modules, r, r)
        like = next(m for m in found if m is not None)
        M = torch.stack([torch.zeros_like(like) if m is None else m for m in found], 1)  # (modules, slots, r, r)
    return M.unsqueeze(2).unbind(0)


class _Named(nn.Module):
    """One adapter's v, and the constants that turn it into M."""

    P: Tensor  # (modules, u, r, r), zero for modules that this adapter leaves alone
    group: Tensor  # (modules,)

    def __init__(self, config: TinyLoRAConfig, parts: Parts, device: torch.device) -> None:
        super().__init__()
        self.config, self.parts = config, parts
        self.v = nn.Parameter(torch.zeros(parts.groups, config.u, device=device))

    def spread(self, modules: Sequence[str]) -> None:
        """Lay P and the group numbers out over these modules."""
        zero = torch.zeros(self.config.u, self.config.r, self.config.r)
        self.P = torch.stack([self.parts.projections.get(m, zero) for m in modules]).to(self.v.device)
        self.group = torch.tensor([self.parts.group_of.get(m, 0) for m in modules], device=self.v.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Named":
        wanted = _moved(fn, self.P)
        super()._apply(lambda t: t.to(*wanted), recurse)
        self.P, self.group = self.P.to(*wanted), self.group.to(wanted[0])
        return self


class AttachedAdapter(nn.Module):
    """One or several adapters on a model that is not ours. Made by `attach` and `load_adapter`."""

    _off = False
    _rows: Tensor | None = None  # (batch,) the slot of each batch row
    _slots: tuple[str | None, ...] = ()  # the adapter of each slot; None: the base model
    model: nn.Module
    # M as last computed, and from what: the values of v are known by tensor and version. Neither is copied nor saved.
    _cache: tuple[Tensor, ...] | None = None
    _key: Any = None
    _traced: tuple[Tensor, ...] | None = None  # M, while torch.compile traces the whole model

    def __init__(self, model: nn.Module, base: Base) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not a submodule: it contains this one
        # its shapes and hashes: whoever shards the model later is to be able to let go of the whole weights
        self.base = replace(base, weights={n: w.to("meta") for n, w in base.weights.items()}, tensors=None)
        self.adapters = nn.ModuleDict()
        self.module_names: list[str] = []  # the adapted modules, in order of place
        self._required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        model.add_module(CHILD, self)
        self._hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after),
        ]

    # ---- which adapter --------------------------------------------------------------------------------------------------

    @property
    def active(self) -> str:
        """The adapter that runs, and trains, where no row says otherwise."""
        return self._active

    @property
    def config(self) -> TinyLoRAConfig:
        return self._named(self._active).config

    @property
    def parts(self) -> Parts:
        return self._named(self._active).parts

    @property
    def v(self) -> nn.Parameter:
        """(groups, u) of the active adapter: what an optimizer gets."""
        return self._named(self._active).v

    @property
    def num_parameters(self) -> int:
        return self.v.numel()

    def _named(self, name: str) -> _Named:
        if name not in self.adapters:
            raise InputError(f"adapter {name}: there is none of that name, only {', '.join(self.adapters)}")
        found = self.adapters[name]
        assert isinstance(found, _Named)
        return found

    def add_adapter(self, name: str, config: TinyLoRAConfig, parts: Parts | None = None) -> None:
        """Another adapter beside those there are, of the same rank and factors; its P, tying and modules are its own."""
        self._check(name, config)
        self._add(name, config, parts or draw_parts(config, base_of(self.model, self.base)))

    def _check(self, name: str, config: TinyLoRAConfig) -> None:
        if not name or "." in name or hasattr(self.adapters, name):
            raise InputError(f"adapter {name!r}: a name must be new, and no attribute of a torch module or with a dot in it")
        if self.adapters and config.r != self.config.r:
            raise InputError(f"adapter {name} has r = {config.r}; adapters on one model share their rank, here {self.config.r}")

    def _add(self, name: str, config: TinyLoRAConfig, parts: Parts) -> None:
        for other in map(self._named, self.adapters):
            for module, pair in parts.factors.items():
                theirs = other.parts.factors.get(module, pair)
                # by tolerance: the last bits of factors depend on the machine and its threads
                if not all((a.cpu() - b.cpu()).norm() <= 1e-3 * a.norm() for a, b in zip(pair, theirs, strict=True)):
                    raise InputError(f"adapter {name} has factors of its own; load it onto a model that carries no other")
        wanted = {name: _linear(self.model, name) for name in parts.factors if name not in self.module_names}
        for module_name, module in wanted.items():
            module.__class__ = _adapted_class(type(module))
            dtype = torch.promote_types(module.weight.dtype, torch.float32)  # as PEFT keeps them
            A, B = (f.to(module.weight.device, dtype) for f in parts.factors[module_name])
            # plain attributes: a module assigned the usual way would become a child
            module.__dict__.update(_adapter=self, _place=len(self.module_names), _A=A.contiguous(), _Bt=B.T.contiguous())
            self.module_names.append(module_name)
        device = _linear(self.model, self.module_names[0]).weight.device
        self.adapters[name] = _Named(config, parts, device)
        for other in map(self._named, self.adapters):
            other.spread(self.module_names)
        if len(self.adapters) == 1:
            self.set_adapter(name)
        else:
            self.adapters[name].requires_grad_(False)
        self._key = None

    def set_adapter(self, name: str) -> None:
        """Make this adapter the one that runs and trains."""
        self._named(name)
        self._active = name
        for other, named in self.adapters.items():
            named.requires_grad_(other == name)
        self.set_row_adapters(None)

    def set_row_adapters(self, rows: Sequence[str | None] | None) -> None:
        """The adapter of each batch row of the forwards that follow, None being the base model; None for all: the active one.

        It holds until it is set again, also while a checkpointed block is recomputed: run backward before changing it.
        """
        if rows is None:
            self._slots, self._rows = (self._active,), None
            return
        for name in rows:
            if name is not None:
                self._named(name)
        # with no adapter at all there is still one slot that has an M
        self._slots = (*dict.fromkeys(rows),) if any(name is not None for name in rows) else (None, self._active)
        self._rows = torch.tensor([self._slots.index(name) for name in rows], device=self.v.device)

    @contextmanager
    def disable(self) -> Iterator[None]:
        """The base model, bit for bit, for as long as the context lasts."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    # ---- forward --------------------------------------------------------------------------------------------------------

    def forward(self, x: Any) -> Any:
        """x as it is: a model that is an nn.Sequential runs this too, as the last of its children."""
        return x

    def _before(self, model: nn.Module, arguments: Any) -> None:
        """The model's own forward begins: forget M, also where v was changed behind autograd's back."""
        if torch.compiler.is_compiling():
            self._traced = None if self._off else self._compute()
        else:
            self._key = None

    def _after(self, model: nn.Module, arguments: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            self._traced = None

    def _compute(self) -> tuple[Tensor, ...]:
        slots = [None if name is None else self._named(name) for name in self._slots]
        vs = [named.v for named in slots if named is not None]
        if torch.compiler.is_compiling():
            return _matrices(slots, vs)
        return _Matrices.apply(slots, *vs)

    def _at(self, place: int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """M (slots, 1, r, r) of a module for an input x (..., K), and the slot of each of x's rows where there are several.

        M is None where the adapter is off.
        """
        if self._off:
            return None, None
        if torch.compiler.is_compiling():
            # a block compiled by itself cannot know what was computed outside, and the compiler drops what it does not use
            M = (self._traced or self._compute())[place]
        else:
            vs = [self._named(name).v for name in self._slots if name is not None]
            key = (self._slots, torch.is_grad_enabled(), *((id(v), v._version, v.requires_grad) for v in vs))
            if self._cache is None or key != self._key:
                self._cache, self._key = self._compute(), key
            M = self._cache[place]
        if self._rows is None:
            return M.to(x.device), None
        batch = x.shape[0]
        if batch != len(self._rows):
            raise InputError(f"set_row_adapters was given {len(self._rows)} rows, and a layer sees a batch of {batch}")
        return M.to(x.device), self._rows.to(x.device).repeat_interleave(x.shape[:-1].numel() // batch)

    # ---- files, and the way back ----------------------------------------------------------------------------------------

    def load_v(self, v: Tensor) -> None:
        """Set the active adapter's v from a (groups, u) tensor of any float dtype."""
        fill_v(self.v, v)

    def save(self, directory: str | Path) -> None:
        """Write the active adapter as `Adapter.save` does; under FSDP2 every process must call it."""
        v = self.v.detach()
        whole: Tensor = v.full_tensor() if hasattr(v, "full_tensor") else v
        save_adapter(Path(directory), self.config, self.parts, whole, self.base)

    def detach(self) -> None:
        """Give the model back exactly as it was: classes, state_dict keys, requires_grad, no hook."""
        for name in self.module_names:
            module = _linear(self.model, name)
            for attribute in ("_adapter", "_place", "_A", "_Bt"):
                del module.__dict__[attribute]
            module.__class__ = next(original for original, adapted in _adapted_classes.items() if type(module) is adapted)
        for hook in self._hooks:
            hook.remove()
        delattr(self.model, CHILD)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, parameter.requires_grad))

    def __getstate__(self) -> dict[str, Any]:
        """Without M, which belongs to a graph: models are copied and pickled between steps."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_cache", "_key", "_traced")}


def _linear(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def attach(model: nn.Module, config: TinyLoRAConfig, name: str = "default") -> AttachedAdapter:
    """Adapt the linears of any model (nn.Linear, and transformers' Conv1D), freeze it, and return what is trained.

    config.target_modules are module names or their last parts. Whoever shards (FSDP2) or wraps (DDP, torch.compile) the
    model does so afterwards. InputError where a target is missing, is no such linear, or has no weights to be had.
    """
    if _attached(model) is not None:
        raise InputError("the model has an adapter already: detach() it, or add_adapter(name, config) to it")
    base = base_of(model)
    parts = draw_parts(config, base)
    return _make(model, base, config, parts, name)


def load(path: Path, model: nn.Module, name: str, force_base: bool = False) -> AttachedAdapter:
    """`load_adapter` for a model that is not ours; beside the adapters it has, if it has any."""
    adapter = _attached(model)
    base = base_of(model, None if adapter is None else adapter.base)
    config, parts, v = read_adapter(path, base, force_base)
    if adapter is None:
        adapter = _make(model, base, config, parts, name)
    else:
        adapter.add_adapter(name, config, parts)
    with torch.no_grad():
        adapter._named(name).v.copy_(v)
    return adapter


def _make(model: nn.Module, base: Base, config: TinyLoRAConfig, parts: Parts, name: str) -> AttachedAdapter:
    for module_name in parts.factors:
        if "forward" in _linear(model, module_name).__dict__:
            raise InputError(f"{module_name}: its forward was replaced (by accelerate's hooks?); load without a device map")
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise InputError(f"adapter {name!r}: a name must be no attribute of a torch module and have no dot in it")
    dispatch.prove(next(iter(base.weights.values())).device)  # kernels are matched against their references first
    adapter = AttachedAdapter(model, base)
    adapter._add(name, config, parts)
    return adapter


def _attached(model: nn.Module) -> AttachedAdapter | None:
    found = getattr(model, CHILD, None)
    return found if isinstance(found, AttachedAdapter) else None


def base_of(model: nn.Module, known: Base | None = None) -> Base:
    """A model as an adapter sees it. Unless its base is `known` it reads every parameter once, to hash it."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if not name.startswith(f"{CHILD}.")}
    for name, tensor in tensors.items():
        if tensor.is_meta or hasattr(tensor, "full_tensor"):
            raise InputError(f"{name} is not a whole tensor in memory: attach before sharding, and without offloading")
    weights, transposed = {}, set()
    for name, module in model.named_modules():
        conv1d = isinstance(module, _TinyLoRA) and module._transposed or _is_conv1d(module)
        if (conv1d or type(module) in (nn.Linear, TinyLoRALinear)) and module.weight.is_floating_point():
            weights[name] = module.weight.detach().T if conv1d else module.weight.detach()
            transposed |= {name} if conv1d else set()
    if not weights:
        raise InputError(f"{type(model).__name__} has no nn.Linear and no Conv1D")
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    digests = known.digests if known else {name: content_hash(t) for name, t in tensors.items()}
    hashed = known.hashed if known else {name: (t.dtype, digests[name]) for name, t in tensors.items()}
    return Base(name, weights, digests, frozenset(transposed), tensors, hashed)
