"""Shared fixtures. No test needs the network or a GPU, or touches a cache that TINYLORA_CACHE does not name; test_csrc alone
keeps headers in the user's own."""

import os

# pytest -n: workers and the processes they start share the cores instead of waiting for each other's threads.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

# ruff: noqa: E402  (torch reads that when it is imported)
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Triton decides at import whether kernels are compiled or interpreted; test_interpreted.py runs this folder in a child.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


# pytest -n gives out whole files; the longest go first, or one worker is left with them at the end.
LONGEST = (
    "test_bare",
    "test_train",
    "test_interpreted",
    "test_report",
    "test_csrc",
    "test_gguf_journey",
    "test_methods",
    "test_population",
    "test_aot",
    "test_sweep",
    "test_dispatch",
    "test_native",
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # xdist's own order is by the number of tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if "TINYLORA_CACHE" not in os.environ:  # where it is, GPU tests find their kernels proven and compiled there
            patch.setenv("TINYLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture
def tiny_model(tmp_path: Path) -> Callable[..., Path]:
    """A function that saves a random two-layer model as transformers writes it and returns its directory.

    tiny_model("qwen2" | "qwen3" | "llama", seed=0, **config): equal arguments give equal weights.
    """
    import transformers  # takes seconds, and most tests do without

    kinds = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }

    def make(family: str = "qwen2", seed: int = 0, **changes: object) -> Path:
        config_class, model_class = kinds[family]
        sizes = {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            # ten times the default: at 0.02 every layer is so close to the identity that hardly a fault shows in the logits
            "initializer_range": 0.2,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config_class(**{**sizes, **changes}))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("bias") or "norm" in name:  # zeros and ones by default, which would hide a swap
                        parameter.add_(0.1 * torch.randn_like(parameter))
        directory = tmp_path / f"{family}-{seed}-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(params=[("native", 32), ("addmm", 8)], ids=["native", "addmm"])
def adapted(tiny_model: Callable[..., Path], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A model, its adapter and that one's matrices: once with C kernels, for which its heads are large enough, once without."""
    from tinylora.adapter.config import TinyLoRAConfig
    from tinylora.adapter.on_decoder import Adapter
    from tinylora.model.loader import load_model

    backend, head_dim = request.param
    monkeypatch.setenv("TINYLORA_BACKEND", backend)
    model = load_model(str(tiny_model("qwen2", head_dim=head_dim)))
    adapter = Adapter(model, TinyLoRAConfig(u=3, n_tie=4))
    with torch.no_grad():
        adapter.v.copy_(0.2 * torch.randn(adapter.v.shape, generator=torch.Generator().manual_seed(0)))
        return model, adapter, adapter.matrices()


@pytest.fixture
def text_model(tiny_model: Callable[..., Path]) -> Callable[[list[str]], Path]:
    """A function: a random small Qwen2 with a byte-level tokenizer trained on the given texts, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def make(texts: list[str]) -> Path:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
        )
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="<|end|>",
            chat_template="{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>",
        )
        path = tiny_model("qwen2", vocab_size=len(fast), max_position_embeddings=1024)
        fast.save_pretrained(path)
        return path

    return make
