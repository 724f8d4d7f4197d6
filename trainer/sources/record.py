"""Records that name their parts in one of the field's ways → records of a manifest.

Known names: `caption`, `captions`, `text` or `sentences` (of texts or `{"raw": …}`); `question` with `answers`,
`answer` or `multiple_choice_answer` (of texts or `{"answer": …}`); `turns` or LLaVA's `conversations`.
"""

import json
from typing import Any

from runtime.errors import DataError

Entry = tuple[str, dict[str, Any] | DataError]
"""(where it was found, the record of a manifest, or why there is none)."""
CAPTIONS = ("captions", "caption", "text", "txt", "sentences")
ANSWERS = ("answers", "answer", "multiple_choice_answer")
IMAGE_TOKEN = "<image>"
"""LLaVA writes where the image stands in the first question; ours is a prefix, so the mark goes."""


def as_manifest_record(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The record with the manifest's keys; keys it does not know stay as they are."""
    found = dict(record)
    for names, key, part in ((CAPTIONS, "captions", "raw"), (ANSWERS, "answers", "answer")):
        values = [found.pop(name) for name in names if found.get(name) is not None]
        if values:
            found[key] = _texts(values[0], part)
    if found.get("question") is None:
        found.pop("question", None)
        found.pop("answers", None)
    if "conversations" in found:
        found["turns"] = _turns(found.pop("conversations"), where)
    elif "turns" in found:
        found["turns"] = [_pair(turn) for turn in found["turns"] or []]
    return found


def _texts(value: Any, part: str) -> list[Any]:
    """Texts of a text, a list of texts, or a list of objects that hold one under `part`."""
    values = value if isinstance(value, list) else [value]
    return [item[part] if isinstance(item, dict) and part in item else item for item in values]


def _pair(turn: Any) -> Any:
    return (
        [turn["question"], turn["answer"]] if isinstance(turn, dict) and {"question", "answer"} <= set(turn) else turn
    )


def _turns(conversation: list[dict[str, str]], where: str) -> list[list[str]]:
    """(question, answer) pairs of LLaVA's alternating `human` and `gpt` messages."""
    speakers = [message.get("from") for message in conversation]
    if not speakers or len(speakers) % 2 or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise DataError(
            f"{where}: expected messages from 'human' and 'gpt' in turn under 'conversations', "
            f"found {json.dumps(speakers)[:80]}"
        )
    said = [message["value"].replace(IMAGE_TOKEN, "").strip() for message in conversation]
    return [list(pair) for pair in zip(said[::2], said[1::2], strict=True)]
