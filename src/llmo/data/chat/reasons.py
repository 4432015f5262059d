"""What a user reads of each reason for which a conversation is dropped, and what to do when most of them are."""

from __future__ import annotations

from llmo.data.row import Drop

REASONS = {
    Drop.NO_ANSWER: (
        "have no answer to learn",
        "end each conversation with the assistant's turn, or name the column of the answers: data.label: NAME",
    ),
    Drop.EMPTY_CONTENT: ("hold an empty question or answer", "fill them, or remove these rows"),
    Drop.UNKNOWN_ROLE: (
        "hold a message of an unknown role",
        "roles are system, developer, user, assistant and tool (ShareGPT: system, human, gpt, tool)",
    ),
    Drop.BROKEN_TURNS: ("have turns in an order that cannot be", "a user asks, then the assistant answers"),
    Drop.BROKEN_TOOLS: (
        "describe or call tools in a form that is not OpenAI's",
        'write {"type": "function", "function": {"name": ..., "parameters": {...}}}, '
        'and calls {"function": {"name": ..., "arguments": "{...}"}}',
    ),
    Drop.NOT_TEXT: ("hold something that is not text", "leave out images and sounds; write what is said as a string"),
    Drop.SAME_ANSWERS: ("prefer an answer to itself", "chosen and rejected must differ"),
    Drop.PROMPT_LEAK: ("ask what another split holds out with another answer", ""),
}
"""By reason: the rest of the sentence that "12 of 90 conversations" begins, and a hint."""
