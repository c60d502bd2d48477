"""Which folder is meant: a model, a checkpoint or a run, found whole; of a name on the Hub its cached files.

Nothing is renamed or removed here: a run may be going on.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from lmscripts.errors import UserError, shortened
from lmscripts.files import file_sha256, read_json

CHECKSUMS = "checksums.json"
AVERAGE = "average.safetensors"
STATE = "training_state.json"
OPTIMIZER = "optimizer.safetensors"
OF_TRAINING = (OPTIMIZER, STATE, CHECKSUMS, AVERAGE)  # files of a checkpoint that a finished model does without
# In the order in which transformers looks for them; of a model in parts the index names the parts.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SNAPSHOTS = "snapshots"  # subfolder of a run that names its checkpoints by epochs and records
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_SNAPSHOT = re.compile(r"(\d{1,18})(?:\.(\d+))?")  # not the 40 digits of a snapshot of the Hub
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # owner/name, which nobody is asked about if it is a path
_NO_HUB_NAME = (".ckpt", ".pt", ".bin", ".safetensors")


def checkpoint_step(folder: Path) -> int | None:
    """Step of a checkpoint folder by its name; None for a snapshot and for any other folder."""
    match = _CHECKPOINT.fullmatch(folder.name)
    return int(match.group(1)) if match else None


def checkpoint_place(folder: Path) -> tuple[int, int] | None:
    """Place of a checkpoint folder among those of its run, by its name; None for any other folder.

    There are `checkpoint-STEP`, and `snapshots/EPOCHS` and `snapshots/EPOCHS.RECORDS`: after so many whole epochs, and
    within the next one, when so many records of all epochs were trained on.
    """
    if (step := checkpoint_step(folder)) is not None:
        return step, 0
    match = _SNAPSHOT.fullmatch(folder.name) if folder.parent.name == SNAPSHOTS else None
    return (int(match.group(1)), int(match.group(2) or 0)) if match else None


def run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint lies in."""
    return checkpoint.parent.parent if checkpoint.parent.name == SNAPSHOTS else checkpoint.parent


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    folders = [*run_dir.glob("checkpoint-*"), *(run_dir / SNAPSHOTS).glob("*")]
    places = {path: place for path in folders if (place := checkpoint_place(path)) is not None and path.is_dir()}
    return sorted(places, key=lambda path: places[path])


def read_state(checkpoint: Path, *names: Literal["fixed", "progress", "groups"]) -> dict[str, Any]:
    """training_state.json of a checkpoint; a UserError if it is damaged, or has not what is needed."""
    kinds: dict[str, Any] = {"fixed": dict, "progress": {"step": int}, "groups": [dict]}
    form = {name: kinds[name] for name in names}
    state: dict[str, Any] = read_json(checkpoint / STATE, form, "take another checkpoint")
    if "progress" in names and (step := state["progress"]["step"]) != (checkpoint_step(checkpoint) or step):
        raise UserError(f"{checkpoint / STATE} says step {step:,}: it is that of another checkpoint")
    return state


# ---- whole or damaged --------------------------------------------------------------------------------------------


def write_checksums(folder: Path) -> None:
    """Write size and sha256 of every file of a folder into checksums.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in files}
    (folder / CHECKSUMS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None when every file is as it was written."""
    try:
        facts = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        for name, fact in facts.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != fact["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {fact['bytes']}"
            if file_sha256(path) != fact["sha256"]:
                return f"{name} has another content than was written"
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return f"{CHECKSUMS} is damaged"
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")}
    unnamed = ({STATE} | there) - {CHECKSUMS, *facts}
    return f"{CHECKSUMS} does not name {min(unnamed)}" if unnamed else None


def look_for_whole(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all as they were written, if there is one, and sentences for the user."""
    sentences: list[str] = []
    for folder in reversed(list_checkpoints(run_dir)):
        if not (damage := find_damage(folder)):
            return folder, [*sentences, *_average_notice(folder)]
        sentences.append(f"{folder.name} is damaged ({damage}) and passed over")
    return None, sentences


def _average_notice(checkpoint: Path) -> list[str]:
    """What to know of a checkpoint of a run that also keeps a moving average of the weights."""
    said = f"{checkpoint} holds the weights as trained; their moving average, which was evaluated, is in final/"
    return [said] if (checkpoint / AVERAGE).is_file() else []


# ---- what is meant -----------------------------------------------------------------------------------------------


def find_saved(folder: Path, prefer: Literal["final", "checkpoint"] = "final") -> tuple[Path, list[str]]:
    """The model that a folder stands for: itself, or of a run its final/ or its newest whole checkpoint.

    Raises:
        UserError: there is no such folder, or what is meant is damaged, as its checksums say.
    """
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else f"does not exist (seen from {Path.cwd()})"
        beside = f", such as {folder.with_suffix('')}" if folder.suffix and folder.with_suffix("").is_dir() else ""
        raise UserError(
            f"the model folder {folder} {kind}: give the folder of the model, a checkpoint or a run{beside}"
        )
    checkpoints, final = list_checkpoints(folder), folder / "final"
    if (folder / "config.json").is_file() or not (checkpoints or (final / "config.json").is_file()):
        of_training = any((folder / name).exists() for name in OF_TRAINING) or checkpoint_place(folder) is not None
        if of_training and (damage := find_damage(folder)):
            raise UserError(f"the checkpoint {folder} is damaged: {damage}; take another")
        return folder, _average_notice(folder)
    if (final / "config.json").is_file() and (prefer == "final" or not checkpoints):
        return final, [f"{folder} is the folder of a run: final is taken"]
    newest, notices = look_for_whole(folder)
    if newest is None:
        raise UserError(f"every checkpoint in {folder} is damaged: {'; '.join(notices)}")
    return newest, [*notices, f"{folder} is the folder of a run: {newest.name} is taken"]


def find_checkpoint(path: Path) -> tuple[Path, list[str]]:
    """The whole checkpoint that a path names, with the state of its training: itself, or the newest of a run.

    Raises:
        UserError: it is neither, or it is damaged.
    """
    found, sentences = find_saved(path, prefer="checkpoint") if path.is_dir() else (path, [])
    if not (found / STATE).is_file():
        hint = ": give a model's folder as --pretrained_model_name_or_path" if (path / "config.json").is_file() else ""
        raise UserError(f"{path} is no checkpoint and holds none{hint}")
    return found, [f"starting from {found}", *sentences]


def find_model(name: str) -> tuple[Path, list[str]]:
    """As `find_saved`, also for a name on the Hub (from its cache when offline), whose cached folder is given."""
    place = Path(name).expanduser()
    if place.exists() or not _HUB_NAME.fullmatch(name) or name.endswith(_NO_HUB_NAME):
        return find_saved(place)
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from transformers.utils.hub import cached_file

    try:
        return Path(str(cached_file(name, "config.json"))).parent, []
    except Exception as error:  # the Hub client raises many kinds
        reason = "HF_HUB_OFFLINE is set, so only its cache was searched" if HF_HUB_OFFLINE else shortened(error)
        raise UserError(
            f"{name} is neither a folder (seen from {Path.cwd()}) nor a model of the Hub: {reason}"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers takes the weights of a folder from, if there are any; their index must be whole."""
    for name in WEIGHTS:
        if (file := folder / name).is_file():
            break
    else:
        return []
    if file.suffix != ".json":
        return [file]
    try:
        parts = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: it is no index of weights ({type(error).__name__}: {error})") from None
    if not parts or not all(isinstance(part, str) for part in parts):
        raise UserError(f"{file} is damaged: its weight_map names no files of weights")
    return [folder / part for part in sorted(parts)]
