"""The Hugging Face Hub as publish.py needs it: who may write, one upload, and a sentence for what goes wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from .records import LOG, RECORD

# All that is published. What an earlier upload left of it goes: a shard of another model must not stay beside the new ones.
FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "README.md", "samples.png", RECORD, LOG]


def check_name(repo: str) -> None:
    """Raises SystemExit with a sentence unless `repo` can be the id of a model, owner/name."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise SystemExit(f"{repo} cannot be a Hub id: {error}") from error
    if "/" not in repo:
        raise SystemExit(f"{repo} names no owner: a Hub id is owner/name.")


def check_login(repo: str) -> None:
    """Raises SystemExit with a sentence if the Hub cannot be reached or does not know the token.

    Whether the token may write to `repo` shows only when that is tried.
    """
    with sentences(repo):
        HfApi().whoami()


def upload(folder: Path, repo: str, message: str, private: bool = False, revision: str | None = None) -> str:
    """Puts the files of `folder` in place of `repo`'s, in one commit on the branch `revision` (main); its address.

    Creates repo and branch if need be. Raises SystemExit with a sentence if the Hub will not have it, or if a repo
    that is there already is public and `private` is asked for.
    """
    api = HfApi()
    with sentences(repo):
        api.create_repo(repo, repo_type="model", private=True if private else None, exist_ok=True)
        if private and not api.model_info(repo).private:  # of one that exists, create_repo changes nothing
            raise SystemExit(f"{repo} exists and is public: make it private on its page first, or leave --private out.")
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, repo_type="model", revision=revision, commit_message=message,
            delete_patterns=FILES,
        )
    return commit.commit_url


@contextmanager
def sentences(repo: str) -> Iterator[None]:
    """Turns what huggingface_hub raises inside into SystemExit with a sentence."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise SystemExit("The Hub needs to know you: run `hf auth login`, or set HF_TOKEN to your token.") from error
    except OfflineModeIsEnabled as error:
        raise SystemExit("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it, or take --dry-run.") from error
    except HfHubHTTPError as error:
        status, said = error.response.status_code, error.server_message or str(error).splitlines()[0]
        causes = {
            401: "the token is not valid: run `hf auth login`, or set HF_TOKEN to another",
            403: "the token may not write there: it needs write access, and you a place in that organisation",
            404: "it does not exist, or the token may not see it",
        }
        raise SystemExit(f"The Hub refuses {repo}: {causes.get(status, said)}. (HTTP {status})") from error
    except HTTPError as error:  # no answer
        raise SystemExit(f"{constants.ENDPOINT} cannot be reached: {error}. Nothing was published.") from error
    except OSError as error:  # the large files' own client raises these
        raise SystemExit(f"{repo}: the upload broke off: {error}. The same command goes on with it.") from error
