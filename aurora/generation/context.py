"""Whether prompt, visual tokens and answer fit the context of the language model, known before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def check_context(
    text_tokens: Sequence[int],
    visual_tokens: Sequence[int],
    max_seq_len: int,
    *,
    min_new_tokens: int = 1,
    advice: Callable[[int], str] | None = None,
) -> list[int]:
    """Check that every prompt leaves room for an answer, before anything runs.

    Args:
        text_tokens: Text tokens of each row's prompt.
        visual_tokens: Visual tokens of each row.
        max_seq_len: Context of the language model in tokens.
        min_new_tokens: Tokens that an answer must be able to have.
        advice: Says what would help a row, given its index.

    Returns:
        Tokens that each row may still generate, at least 1.

    Raises:
        ValueError: if a prompt is empty, or leaves too little room.
    """
    room: list[int] = []
    needed = max(1, min_new_tokens)
    if needed >= max_seq_len:
        raise ValueError(f"min_new_tokens={min_new_tokens}: want less than text.max_seq_len={max_seq_len}")
    for row, (text, visual) in enumerate(zip(text_tokens, visual_tokens, strict=True)):
        if text + visual == 0:
            raise ValueError(f"row {row}: the prompt is empty, want at least one token")
        if text + visual + needed > max_seq_len:
            missing = "no room for an answer" if needed == 1 else f"no room for min_new_tokens={needed}"
            help_ = advice(row) if advice is not None else "lower num_frm, token_kept_ratio or visual_token_budget"
            raise ValueError(
                f"row {row}: {text} text + {visual} visual = {text + visual} prompt tokens leave {missing}; want at "
                f"most {max_seq_len - needed} (text.max_seq_len={max_seq_len}): {help_}"
            )
        room.append(max_seq_len - text - visual)
    return room
