"""The tokenizer of a GGUF file as llama.cpp reads it: ids, special tokens, end tokens, chat template.

transformers' own conversion is not used: it cuts every "llama" file's words as GPT-2 does, whatever `tokenizer.ggml.pre` says.
"""

from pathlib import Path
from typing import Any

from tinylora.engine.pretokenizers import BEGINS, PRETOKENIZERS, WHOLE_WORDS
from tinylora.errors import InputError
from tinylora.model.gguf_file import GGUF

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # of tokenizer.ggml.token_type; 1 is an ordinary token, 5 an unused one
SPACE = "\u2581"  # how SentencePiece writes a space
# Tokens that end a text by their names, beside those that the metadata name.
# fmt: off
ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>",
    "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
)
# fmt: on


def read_tokenizer(path: Path) -> tuple[Any, tuple[int, ...]]:
    """transformers' fast tokenizer of a file, and the ids that end a text. InputError where the file's cannot be honoured."""
    return _Tokens(path, GGUF(path).metadata).built()


class _Tokens:
    """The metadata under tokenizer.ggml, checked."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path, self.metadata = path, metadata
        self.kind = self.get("model", str)
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.strings("tokens"))]  # llama.cpp's name for ""
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            raise self.refuse("tokens has a token twice")
        self.types = self.get("token_type", list, [1] * len(self.tokens))
        if len(self.types) != len(self.tokens):
            raise self.refuse(f"token_type has {len(self.types)} entries for {len(self.tokens)} tokens")
        self.pre = "default" if self.kind != "gpt2" else self.get("pre", str, "default")

    def refuse(self, why: str) -> InputError:
        return InputError(f"--model {self.path}: tokenizer.ggml.{why}")

    def get(self, key: str, type_: type, default: Any = None) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if type(value) is not type_:
            raise self.refuse(f"{key} is {'missing' if value is None else f'a {type(value).__name__}, not a {type_.__name__}'}")
        return value

    def strings(self, key: str) -> list[str]:
        values: list[str] = self.get(key, list)
        if not values or not isinstance(values[0], str):  # a GGUF's array has one type
            raise self.refuse(f"{key} is no list of texts")
        return values

    def id(self, key: str) -> int | None:
        """A special token's id; None where the file names none, or one beyond its tokens, as llama.cpp does."""
        value = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        return value if type(value) is int and 0 <= value < len(self.tokens) else None

    def built(self) -> tuple[Any, tuple[int, ...]]:
        build = {"gpt2": self.byte_level, "llama": self.sentence_piece}.get(self.kind)
        if build is None:
            raise self.refuse(f"model is {self.kind!r} (supported: gpt2, llama)")
        try:
            return self.finished(build())
        except InputError:
            raise
        except Exception as error:  # of tokenizers' own: a bare Exception
            raise self.refuse(f"tokens and merges make no tokenizer: {error}") from None

    def finished(self, tokenizer: Any) -> tuple[Any, tuple[int, ...]]:
        """With what is not cut and merged: special tokens, the begin token, the template; and the ids that end a text."""
        from tokenizers import AddedToken  # with transformers: takes seconds to import
        from tokenizers.processors import TemplateProcessing
        from transformers import PreTrainedTokenizerFast

        named = {self.id(key) for key in ("eos", "eot", "eom")} | {self.ids.get(token) for token in ENDS}
        ends = {i for i in named if i is not None}
        special = {i for i, type_ in enumerate(self.types) if type_ in (CONTROL, UNKNOWN)} | ends
        added = special | {i for i, type_ in enumerate(self.types) if type_ == USER_DEFINED}
        tokenizer.add_tokens([AddedToken(self.tokens[i], special=i in special, normalized=False) for i in sorted(added)])
        begin = self.id("bos")
        template = self.metadata.get("tokenizer.chat_template")
        if not isinstance(template, str | None):
            raise InputError(f"--model {self.path}: tokenizer.chat_template is no text")
        if begin is not None and self.get("add_bos_token", bool, self.kind == "llama" or self.pre in BEGINS):
            token = self.tokens[begin]
            tokenizer.post_processor = TemplateProcessing(single=f"{token}:0 $A:0", special_tokens=[(token, begin)])
            if template is not None and "bos_token" not in template and token not in template:
                template = "{{- bos_token }}" + template
        names = {key: self.id(name) for key, name in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"))}
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            clean_up_tokenization_spaces=False,
            chat_template=template,
            **{key: self.tokens[i] for key, i in names.items() if i is not None},
        )
        return fast, tuple(sorted(ends))

    def byte_level(self) -> Any:
        """Byte-pair merges in words, as GPT-2 writes bytes."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        if self.pre not in PRETOKENIZERS:
            raise self.refuse(f"pre is {self.pre!r}, which is not known here; another's would give other ids")
        merges = [self._pair(merge) for merge in self.strings("merges")]
        tokenizer = Tokenizer(models.BPE(self.ids, merges, ignore_merges=self.pre in WHOLE_WORDS))
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRETOKENIZERS[self.pre]]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _pair(self, merge: str) -> tuple[str, str]:
        at = merge.find(" ", 1)
        if at < 0:
            raise self.refuse(f"merges has {merge!r}, which is no pair")
        return merge[:at], merge[at + 1 :]

    def sentence_piece(self) -> Any:
        """Two neighbours become one token, that of the highest score first; bytes where there is none."""
        from tokenizers import Tokenizer, decoders, models, normalizers

        scores = self.get("scores", list)
        if len(scores) != len(self.tokens):
            raise self.refuse(f"scores has {len(scores)} entries for {len(self.tokens)} tokens")
        plain = {i for i, type_ in enumerate(self.types) if type_ not in (UNKNOWN, CONTROL, BYTE)}
        for token in (self.tokens[i] for i in sorted(plain) if len(self.tokens[i]) == 2 and self.types[i] != USER_DEFINED):
            if not {self.ids.get(character) for character in token} <= plain:  # llama.cpp merges what are no tokens, too
                raise self.refuse(f"tokens has {token!r} and not both its characters: ids would not be llama.cpp's")
        merges = []
        for i in sorted(plain, key=lambda i: -scores[i]):
            token = self.tokens[i]
            halves = [(token[:at], token[at:]) for at in range(1, len(token))]
            merges += [(a, b) for a, b in halves if self.ids.get(a) in plain and self.ids.get(b) in plain]
        unknown = self.id("unknown")
        model = models.BPE(
            self.ids, merges, unk_token=None if unknown is None else self.tokens[unknown], fuse_unk=True, byte_fallback=True
        )
        prefixed = self.get("add_space_prefix", bool, True)
        tokenizer = Tokenizer(model)
        begin = [normalizers.Prepend(SPACE)] if prefixed else []
        tokenizer.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", SPACE)])
        end = [decoders.Strip(" ", 1, 0)] if prefixed else []
        tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *end])
        return tokenizer
