"""A GGUF as a model: tensors bit for bit, logits, refusals, split files, memory."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import HEAD_DIM, LAYERS, TYPES, blocks, gguf, hugging_face, part_path, transformers_model, write_gguf

from tinylora import InputError, load_model
from tinylora.model import gguf as ours
from tinylora.model.config import ModelConfig, rope_frequencies
from tinylora.model.gguf_file import GGUF
from tinylora.model.loader import load_config, resolve_model

REAL = Path.home() / ".cache" / "tinylora-models"
SMOLLM2, QWEN = REAL / "SmolLM2-135M-Instruct.Q4_1.gguf", REAL / "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf"


def real(path: Path) -> Any:
    return pytest.param(path, marks=pytest.mark.skipif(not path.exists(), reason=f"{path.name} is not there"), id=path.stem[:7])


# ---- what the bytes mean, decoded here a second time, number by number ---------------------------------------------------


def half(raw: bytes) -> np.float32:
    return np.float32(np.frombuffer(raw, np.float16)[0])


def low_then_high(raw: bytes) -> list[int]:
    """The lower four bits of all bytes, then the upper four."""
    return [b & 15 for b in raw] + [b >> 4 for b in raw]


def q4_0(b: bytes) -> list[np.float32]:
    return [half(b[:2]) * np.float32(q - 8) for q in low_then_high(b[2:])]


def q4_1(b: bytes) -> list[np.float32]:
    return [half(b[:2]) * np.float32(q) + half(b[2:4]) for q in low_then_high(b[4:])]


def q8_0(b: bytes) -> list[np.float32]:
    return [half(b[:2]) * np.float32(q) for q in struct.unpack("32b", b[2:])]


def q4_k(b: bytes) -> list[np.float32]:
    d, least, scales, found = half(b[:2]), half(b[2:4]), b[4:16], []
    for group in range(8):  # of 32 numbers, each with a scale and a minimum of six bits
        if group < 4:
            scale, minimum = scales[group] & 63, scales[group + 4] & 63
        else:
            scale = scales[group + 4] & 15 | scales[group - 4] >> 6 << 4
            minimum = scales[group + 4] >> 4 | scales[group] >> 6 << 4
        quants = b[16 + 32 * (group // 2) : 48 + 32 * (group // 2)]
        for byte in quants:
            q = byte >> 4 if group % 2 else byte & 15
            found.append(d * np.float32(scale) * np.float32(q) - least * np.float32(minimum))
    return found


def q6_k(b: bytes) -> list[np.float32]:
    low, high, scales, d = b[:128], b[128:192], struct.unpack("16b", b[192:208]), half(b[208:])
    found = []
    for i in range(256):
        block, place = divmod(i, 128)
        part, column = divmod(place, 32)  # four parts of 32: lower halves of 64 bytes, then upper halves
        four = low[64 * block + 32 * (part % 2) + column] >> 4 * (part // 2) & 15
        two = high[32 * block + column] >> 2 * part & 3
        found.append(d * np.float32(scales[i // 16]) * np.float32((four | two << 4) - 32))
    return found


@pytest.mark.parametrize("decode", [q4_0, q4_1, q8_0, q4_k, q6_k], ids=lambda f: f.__name__)
def test_the_numbers_of_a_block(decode: Callable[[bytes], list[np.float32]], tmp_path: Path) -> None:
    type_ = decode.__name__.upper()
    path = write_gguf(tmp_path / "m.gguf", type_=type_)
    weight = load_model(str(path), "cpu", "float32").weights()["model.layers.1.mlp.up_proj"]  # (512, 256)
    place = GGUF(path).tensors["blk.1.ffn_up.weight"]
    raw = path.read_bytes()[place.offset : place.offset + place.size]
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_]][1]
    wanted = [x for at in range(0, 40 * size, size) for x in decode(raw[at : at + size])]
    assert weight.flatten()[: len(wanted)].tolist() == [float(x) for x in wanted]
    assert weight.std() > 0.02


# ---- tensors and logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("type_", TYPES)
def test_tensors_are_ggufs_own(type_: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", type_, layers=1)
    model = load_model(str(path), "cpu", str(dtype).removeprefix("torch."))
    _, state = hugging_face(path, torch.float32)
    for name, tensor in model.tensors().items():
        wanted = state.pop(name)
        if tensor.dtype == torch.bfloat16:  # gguf's own rounding
            raw = gguf.quantize(wanted.numpy(), gguf.GGMLQuantizationType.BF16)
            wanted = torch.from_numpy(raw.view(np.int16).reshape(wanted.shape)).view(torch.bfloat16)
        assert tensor.dtype == (dtype if "proj.weight" in name else torch.float32) and torch.equal(tensor, wanted), name
        assert tensor.isfinite().all() and tensor.float().std() > 0.01, name
    assert not state


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("family", "bias"), [("qwen2", False), ("qwen3", False), ("llama", False), ("llama", True), ("qwen3", True)]
)
def test_logits_are_transformers(family: str, bias: bool, tied: bool, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", family, "Q4_0", tied, bias=bias)
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
    model, theirs = load_model(str(path), "cpu"), transformers_model(path)
    assert model.config.tied_head == tied
    with torch.no_grad():
        assert relative(model.logits(ids), theirs(ids).logits) < 1e-5


@pytest.mark.parametrize("path", [real(SMOLLM2), real(QWEN)])
def test_a_real_model_is_transformers(path: Path) -> None:
    """Tensors, logits, and 64 greedy tokens for 20 prompts with the file's template; of Qwen for 4, as 20 take two minutes."""
    from tinylora.engine.generate import generate
    from tinylora.engine.rollout import Sampling
    from tinylora.engine.text import Text
    from tinylora.tasks.builtin import rows

    model, text, theirs = load_model(str(path), "cpu"), Text(path), transformers_model(path)
    with torch.no_grad():
        for name, tensor in model.tensors().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    prompts = [
        text.prompt([{"role": "user", "content": row["question"]}]) for row in rows("train", 20 if path == SMOLLM2 else 4)
    ]
    with torch.no_grad():
        ids = torch.tensor([prompts[0]])
        assert relative(model.logits(ids), theirs(ids).logits) < 1e-5
    found = generate(model, prompts, sampling=Sampling(64, 0.0, eos_ids=text.eos_ids))
    for prompt, completion in zip(prompts, found, strict=True):  # token after token, each is their likeliest as well
        with torch.no_grad():
            likeliest = theirs(torch.tensor([prompt + completion.tokens])).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert completion.tokens == likeliest.tolist()
        assert len(completion.tokens) == 64 or completion.tokens[-1] in text.eos_ids


def test_rope_divisors_are_llama_31s(tmp_path: Path) -> None:
    """llama.cpp's converter writes Llama 3.1's scaling as a divisor of each frequency."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    raw = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "vocab_size": 8, "intermediate_size": 8}
    wanted = rope_frequencies(ModelConfig.from_dict({**raw, "num_hidden_layers": 1, "rope_parameters": scaling}))
    plain = 1 / 500000.0 ** (torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    divisors = (plain / wanted.double()).tolist()
    path = write_gguf(
        tmp_path / "m.gguf", "llama", rope_freqs=divisors, change=lambda w: overwrite(w, "rope.freq_base", 500000.0)
    )
    config = load_config(path)
    torch.testing.assert_close(rope_frequencies(config), wanted, rtol=1e-6, atol=0)
    assert max(divisors) == pytest.approx(8.0)
    said = config.to_dict()["rope_parameters"]
    assert said["rope_type"] == "llama3" and said["factor"] == pytest.approx(8.0)
    strange = write_gguf(tmp_path / "n.gguf", "llama", rope_freqs=[1 + i % 3 for i in range(HEAD_DIM // 2)])
    with pytest.raises(InputError, match="rope are not Llama 3.1's"):
        load_config(strange).to_dict()


def test_linear_scaling(tmp_path: Path) -> None:
    def change(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    config, plain = (load_config(write_gguf(tmp_path / f"{i}.gguf", change=c)) for i, c in enumerate((change, lambda w: None)))
    assert torch.equal(rope_frequencies(config), rope_frequencies(plain) / 4)


# ---- what is refused -----------------------------------------------------------------------------------------------------


def overwrite(writer: Any, key: str, value: Any) -> None:
    """Another value for metadata that are there already, of the same type."""
    old = writer.kv_data[0].pop(f"{writer.arch}.{key}", None)
    if old is None:
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{writer.arch}.{key}", value)
    else:
        writer.add_key_value(f"{writer.arch}.{key}", value, old.type)


LIES = {
    "embedding_length": (512, "rope.dimension_count is 64; by its other metadata it is 128"),
    "feed_forward_length": (768, "blk.0.ffn_gate.weight has shape"),
    "attention.head_count": (8, "rope.dimension_count is 64; by its other metadata it is 32"),
    "attention.head_count_kv": (4, "blk.0.attn_k.weight has shape"),
    "feed_forward_length ": (2**31 - 1, "blk.0.ffn_gate.weight has shape"),  # nothing is allocated for it
    "block_count": (LAYERS + 1, "it has no tensor blk.2."),
    "vocab_size": (7, "vocab_size is 7; by its other metadata it is"),
    "context_length": (0, "context_length is 0; it must be a positive number"),
    "rope.freq_base": (float("nan"), "rope.freq_base is nan"),
    "attention.layer_norm_rms_epsilon": (-1.0, "rms_epsilon is -1.0"),
    "rope.scaling.factor": (0.0, "rope.scaling.factor is 0.0; it must be a positive number"),
    "expert_count": (8, "expert_count is 8, which this decoder does not have"),
    "attention.key_length": (63, "head_dim is 63; it must be even"),
}


@pytest.mark.parametrize("key", LIES)
def test_metadata_that_lie(key: str, tmp_path: Path) -> None:
    value, message = LIES[key]
    path = write_gguf(tmp_path / "m.gguf", change=lambda w: overwrite(w, key.strip(), value))
    with pytest.raises(InputError, match=message) as error:
        load_model(str(path), "cpu")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_fewer_layers_than_the_file_has(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", change=lambda w: overwrite(w, "block_count", 1))
    with pytest.raises(InputError, match=r"its tensor blk\.1\.\S+ is none that this decoder reads"):
        load_model(str(path), "cpu")


@pytest.mark.parametrize("lacking", ["token_embd.weight", "output_norm.weight", "blk.1.attn_v.weight", "blk.0.attn_k.bias"])
def test_a_missing_tensor(lacking: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", leave_out=lacking)
    with pytest.raises(InputError, match=f"it has no tensor {lacking}"):
        load_model(str(path), "cpu")


def test_other_architectures(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "gemma3")
    with pytest.raises(InputError, match=r"architecture is 'gemma3' \(supported: qwen2, qwen3, llama\)"):
        load_model(str(path), "cpu")


@pytest.mark.parametrize("type_", ["yarn", "longrope"])
def test_other_ropes(type_: str, tmp_path: Path) -> None:
    kind = gguf.RopeScalingType(type_)
    path = write_gguf(tmp_path / "m.gguf", change=lambda w: w.add_rope_scaling_type(kind))
    with pytest.raises(InputError, match=f"rope scaling '{type_}'"):
        load_model(str(path), "cpu")


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    place = GGUF(path).tensors["blk.1.ffn_down.weight"]
    raw = bytearray(path.read_bytes())
    raw[place.offset + place.size - 34 : place.offset + place.size - 32] = b"\xff\xff"  # the scale of its last block
    path.write_bytes(raw)
    with pytest.raises(InputError, match="blk.1.ffn_down.weight has numbers that are not finite"):
        load_model(str(path), "cpu")


def test_an_array_without_end(tmp_path: Path) -> None:
    """A damaged count is refused before a list of it is made."""
    path = write_gguf(tmp_path / "m.gguf", change=lambda w: w.add_array("general.numbers", [1, 2, 3]))
    raw = bytearray(path.read_bytes())
    at = raw.index(b"general.numbers") + len("general.numbers") + 8
    raw[at : at + 8] = struct.pack("<Q", 1 << 30)
    path.write_bytes(raw)
    with pytest.raises(InputError, match="damaged: an array of 1,073,741,824 values"):
        load_model(str(path), "cpu")


def test_a_type_that_is_not_known(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    raw = bytearray(path.read_bytes())
    at = raw.index(b"blk.1.ffn_down.weight") + len("blk.1.ffn_down.weight") + 4 + 16
    for number, message in (
        (4, "not know"),
        (24, "I8, which gguf cannot dequantise|begins at byte|cut short"),
        (999, "not know"),
    ):
        raw[at : at + 4] = struct.pack("<I", number)
        path.write_bytes(raw)
        with pytest.raises(InputError, match=message):
            load_model(str(path), "cpu")


def test_cut_short_anywhere(tmp_path: Path) -> None:
    """Every length that a download may have stopped at is refused, with the file's name, and none by another error."""
    path = write_gguf(tmp_path / "m.gguf", layers=1)
    raw, cut = path.read_bytes(), tmp_path / "cut.gguf"
    head = min(place.offset for place in GGUF(path).tensors.values())
    lengths = {*range(0, 200), *range(200, head, 997), *np.linspace(head, len(raw) - 33, 50).astype(int).tolist()}
    for length in sorted(lengths):
        cut.write_bytes(raw[:length])
        with pytest.raises(InputError, match="cut short|no GGUF file|cannot be read") as error:
            load_model(str(cut), "cpu")
        assert "cut.gguf" in str(error.value)


def test_flipped_bits_are_refused_or_another_base(tmp_path: Path) -> None:
    """In the head: an error with one line, or another hash, or a field that enters neither function nor ids."""
    path = write_gguf(tmp_path / "m.gguf", type_="F16", layers=1)
    raw, base = path.read_bytes(), load_model(str(path), "cpu").base_hash
    places = GGUF(path).tensors.values()
    head, rng, flipped = min(p.offset for p in places), np.random.default_rng(0), tmp_path / "flipped.gguf"
    alike = 0
    at = [*rng.integers(0, head, 250), *(p.offset + rng.integers(p.size) for p in places)]
    for i in at:
        changed = bytearray(raw)
        changed[i] ^= 1 << int(rng.integers(8))
        flipped.write_bytes(changed)
        try:
            alike_now = load_model(str(flipped), "cpu").base_hash == base
        except InputError as error:
            assert "\n" not in str(error)
            continue
        assert not alike_now or i < head
        alike += alike_now
    assert alike < 25  # names, the template, padding


def test_hashes_tell_quantisations_apart(tmp_path: Path) -> None:
    bases = {
        type_: load_model(str(write_gguf(tmp_path / f"{type_}.gguf", type_=type_)), "cpu").base_hash
        for type_ in ("F32", "Q8_0", "Q4_K")
    }
    again = load_model(str(write_gguf(tmp_path / "again.gguf")), "cpu", "bfloat16")
    assert len(set(bases.values())) == 3 and again.base_hash == bases["Q8_0"]
    assert ours.METADATA in again.digests


# ---- files of several parts, and of the hub ------------------------------------------------------------------------------


def test_split_files(tmp_path: Path) -> None:
    whole = load_model(str(write_gguf(tmp_path / "whole.gguf")), "cpu")
    first = write_gguf(tmp_path / "m.gguf", parts=3)
    for i in range(3):  # any part will do
        split = load_model(str(part_path(tmp_path / "m.gguf", i, 3)), "cpu")
        assert split.base_hash == whole.base_hash and split.path == first
    for lacking in range(3):
        part = part_path(tmp_path / "m.gguf", lacking, 3)
        raw = part.read_bytes()
        part.unlink()
        other = part_path(tmp_path / "m.gguf", (lacking + 1) % 3, 3)
        with pytest.raises(InputError, match=f"one of 3 parts; {part.name} is not beside it"):
            load_model(str(other), "cpu")
        part.write_bytes(raw)
    second = part_path(tmp_path / "m.gguf", 1, 3)
    second.write_bytes(part_path(tmp_path / "m.gguf", 2, 3).read_bytes())
    with pytest.raises(InputError, match="do not say that it is part 2 of 3"):
        load_model(str(first), "cpu")
    renamed = first.rename(tmp_path / "model.gguf")
    with pytest.raises(InputError, match="name them NAME-00001-of-00003.gguf"):
        load_model(str(renamed), "cpu")


def test_a_file_that_was_split_and_merged(tmp_path: Path) -> None:
    """llama-gguf-split leaves split.count 0 in it."""

    def change(writer: Any) -> None:
        writer.add_uint16("split.count", 0)

    assert load_config(write_gguf(tmp_path / "m.gguf", change=change)).family == "qwen2"
    for count in (-1, "two", [2]):

        def lie(writer: Any, count: Any = count) -> None:
            kind = {int: writer.add_int32, str: writer.add_string, list: writer.add_array}[type(count)]
            kind("split.count", count)

        with pytest.raises(InputError, match="split.count is"):
            load_config(write_gguf(tmp_path / "m.gguf", change=lie))


def test_files_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "sub").mkdir()
    write_gguf(tmp_path / "m.gguf")
    write_gguf(tmp_path / "sub" / "s.gguf", parts=2)
    assert resolve_model("owner/name/m.gguf") == tmp_path / "m.gguf"
    assert resolve_model("owner/name/sub/s-00001-of-00002.gguf") == tmp_path / "sub" / "s-00001-of-00002.gguf"
    assert asked == [("owner/name", ["m.gguf"]), ("owner/name", ["sub/s-*-of-00002.gguf"])]
    with pytest.raises(InputError, match="owner/name has no such file"):
        resolve_model("owner/name/other.gguf")
    for wrong in ("name/m.gguf", "./a/b/m.gguf", "m.gguf"):
        with pytest.raises(InputError, match="no such file, and not one of the hub"):
            resolve_model(wrong)


def test_a_directory_of_gguf_files_and_files_that_are_none(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"name one of the files \(m.gguf\)"):
        load_model(str(tmp_path), "cpu")
    blob = path.rename(tmp_path / "sha256-0123")  # Ollama's names
    assert load_model(str(blob), "cpu").config.family == "qwen2"
    for content in (b"", b"GG", b"hello, world", json.dumps({"model_type": "qwen2"}).encode()):
        blob.write_bytes(content)
        with pytest.raises(InputError, match="this is no GGUF file"):
            load_model(str(blob), "cpu")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="needs the package gguf: pip install gguf"):
        load_model(str(path), "cpu")


# ---- memory --------------------------------------------------------------------------------------------------------------

PEAK = """
import re, sys
from pathlib import Path
from tinylora import load_model
load_model("builtin", "cpu", sys.argv[2])
def held(line): return 1024 * int(re.search(line + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = held("VmRSS")
model = load_model(sys.argv[1], "cpu", sys.argv[2])
sizes = [t.numel() * t.element_size() for t in model.tensors().values()]
print(held("VmHWM") - before, sum(sizes), max(sizes))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", [real(QWEN)])
def test_peak_memory_of_loading(path: Path, dtype: str) -> None:
    done = subprocess.run([sys.executable, "-c", PEAK, str(path), dtype], capture_output=True, text=True, check=True)
    peak, model, largest = map(int, done.stdout.split())
    assert peak <= model + 1.2 * largest, (peak, model, largest)


def test_a_random_block_is_what_its_type_says() -> None:
    """The files of these tests: no type's weights are zero, infinite or all alike."""
    for type_ in TYPES:
        weight = gguf.dequantize(blocks(type_, 8, 512, np.random.default_rng(0)), gguf.GGMLQuantizationType[type_])
        assert weight.shape == (8, 512) and np.isfinite(weight).all() and 0.03 < weight.std() < 0.1, (type_, weight.std())
