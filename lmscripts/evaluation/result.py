"""The result of an evaluation: where it may be written, as JSON, and as a table and sentences for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmscripts.errors import UserError
from lmscripts.files import check_writable
from lmscripts.text.reading import format_of

FORMAT = "lmscripts evaluation"
# What a result has that was written before the results said their format.
_KEYS = frozenset({"model", "untrained", "text", "metrics", "counts", "options", "versions"})
_LARGEST = 1 << 26  # bytes; no result is larger
_DIFFERENT_BYTES = 0.02  # share of the bytes of a text that may be no text without a word about it

Result = Mapping[str, Any]


# ---- where it goes -----------------------------------------------------------------------------------------------


def check_output(name: str | None, inputs: Sequence[Path]) -> Path | None:
    """The file for the result, after checking that it can be written there and that nothing else is lost by it.

    Raises:
        UserError: it is one of the inputs, or something else than an earlier result, or it cannot be written.
    """
    if name is None:
        return None
    path = Path(name).expanduser()
    try:
        if not path.parent.is_dir():
            raise UserError(f"{path} cannot be written: {path.parent} is no folder")
        there = path.exists()
        if there and (same := [str(p) for p in inputs if p.exists() and path.samefile(p)]):
            raise UserError(f"{path} is the input {same[0]}, which the result would replace")
        check_writable(path)
        if there and not _is_result(path):
            way_out = "give another name, or remove it"
            raise UserError(f"{path} exists and is not an earlier result of an evaluation: {way_out}")
    except UserError as error:
        raise UserError(f"--output_file {error}") from None
    except OSError as error:
        raise UserError(f"--output_file {path} cannot be written: {error.strerror}") from error
    return path


def _is_result(path: Path) -> bool:
    """Whether a file is a result that was written here; in an empty one there is nothing to lose."""
    size = path.stat().st_size
    if not 0 < size <= _LARGEST:
        return size == 0
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and (found.get("format") == FORMAT or found.keys() >= _KEYS)


# ---- what it says ------------------------------------------------------------------------------------------------


def as_json(result: Result) -> str:
    """The result as a file holds it."""
    return json.dumps({"format": FORMAT, **result}, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def table(result: Result) -> str:
    """The result for people."""
    model = result["model"]
    step = "" if model["step"] is None else f", step {model['step']:,}"
    lines = [("model", f"{model['name']}: {model['type']}{step}, {model['parameters']:,} parameters")]
    lines += [(f"  {name}", f"sha256 {digest}") for name, digest in model["weights_sha256"].items()]
    if "decisions" in result:
        lines += [(name, str(fact)) for name, fact in result["decisions"].items()]
    else:
        lines += [("tokenizer", model["tokenizer"]), ("text", _size(result))]
    lines += [("options", ", ".join(f"{name} {value}" for name, value in result["options"].items()))]
    lines += [(name.replace("_", " "), f"{count:,}") for name, count in result["counts"].items()]
    shares = ("accuracy", "precision", "recall", "share")
    for name, value in result["metrics"].items():
        lines.append((name.replace("_", " "), f"{value:.2%}" if name.endswith(shares) else f"{value:.4f}"))
    if result["untrained"]:
        why = "; ".join(result["untrained_because"])
        lines.append(("UNTRAINED", f"BY ITS WEIGHTS THIS MODEL WAS NEVER TRAINED; the numbers are chance: {why}"))
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in lines)


def _size(result: Result) -> str:
    """How much text there is, and what of the files was counted."""
    files = result["text"]
    size = sum(file["bytes"] for file in files)
    forms = [(file.get("format", format_of(file["file"])[0]), format_of(file["file"])[1]) for file in files]
    tables = [form for form, _ in forms if form != "txt"]
    said = f"{len(files)} file{'s' * (len(files) > 1)}, {size:,} bytes"
    column = result["options"]["text_column"]
    if tables:
        said += f" in the column {column!r}" if len(tables) == len(files) else f" (of tables: in the column {column!r})"
    return said + " unpacked" * any(packed for form, packed in forms if form == "txt")


def remarks(result: Result) -> list[str]:
    """Sentences on what keeps the numbers from being compared; empty for most texts."""
    counts, metrics = result["counts"], result["metrics"]
    found = []
    for prefix, scored in (("", "targets" if "targets" in counts else "masked"), ("pseudo_", "pseudo_tokens")):
        if unknown := counts.get(f"{prefix}unknown_tokens", 0):
            names = [name for name in metrics if name.startswith("pseudo_") == bool(prefix)]
            names = [name for name in names if "bits" in name or "accuracy" in name]
            found.append(
                f"{unknown:,} of the {counts[scored]:,} scored tokens ({unknown / counts[scored]:.2%}) stand for text "
                f"that the tokenizer does not know: {' and '.join(n.replace('_', ' ') for n in names)} of this text "
                "cannot be compared with those of another tokenizer"
            )
    raw, text = counts["raw_bytes"], counts["text_bytes"]
    if "bits_per_byte" in metrics and abs(raw - text) > _DIFFERENT_BYTES * max(raw, text):
        found.append(
            f"bits per byte divides by the {raw:,} bytes of the text as it was given, bits per text byte by the "
            f"{text:,} that were read, line ends included: compare the latter where blank lines, damage or the form of "
            "the file differ"
        )
    return found
