"""The Hugging Face Hub, to which a run uploads what it keeps, by a thread beside the training.

The token is the one that huggingface_hub finds, in HF_TOKEN or where `hf auth login` left it; it is written nowhere.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmscripts.errors import UserError, shortened
from lmscripts.models.finding import OF_TRAINING


class _Upload(NamedTuple):
    folder: Path
    message: str  # of the commit
    say: Callable[[str], Any]
    is_linked: bool  # the folder is ours, and goes when it is done


class Hub:
    """A repository for a model. One folder is uploaded at a time; a newer one takes the place of one that waits.

    Attributes:
        repo: its name, USER/NAME.
    """

    def __init__(self, repo: str, api: Any = None) -> None:
        """Nothing is asked yet; `api` is that of huggingface_hub on the main process, which alone uploads."""
        self.repo, self._api = repo, api
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._waiting: _Upload | None = None
        self._problem, self._warned = "", False  # the problem is that of the last upload

    def push(self, folder: Path, message: str, say: Callable[[str], Any], beside: Path | None = None) -> None:
        """Upload a model's folder, without the files of its training, while the process goes on.

        What goes wrong is said once, and harms nothing. Of equal files the Hub makes no second commit.

        Args:
            folder: of the model.
            message: of the commit.
            say: tells the user a sentence.
            beside: a folder on the same disk for links to the files (copies where there are none), so that the model's
                may be removed meanwhile; None for one that stays.
        """
        if beside is not None:
            linked = beside / f".hub-{uuid.uuid4().hex[:8]}"
            try:
                ignored = shutil.ignore_patterns(*OF_TRAINING)
                shutil.copytree(folder, linked, ignore=ignored, copy_function=_link)
            except OSError as error:
                shutil.rmtree(linked, ignore_errors=True)
                return self._failed(error, say)
            folder = linked
        with self._lock:
            replaced, self._waiting = self._waiting, _Upload(folder, message, say, beside is not None)
            if self._thread is None:  # it does not keep a process that is asked to end
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
        if replaced is not None and replaced.is_linked:
            shutil.rmtree(replaced.folder, ignore_errors=True)
        return None

    def _work(self) -> None:
        while True:
            with self._lock:
                upload, self._waiting = self._waiting, None
                if upload is None:
                    self._thread = None
                    return
            where = {"repo_id": self.repo, "folder_path": upload.folder}
            try:
                self._api.upload_folder(**where, commit_message=upload.message, ignore_patterns=[*OF_TRAINING])
                self._problem = ""
            except Exception as error:  # of the network, of the Hub, of what lies between
                self._failed(error, upload.say)
            if upload.is_linked:
                shutil.rmtree(upload.folder, ignore_errors=True)

    def _failed(self, error: Exception, say: Callable[[str], Any]) -> None:
        self._problem = _words(error)
        if not self._warned:
            say(f"warning: a checkpoint was not uploaded to {self.repo} ({self._problem}); training goes on")
        self._warned = True

    def is_done(self, seconds: float) -> bool:
        """Wait so long at most for the uploads; whether none is left."""
        if (thread := self._thread) is not None:
            thread.join(seconds)
        return self._thread is None

    def check(self, folder: Path) -> None:
        """Raise a UserError if the last upload, of this folder, went wrong."""
        if self._problem:
            raise UserError(
                f"the model is in {folder}, but was not uploaded to {self.repo} ({self._problem}); later: "
                f"hf upload {self.repo} {folder}"
            )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without them
        shutil.copyfile(source, target)


def _words(error: Exception) -> str:
    """An error in words, without the token, whatever library may have quoted it."""
    from huggingface_hub import get_token

    token = get_token()
    return shortened(Exception(str(error).replace(token, "***") if token else error), 300)


def open_hub(
    name: str | None, private: bool | None, language: Sequence[str], licence: str | None, *, is_tried: bool
) -> tuple[Hub | None, list[str]]:
    """The repository of a name, USER/NAME or NAME, made where there is none; asked by the main process alone.

    Args:
        name: None for none.
        private: nobody else is to see it.
        language: for the card, of which the Hub is asked whether it takes it.
        licence: likewise.
        is_tried: only look whether there is a token that is right, and make nothing.

    Returns:
        The repository, and a sentence for the user.

    Raises:
        UserError: the Hub may not be asked, there is no token, or the Hub refuses.
    """
    if name is None or os.environ.get("RANK", "0") != "0":
        return Hub(name) if name else None, []
    from huggingface_hub import HfApi, ModelCard, ModelCardData, constants, get_token
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    what, later = f"--push_to_hub {name}", f"leave it out and upload later: hf upload {name} FOLDER"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{what} needs the Hub, and HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids it: {later}")
    try:
        validate_repo_id(name)
        token = get_token()
        if not token or not re.fullmatch(r"[\w.~+/=-]+", token, re.ASCII):
            lacks = "there is none" if not token else "it holds a sign that no token has"
            raise UserError(f"{what} needs a token ({lacks}): `hf auth login`, or set HF_TOKEN; or {later}")
        api = HfApi()
        user = api.whoami()["name"]
        hub = Hub(name if "/" in name else f"{user}/{name}", api)
        card = ModelCardData(language=[*language] or None, license=licence, tags=["lmscripts"])
        ModelCard(f"---\n{card}\n---\n").validate("model")
        if not is_tried:
            api.create_repo(hub.repo, private=private, exist_ok=True)
            api.auth_check(hub.repo, write=True)
            if private and not api.model_info(hub.repo).private:
                raise UserError(f"{hub.repo} is there already, and not private: leave out --hub_private, or rename")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} is refused ({_words(error)}): is the name right, and may its token write?") from None
    return hub, [f"checkpoints and the model go to {constants.ENDPOINT}/{hub.repo}{' (private)' if private else ''}"]
