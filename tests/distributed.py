"""Two processes on the CPU train an attached model: what test_layers.py compares with one process.

python distributed.py RANK PORT OUTPUT
"""

import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from foreign import TARGETS, foreign_model
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tinylora
from tinylora import TinyLoRAConfig

STEPS = 4


def batches() -> torch.Tensor:
    """(steps, rows, tokens)"""
    return torch.randint(0, 32, (STEPS, 4, 6), generator=torch.Generator().manual_seed(5))


def attached(kind: str = "qwen2") -> tuple[torch.nn.Module, tinylora.AttachedAdapter]:
    model = foreign_model(kind)
    adapter = tinylora.attach(model, TinyLoRAConfig(u=3, n_tie=4, target_modules=TARGETS[kind]))
    return model, adapter


def loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(model: torch.nn.Module, adapter: tinylora.AttachedAdapter, rows: slice = slice(None)) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for ids in batches():
        loss(model, ids[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def main(rank: int, port: str, output: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for kind in ("ddp", "fsdp2"):
        model, adapter = attached()
        wrapped: torch.nn.Module = model
        if kind == "ddp":
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
        else:
            weight = model.model.layers[0].mlp.up_proj.weight
            place, size = weight.data_ptr(), weight.nbytes
            del weight
            mesh = init_device_mesh("cpu", (2,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "DTensor"
            gc.collect()
            held = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and o.device.type == "cpu"]
            # Nobody holds the whole weight beside its shards, one of which may lie where it lay.
            assert not any(t.data_ptr() == place and t.untyped_storage().nbytes() >= size for t in held)
        train(wrapped, adapter, slice(2 * rank, 2 * rank + 2))
        adapter.save(output / f"{kind}-{rank}")
        v = adapter.v.detach()
        save_file({"v": (v.full_tensor() if hasattr(v, "full_tensor") else v).clone()}, output / f"{kind}-{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
