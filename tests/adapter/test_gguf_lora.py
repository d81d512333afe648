"""export --to gguf-lora: what is in the file, what it does to the weights it names, and llama.cpp's own word for it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import HEAD_DIM, gguf, write_gguf

from tinylora import TinyLoRAConfig, load_model
from tinylora.adapter.export import corrections
from tinylora.adapter.gguf_lora import write_gguf_lora
from tinylora.adapter.on_decoder import Adapter
from tinylora.model.gguf import file_name


def trained(path: Path, **changes: Any) -> Adapter:
    adapter = Adapter(load_model(str(path), "cpu", "float32"), TinyLoRAConfig(u=3, n_tie=4, **changes))
    with torch.no_grad():
        adapter.v.copy_(torch.randn(adapter.v.shape, generator=torch.Generator().manual_seed(0)) / 20)
    return adapter


def export(adapter: Adapter, path: Path) -> Path:
    config = adapter.model.config
    moves = corrections(adapter.config, adapter.parts, adapter.v)
    write_gguf_lora(path, moves, config.family, config.head_dim, Path(adapter.base.name).name)
    return path


@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "down_proj"), None], ids=["some", "all"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_read_back(family: str, targets: tuple[str, ...] | None, tmp_path: Path) -> None:
    """Every pair's product, put on the file's own weights as they lie there, is the trained model's weight."""
    base = write_gguf(tmp_path / "base.gguf", family, "F32")
    adapter = trained(base, **({"target_modules": targets} if targets else {}))
    reader = gguf.GGUFReader(export(adapter, tmp_path / "lora.gguf"))
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert keys == {
        "general.architecture": family,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(adapter.config.r),
        "general.base_model.count": 1,
        "general.base_model.0.name": "base.gguf",
    }
    found = {t.name: np.array(t.data) for t in reader.tensors}
    stored = {t.name: np.array(t.data) for t in gguf.GGUFReader(base).tensors}
    moves = corrections(adapter.config, adapter.parts, adapter.v)
    assert found.keys() == {f"{file_name(m)}.weight.lora_{side}" for m in moves for side in "ab"}
    for module, (A, BM) in moves.items():
        name = f"{file_name(module)}.weight"
        a, b = found[f"{name}.lora_a"].astype(np.float64), found[f"{name}.lora_b"].astype(np.float64)
        assert a.shape == (adapter.config.r, stored[name].shape[1]) and b.shape == (stored[name].shape[0], adapter.config.r)
        merged = torch.from_numpy(stored[name] + b @ a)
        if family == "llama" and module.endswith(("q_proj", "k_proj")):  # the file's rows are pairs
            merged = merged.view(-1, HEAD_DIM // 2, 2, merged.shape[1]).transpose(1, 2).reshape(merged.shape)
        wanted = adapter.model.weights()[module].double() + BM @ A
        assert (merged - wanted).norm() < 1e-6 * (BM @ A).norm(), module


LLAMA_CPP = """
import json, sys
import numpy as np
from llama_cpp import Llama
base, lora, ids = sys.argv[1], sys.argv[2] or None, json.loads(sys.argv[3])
model = Llama(base, lora_path=lora, logits_all=True, n_ctx=64, type_k=0, type_v=0, flash_attn=False, verbose=False)
model.eval(ids)
np.save(sys.argv[4], np.array(model.scores[: len(ids)]))
"""


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_llama_cpp_loads_it(family: str, tmp_path: Path) -> None:
    """The same change of the same logits, on float32 weights."""
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which is built from source")
    base = write_gguf(tmp_path / "base.gguf", family, "F32", bias=False)
    adapter = trained(base)
    lora = export(adapter, tmp_path / "lora.gguf")
    ids = list(range(5, 45))
    with torch.no_grad():
        ours = [adapter.model.logits(torch.tensor([ids]), m)[0] for m in (None, adapter.matrices())]
    theirs = []
    for file in ("", str(lora)):
        out = tmp_path / "logits.npy"
        subprocess.run([sys.executable, "-c", LLAMA_CPP, str(base), file, json.dumps(ids), str(out)], check=True)
        theirs.append(torch.from_numpy(np.load(out)))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() < 1e-3 * other.norm()
    change = theirs[1] - theirs[0]
    assert change.norm() > 0.05 * theirs[0].norm()
    assert ((ours[1] - ours[0]) - change).norm() < 1e-2 * change.norm()
