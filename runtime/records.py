"""Small JSON files beside a bundle's graphs that say what lies there: one way to read them, one way to refuse them."""

import json
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from runtime.errors import BundleError
from runtime.settings import Settings, first_problem

Record = TypeVar("Record", bound=Settings)


def read_record(file: Path, kind: type[Record], known_format: int, repair: str) -> Record:
    """What a file states; `repair` ends every refusal with what makes the file again.

    Raises:
        BundleError: it is no JSON, of another format, or a field is wrong.
    """
    try:
        record = json.loads(file.read_bytes())
    except ValueError as error:
        raise BundleError(f"{file}: expected JSON, found other data; {repair}") from error
    found = record.get("format") if isinstance(record, dict) else record
    if found != known_format:
        raise BundleError(f"{file}: expected format {known_format}, found {found!r}; upgrade qforge or {repair}")
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        raise BundleError(f"{file}: {first_problem(error)}; {repair}") from error
