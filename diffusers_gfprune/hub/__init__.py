"""Push pruning runs to the Hub: selection of files, model card, a Space that shows the model, and error messages.

    python -m diffusers_gfprune.hub push runs/digits-gfpruned me/ddpm-digits-gfpruned [--private] [--dry_run]
    python -m diffusers_gfprune.hub push runs/digits-gfpruned me/ddpm-digits-gfpruned --space me/ddpm-digits-demo

Only the files of the pipeline and of the run are uploaded, after a check that they contain no access tokens or local paths.
Weights of an earlier push that are not replaced are deleted from the repository. Files that the repository already has are not
uploaded again. The client may upload many files in several commits: after a push that failed, push again.
"""

from .pushing import (
    PICTURES,
    PushError,
    check_edited_card,
    check_repo_id,
    prepare_repo,
    push_checkpoint,
    push_folder,
    update_card,
)
from .selection import check_nothing_private, files_to_push
from .spaces import prepare_space, push_space, write_space

__all__ = [
    "PICTURES",
    "PushError",
    "check_edited_card",
    "check_nothing_private",
    "check_repo_id",
    "files_to_push",
    "prepare_repo",
    "prepare_space",
    "push_checkpoint",
    "push_folder",
    "push_space",
    "update_card",
    "write_space",
]
