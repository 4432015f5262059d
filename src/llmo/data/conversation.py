"""A conversation: OpenAI messages, the tools they may call, and, where people chose, two answers to compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""`role` (system, developer, user, assistant or tool) and `content`; an assistant's may be null beside `tool_calls`."""

INSTRUCTIONS = ("system", "developer")


@dataclass(slots=True)
class Conversation:
    """`messages` end with an answer, or, where `chosen` and `rejected` are answers to them, with a question."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    chosen: list[Message] | None = None
    rejected: list[Message] | None = None

    def every(self) -> list[Message]:
        """All messages, those of both answers too."""
        return [*self.messages, *(self.chosen or ()), *(self.rejected or ())]

    def transcript(self) -> str:
        """The conversation as a person reads it: `role: what was said`, a message a paragraph."""
        lines = [f"tools: {', '.join(tool['function']['name'] for tool in self.tools)}"] if self.tools else []
        lines += [said(message) for message in self.messages]
        lines += [said(message, " (chosen)") for message in self.chosen or ()]
        lines += [said(message, " (rejected)") for message in self.rejected or ()]
        return "\n".join(lines)


def said(message: Message, mark: str = "") -> str:
    """One message as a line of a transcript, its tool calls as `name(arguments)`."""
    calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in message.get("tool_calls", ())]
    content = message.get("content")
    return f"{message['role']}{mark}: " + "\n".join([*([content] if content else []), *calls])
