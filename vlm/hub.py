"""`vlm push`: a finished run to the Hugging Face Hub, weights, processor, code and model card in one commit."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.errors import UserError
from vlm.files import scratch_folder
from vlm.publication import Publication, is_weights, prepare, require_pushable

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HTTP_CLIENTS = ("httpx", "httpx2")  # huggingface_hub has changed its client once, and does not wrap its errors


def run(run_dir: str, repo_id: str, *, merge_lora: bool, target: str | None, private: bool, console: Any) -> None:
    """List the files of a push, upload them, and print the repository's URL. Raises UserError as [`push`] does."""
    require_pushable(Path(run_dir), repo_id, merge_lora=merge_lora, target=target)
    token = require_token()
    with scratch_folder(Path(tempfile.gettempdir()) / "vlm-push") as scratch:
        publication = prepare(Path(run_dir), repo_id, scratch, merge_lora=merge_lora, target=target)
        console.print(publication.listing(), markup=False, highlight=False, soft_wrap=True)
        console.print(upload(publication, repo_id, token=token, private=private))


def push(
    run_dir: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = False,
    merge_lora: bool = True,
    target: str | None = None,
) -> str:
    """Upload a run folder's model with a model card to `repo_id`, creating the repository if need be.

    There is exactly one commit. Weights of an earlier push that this one does not write are deleted in it, because
    transformers would load a stale `model.safetensors` before new shards. The server is HF_ENDPOINT's.

    Args:
        run_dir: a run folder: `model/` (checkpoint and processor, LoRA merged), and, as far as there, `adapter/` (the
            same LoRA, and what was trained with it), `recipe.yaml`, `environment.json` and `evaluation/summary.json`.
        repo_id: `user/name`.
        token: a write token; by default the one of `hf auth login` or HF_TOKEN.
        private: create the repository private. One that exists stays as it is.
        merge_lora: upload `model/` as it is, which loads without peft. Otherwise upload the model without its LoRA, and
            `adapter/` next to it.
        target: upload the model as one of transformers' own, a name of `vlm export --to` such as `llava`.

    Returns:
        The repository's URL.

    Raises:
        UserError: no token, no model in the run folder, no LoRA to keep apart, a model that is none of `target`'s, a
            bad repository name, or the server refuses.
    """
    require_pushable(Path(run_dir), repo_id, merge_lora=merge_lora, target=target)
    token = require_token(token)
    with scratch_folder(Path(tempfile.gettempdir()) / "vlm-push") as scratch:
        publication = prepare(Path(run_dir), repo_id, scratch, merge_lora=merge_lora, target=target)
        return upload(publication, repo_id, token=token, private=private)


def require_token(token: str | None = None) -> str:
    """Return the token, or that of `hf auth login` or HF_TOKEN. Raises UserError if there is none."""
    from huggingface_hub import get_token

    if not (token := token or get_token()):
        raise UserError("pushing needs a token with write access: log in with `hf auth login`, or set HF_TOKEN")
    return token


def upload(publication: Publication, repo_id: str, *, token: str, private: bool) -> str:
    """Upload the files in one commit and return the repository's URL. Raises UserError if the server refuses."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
    files = publication.files
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        stale = [name for name in api.list_repo_files(repo_id) if is_weights(name) and name not in files]
        operations: list[Any] = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        with _xet_only_where_it_is(api, repo_id):
            api.create_commit(repo_id, operations, commit_message="Upload model, processor and card")
    except HfHubHTTPError as e:
        raise UserError(f"{api.endpoint} refused the upload to {repo_id}: {e.server_message or e}") from e
    except Exception as e:
        if type(e).__module__.partition(".")[0] not in HTTP_CLIENTS:
            raise
        raise UserError(
            f"{api.endpoint} cannot be reached: {e}. {publication.run_dir} is as it was; try again later with "
            f"`{publication.command}`"
        ) from e
    return str(url)


@contextmanager
def _xet_only_where_it_is(api: "HfApi", repo_id: str) -> Iterator[None]:
    """Upload by plain LFS to a server that has no Xet storage; huggingface_hub would die asking it for a Xet token."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    before = constants.HF_HUB_DISABLE_XET
    url = f"{api.endpoint}/api/models/{repo_id}/xet-write-token/main"
    if not before and get_session().get(url, headers=api._build_hf_headers()).status_code == 404:
        constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before
