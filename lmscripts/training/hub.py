"""The Hugging Face Hub, to which a run uploads what it keeps, by a thread beside the training.

The token is the one that huggingface_hub finds, in HF_TOKEN or where `hf auth login` left it; it is written nowhere.
"""

from __future__ import annotations

import os
import queue
import re
import shlex
import shutil
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lmscripts.errors import UPLOADER, UserError, shortened
from lmscripts.models.finding import OF_TRAINING


class Hub:
    """A repository, USER/NAME in `repo`; the main process has the `api` of huggingface_hub, and alone uploads."""

    def __init__(self, repo: str, api: Any = None) -> None:
        self.repo, self._api = repo, api
        self._waiting: queue.Queue[tuple[Path, str, Callable[[str], Any]]] = queue.Queue()  # one at most
        self._problems = dict[str, str]()  # by messages
        if api is not None:  # a daemon, as it must not keep a process that is asked to end
            threading.Thread(target=self._work, daemon=True).start()

    def push(self, folder: Path, message: str, say: Callable[[str], Any], beside: Path) -> None:
        """Upload a model, in the place of one that waits; what goes wrong is said once, and harms nothing.

        Args:
            folder: of the model; the files of its training are left out. It may be removed as soon as this returns.
            message: of the commit. Where no file is another, there will be none.
            say: tells the user a sentence.
            beside: a folder on the same disk for links to the files; copies where there are no links.
        """
        linked, ignored = beside / f".hub-{uuid.uuid4().hex[:8]}", shutil.ignore_patterns(*OF_TRAINING)
        try:
            shutil.copytree(folder, linked, ignore=ignored, copy_function=_link)
        except OSError as error:
            shutil.rmtree(linked, ignore_errors=True)
            return self._failed(message, error, say)
        with suppress(queue.Empty):
            shutil.rmtree(self._waiting.get_nowait()[0], ignore_errors=True)
            self._waiting.task_done()
        return self._waiting.put((linked, message, say))

    def _work(self) -> None:
        while True:
            folder, message, say = self._waiting.get()
            threading.current_thread().name = UPLOADER
            try:
                self._api.upload_folder(repo_id=self.repo, folder_path=folder, commit_message=message)
            except Exception as error:  # of the network, of the Hub, of what lies between
                self._failed(message, error, say)
            shutil.rmtree(folder, ignore_errors=True)
            threading.current_thread().name = "idle"
            self._waiting.task_done()

    def _failed(self, message: str, error: Exception, say: Callable[[str], Any]) -> None:
        if not self._problems:
            say(f"warning: {message} was not uploaded to {self.repo} ({_words(error)}); the run goes on")
        self._problems[message] = _words(error)

    def is_done(self, seconds: float) -> bool:
        """Whether nothing is left to upload, after so many seconds at most."""
        with self._waiting.all_tasks_done:
            return self._waiting.all_tasks_done.wait_for(lambda: not self._waiting.unfinished_tasks, seconds)

    def check(self, folder: Path, message: str) -> None:
        """Raise a UserError if what was uploaded with this message, of a folder that stays, could not be."""
        if problem := self._problems.get(message):
            raise UserError(
                f"the model is in {folder}, but was not uploaded to {self.repo} ({problem}); later: "
                f"hf upload {self.repo} {shlex.quote(str(folder))}"
            )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _words(error: Exception) -> str:
    """An error in words, without the token, whatever library may have quoted it."""
    from huggingface_hub import get_token

    return shortened(Exception(str(error).replace(get_token() or "\0", "***")), 300)


def open_hub(
    name: str | None, private: bool | None, language: Sequence[str], licence: str | None, *, is_tried: bool
) -> tuple[Hub | None, list[str]]:
    """The repository USER/NAME or NAME, made where there is none; asked by the main process alone.

    Args:
        name: None for none.
        private: nobody else is to see it.
        language: for the card, which the Hub must take; likewise the licence.
        licence: of the model.
        is_tried: only look whether the token is right, and make nothing.

    Returns:
        The repository, and a sentence for the user.

    Raises:
        UserError: the Hub may not be asked, there is no token, or the Hub refuses.
    """
    if name is None or os.environ.get("RANK", "0") != "0":
        return Hub(name) if name else None, []
    from huggingface_hub import HfApi, ModelCardData, constants, get_session, get_token

    what, later = f"--push_to_hub {name}", f"leave it out, and upload later: hf upload {name} FOLDER"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{what} needs the Hub, and HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids it: {later}")
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", name, re.ASCII):
        raise UserError(f"{what} must be USER/NAME or NAME, of letters, digits, - _ and .")
    api, card = HfApi(), ModelCardData(language=[*language] or None, license=licence, tags=["lmscripts"])
    try:
        if not re.fullmatch(r"[\w.~+/=-]+", get_token() or "", re.ASCII):  # what else it may be, errors would quote
            raise UserError(f"{what} needs a token: `hf auth login`, or set HF_TOKEN; or {later}")
        user = api.whoami()["name"]
        hub = Hub(name if "/" in name else f"{user}/{name}", api)
        asked = {"repoType": "model", "content": f"---\n{card}\n---\n"}
        answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=asked)
        if answer.status_code == 400:
            raise UserError(
                f"{what}: the Hub does not take --license or --language: {shortened(ValueError(answer.text))}"
            )
        if not is_tried:
            api.create_repo(hub.repo, private=private, exist_ok=True)
            api.auth_check(hub.repo, write=True)
        if private and not is_tried and not api.model_info(hub.repo).private:
            raise UserError(f"{hub.repo} is there already, and not private: leave out --hub_private, or rename")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} is refused ({_words(error)}): is the name right, and may its token write?") from None
    return hub, [f"checkpoints and the model go to {constants.ENDPOINT}/{hub.repo}{' (private)' if private else ''}"]
