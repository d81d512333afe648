"""An adapter as a LoRA in a GGUF file, which llama.cpp takes as --lora. Every correction is exact: B M A, of rank r.

    blk.I.NAME.weight.lora_a (r, K) = A      blk.I.NAME.weight.lora_b (N, r) = B M      float32, scaling 1

Source: llama.cpp's src/llama-adapter.cpp, which wants these names and refuses any other tensor.
"""

from pathlib import Path

from torch import Tensor

from tinylora.files import write_file
from tinylora.model.gguf import PAIRED, file_name, in_pairs
from tinylora.model.gguf_file import gguf_package


def write_gguf_lora(path: Path, moves: dict[str, tuple[Tensor, Tensor]], family: str, head_dim: int, base_name: str) -> None:
    """`moves` are A (r, K) and B M (N, r) of every adapted module; `base_name` is no path. family, head_dim: the base's."""
    gguf = gguf_package()
    [r] = {A.shape[0] for A, _ in moves.values()}  # an adapter has one rank

    def write(partial: str) -> None:
        writer = gguf.GGUFWriter(partial, family)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(r))  # the scaling is alpha / r
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base_name)
        for module, (A, BM) in moves.items():
            if family == "llama" and module.endswith(PAIRED):
                BM = in_pairs(BM, head_dim)
            name = file_name(module)
            writer.add_tensor(f"{name}.weight.lora_a", A.float().contiguous().numpy())
            writer.add_tensor(f"{name}.weight.lora_b", BM.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_file(path, write)
