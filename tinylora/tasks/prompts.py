r"""Prompt styles: how a question is put to a model, in the words that published numbers were made with.

    qwen-boxed   Qwen2.5-Math's system prompt; SimpleRL evaluates with the same words. Answers in \boxed{}
    gsm8k-hash   verl's suffix for GSM8K. Answers after "####"
    plain        the question alone; strict still reads \boxed{}, which nobody asked for then
    raw          plain, and without a chat template, for models that have none

The chat template is the model's own in the others, with whatever system prompt it adds by itself.
"""

from typing import Literal

PromptStyle = Literal["auto", "qwen-boxed", "gsm8k-hash", "plain", "raw"]
Messages = list[dict[str, str]]

QWEN_BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
GSM8K_HASH = ' Let\'s think step by step and output the final answer after "####".'
FORMATS = {"qwen-boxed": "boxed", "gsm8k-hash": "hash"}  # what strict extraction holds an answer to


def messages(question: str, style: str) -> Messages:
    """The conversation up to the model's turn."""
    if style == "qwen-boxed":
        return [{"role": "system", "content": QWEN_BOXED}, {"role": "user", "content": question}]
    return [{"role": "user", "content": question + (GSM8K_HASH if style == "gsm8k-hash" else "")}]
