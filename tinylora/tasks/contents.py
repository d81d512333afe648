"""A message's content as plain text: it comes as text, as a list of parts, or as null."""

from typing import Any


def unreadable(messages: list[dict[str, Any]]) -> str | None:
    """Why a content cannot be read as text; None where all can."""
    for message in messages:
        content = message["content"]
        for part in content if isinstance(content, list) else [{"type": "text", "text": content or ""}]:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text":
                return f"a part of type {kind!r} in a message's content: only text is read"
            if not isinstance(part.get("text"), str):
                return f"a message's content is a {type(part.get('text')).__name__}, and no text"
    return None


def plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with every content as text: parts one after another, null as no text."""
    return [{**message, "content": _text(message["content"])} for message in messages]


def _text(content: Any) -> str:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""
